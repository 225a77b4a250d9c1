"""What a config names: its bank, its episodes, its model, its run folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from raymaml.config.schema import SPLITS, Config
from raymaml.doctor.finding import Finding, attempt
from raymaml.doctor.machine import disk_finding
from raymaml.storage.files import exists, make_folder
from raymaml.storage.place import Place, is_remote
from raymaml.training.data import open_bank, open_episode_sets
from raymaml.training.run import open_run
from raymaml.training.run_folder import claim, is_done
from raymaml.training.session import local_device


def config_findings(config: Config) -> Iterator[Finding]:
    """Check all that a run would open, hashes included; what depends on a failure is left out."""
    checks = {"image bank": _bank, "episodes": _episodes, "model": _model}
    for what, check in {**checks, "run folder": _run_folder}.items():
        found = list(attempt(what, partial(check, config)))
        yield from found
        if any(finding.status == "fail" for finding in found):
            break
    places = {"run_dir": config.run_dir, "data.bank": config.data.bank}
    for key, place in {**places, "data.shards": config.data.shards}.items():
        yield from _disk(key, place)


def _bank(config: Config) -> str:
    bank = open_bank(config.data)
    bank.verify()
    return f"{config.data.bank}: {bank.num_images} images, hash {bank.hash[:12]} as written"


def _episodes(config: Config) -> str:
    sets = open_episode_sets(
        config.data, config.episodes, open_bank(config.data), SPLITS, torch.device("cpu")
    )
    counts = ", ".join(f"{each.shards.count} {split}" for split, each in sets.items())
    return f"{config.data.shards}: {counts}, hashes as written"


def _model(config: Config) -> str:
    table = open_run(config, torch.device("cpu")).adaptation_table
    total, adapting = table.split()[-3:-1]  # "... in all 531 531 adapt"
    return f"{config.model.encoder} of {total} parameters, of which {adapting} adapt"


def _run_folder(config: Config) -> str:
    folder = config.run_folder
    if not exists(folder / "run.json"):
        return f"{folder}: is new"
    with claim(open_run(config, torch.device("cpu"))):
        state = "is done" if is_done(config) else "can go on"
    return f"{folder}: was started with this config, and {state}"


def _disk(key: str, place: Place) -> Iterator[Finding]:
    if not is_remote(place):
        yield disk_finding(f"disk for {key}", place)
        return

    def reach() -> str:
        make_folder(place, key)
        return f"{place} can be reached"

    yield from attempt(f"storage for {key}", reach)


def device_findings(config: Config) -> Iterator[Finding]:
    """Check that this process has the device that the config asks for."""
    yield from attempt("cluster.device", lambda: str(local_device(config.cluster)))
