"""All checks, one after the other, and how they are shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console
from rich.text import Text
from torch.utils import collect_env

from raymaml.common.errors import UserError
from raymaml.common.logs import is_verbose, plain
from raymaml.common.untrusted import json_text
from raymaml.config.schema import SPLITS, ClusterConfig, Config
from raymaml.data.duplicates import found_in
from raymaml.doctor import Finding, attempt, failures
from raymaml.doctor.machine import disk_finding, machine_findings
from raymaml.doctor.rehearsal import rehearsal_folder, rehearse
from raymaml.evaluation.campaign import judge_locally
from raymaml.storage.files import exists
from raymaml.storage.place import is_remote
from raymaml.training.data import open_bank, open_episode_sets
from raymaml.training.run import claim, is_done, open_run
from raymaml.training.worker import train_locally

_CPU = torch.device("cpu")
COPIES_REMEDY = (
    "set data.source.duplicates: drop and import into another data.bank, or remove the copies"
)
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def examine(config: Config | None, *, local: bool) -> Iterator[Finding]:
    """Check this machine, what ``config`` names, and the cluster; ``local`` leaves Ray out."""
    if is_verbose():
        logging.getLogger(__name__).info(collect_env.get_pretty_env_info())
    yield from machine_findings()
    if config is not None:
        yield from config_findings(config)
    cluster = ClusterConfig() if config is None else config.cluster
    try:
        with rehearsal_folder(None if config is None else config.run_dir) as folder:
            if local:
                yield from rehearse(folder, cluster, train_locally, judge_locally)
            else:
                from raymaml.doctor.nodes import cluster_findings

                yield from cluster_findings(cluster, config, folder)
    except UserError as error:
        yield from failures("rehearsal" if local else "cluster", error)


def config_findings(config: Config) -> Iterator[Finding]:
    """Check all that a run would open: data, with their hashes, model and run folder."""
    checks: dict[str, Callable[[], str | Finding]] = {
        "data": partial(_data, config),
        "copies": partial(_copies, config),
        "run folder": partial(_run_folder, config),
    }
    yield from attempt(checks, until_failure=True)
    if not is_remote(config.run_dir):
        yield disk_finding("disk for run_dir", config.run_dir)


def _data(config: Config) -> str:
    bank = open_bank(config.data)
    bank.verify()
    sets = open_episode_sets(config.data, config.episodes, bank, SPLITS, _CPU)
    counts = ", ".join(f"{each.shards.count} {split}" for split, each in sets.items())
    return f"{bank.num_images} images, {counts} episodes, hashes as written"


def _copies(config: Config) -> Finding:
    """Warn of pictures in two splits; a bank of before, which does not name them, is searched."""
    bank = open_bank(config.data)
    found = found_in(bank)
    now = ", found now: its import did not look" if bank.duplicates is None else ""
    if not found.leaks:
        return Finding("ok", "copies", f"no picture is in two splits{now}")
    return Finding("warn", "copies", f"{'; '.join(map(str, found.leaks))}{now}", COPIES_REMEDY)


def _run_folder(config: Config) -> str:
    run = open_run(config, _CPU)
    *_, total, adapting, _ = run.learner.adaptation_table().split()
    state = "is new"
    if exists(run.folder / "run.json"):
        with claim(run):
            state = "is done" if is_done(config.run_folder, config.steps) else "can go on"
    return f"{run.folder}: {state}; {total} parameters, {adapting} adapt"


def show(findings: Iterator[Finding], *, as_json: bool) -> bool:
    """Print a line for each finding, or all as JSON; return whether none is a failure."""
    console = Console(soft_wrap=True, highlight=False)
    found = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            console.print(_line(finding))
    counts = {status: sum(each.status == status for each in found) for status in _COLOURS}
    is_well = counts["fail"] == 0
    if as_json:
        content = {"ok": is_well, "findings": [vars(finding) for finding in found]}
        console.print_json(json_text(content))
    else:
        console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return is_well


def _line(finding: Finding) -> Text:
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    text = plain(f"{finding.what:<22}  {finding.found}{remedy}")
    return Text.assemble((f"{finding.status:<4}", _COLOURS[finding.status]), f"  {text}")
