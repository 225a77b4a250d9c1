"""A cluster: a process on each node checks its machine, then all train together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from raymaml.cluster.campaign import judge_on_cluster
from raymaml.cluster.runtime import connected, on_every_node
from raymaml.cluster.train import train_on_cluster
from raymaml.common.errors import UserError
from raymaml.config.schema import SPLITS, ClusterConfig, Config
from raymaml.data.bank_format import HEADER_FILE
from raymaml.data.shard_format import MANIFEST_FILE
from raymaml.doctor import Finding, failures
from raymaml.doctor.machine import GIB, machine_findings, own_versions, shared_memory_finding
from raymaml.doctor.rehearsal import MARKER, rehearse, remove_cache
from raymaml.storage.place import Place, is_remote

_SHARE = "set it to a disk that all nodes share, or to a URI such as s3://bucket/folder"
_INSTALL = "install the same version on all nodes"


def cluster_findings(
    cluster: ClusterConfig, config: Config | None, folder: Place
) -> Iterator[Finding]:
    """Join the cluster, or start one, check its nodes, and rehearse on it if no check fails.

    Args:
        cluster: how the config would train.
        config: all nodes must see its data alike; None: there is no config.
        folder: for the rehearsal.

    Raises:
        UserError: the cluster does not answer, or does not start.
    """
    with connected(cluster):
        found = list(_nodes(config, folder))
        yield from found
        if any(finding.status == "fail" for finding in found):
            return
        try:
            yield from rehearse(folder, cluster, train_on_cluster, judge_on_cluster)
        finally:
            if is_remote(folder):  # then each node has copied the data
                name = folder.name
                list(on_every_node(lambda _resources: remove_cache(name)))


def _nodes(config: Config | None, folder: Place) -> Iterator[Finding]:
    """Check every node, also for other versions, and other files, than this process sees."""
    places = {"run_dir": folder / MARKER}
    if config is not None:
        bank, shards = config.data.bank.absolute(), config.data.shards.absolute()
        places["data.bank"] = bank / HEADER_FILE
        places |= {f"data.shards ({split})": shards / split / MANIFEST_FILE for split in SPLITS}
    wanted = _shared(places)
    for name, answer in on_every_node(
        lambda resources: problems_of_node(resources, places, wanted)
    ):
        if isinstance(answer, UserError):
            yield from failures(name, answer)
        else:
            yield from (replace(each, what=f"{name}: {each.what}") for each in answer)


def problems_of_node(
    resources: Mapping[str, float], places: Mapping[str, Place], wanted: Mapping[str, str]
) -> list[Finding]:
    """Return the problems of the node of this process; one finding if there are none."""
    store = shared_memory_finding(Path("/dev/shm"), resources.get("object_store_memory", 0))
    findings = [*machine_findings(), store]
    findings += [
        Finding("fail", key, f"{found}, here {wanted[key]}", _SHARE if key in places else _INSTALL)
        for key, found in _shared(places).items()
        if found != wanted[key]
    ]
    if problems := [finding for finding in findings if finding.status != "ok"]:
        return problems
    devices = next(finding.found for finding in findings if finding.what == "devices")
    cores, memory = resources.get("CPU", 0), resources.get("memory", 0) / GIB
    return [Finding("ok", "machine", f"{cores:g} CPU cores, {memory:.1f} GiB, {devices}")]


def _shared(places: Mapping[str, Place]) -> dict[str, str]:
    """Return the facts that are alike on all nodes of a fit cluster: versions, and files."""
    return own_versions() | {key: _summary(place) for key, place in places.items()}


def _summary(place: Place) -> str:
    try:
        content = hashlib.sha256(place.read_bytes()).hexdigest()[:8]
    except Exception:  # each storage has its own
        return f"nothing in {place.parent}"
    return f"{place.parent} with content {content}"
