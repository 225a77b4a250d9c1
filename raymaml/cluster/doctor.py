"""The doctor on a cluster: every node, and what lies between them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

import raymaml
from raymaml.cluster.campaign import judge_on_cluster
from raymaml.cluster.network import PATIENCE, Node, living_nodes, network_findings, on
from raymaml.cluster.runtime import connected
from raymaml.cluster.train import train_on_cluster
from raymaml.cluster.workers import plan_workers, slots_of_cluster
from raymaml.common.errors import UserError, last_line
from raymaml.config.schema import SPLITS, ClusterConfig, Config
from raymaml.data.bank_format import HEADER_FILE
from raymaml.data.shard_format import MANIFEST_FILE
from raymaml.doctor.finding import Finding, attempt, fail, in_units, ok, user_error
from raymaml.doctor.machine import machine_findings, malloc_finding
from raymaml.doctor.rehearsal import MARKER, cache_of, rehearse, remove_cache
from raymaml.doctor.software import shown_versions
from raymaml.storage.place import Place, is_remote

_OTHER_FOLDER = "put it on a disk that all nodes share, or at a URI such as s3://bucket/folder"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a node says of itself."""

    versions: Mapping[str, str]
    findings: tuple[Finding, ...]
    files: Mapping[str, str]
    """Content of the files it was asked for, by key; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a node is to look at."""

    files: Mapping[str, Place]
    """Small ones, by the key of the config that names them."""
    keep_freed_memory: bool


def examine_cluster(
    cluster: ClusterConfig, config: Config | None, folder: Place
) -> Iterator[Finding]:
    """Join the cluster, or start one, and check its nodes, the network, and a tiny run.

    Args:
        cluster: what the config asks of it.
        config: whose places all nodes must see alike; None: there is no config.
        folder: for the tiny run.
    """
    try:
        with connected(cluster):
            yield from _examine(cluster, config, folder)
    except UserError as error:
        yield from (user_error("cluster", problem) for problem in error.problems)


def _examine(cluster: ClusterConfig, config: Config | None, folder: Place) -> Iterator[Finding]:
    nodes = living_nodes()
    yield _size(nodes)
    workers = list(attempt("cluster.num_workers", lambda: _workers(cluster)))
    yield from workers

    order = Order(files=_files(config, folder), keep_freed_memory=cluster.keep_freed_memory)
    asked = [(node, _ask(node, order)) for node in nodes]  # all at once
    answers = {node: _answer(node, reference) for node, reference in asked}
    reports = {node: answer for node, answer in answers.items() if isinstance(answer, Report)}
    for node, answer in answers.items():
        yield from _of_node(node, answer) if isinstance(answer, Report) else (answer,)
    if len(reports) < len(nodes):
        return
    yield from version_findings({node.name: each.versions for node, each in reports.items()})
    places = list(_place_findings(order.files, {node.name: r.files for node, r in reports.items()}))
    yield from places
    yield from network_findings(nodes)
    if any(finding.status == "fail" for finding in (*workers, *places)):
        return
    try:
        yield from _rehearse(cluster, folder)
    finally:
        if is_remote(folder):
            _remove_caches(nodes, cache_of(folder))


def _size(nodes: Sequence[Node]) -> Finding:
    def total(name: str) -> float:
        return sum(node.resources.get(name, 0) for node in nodes)

    return ok(
        "cluster",
        f"{len(nodes)} node(s), {total('CPU'):g} CPU cores, {total('GPU'):g} GPUs,"
        f" {in_units(total('memory'))} of memory, object stores of"
        f" {in_units(total('object_store_memory'))}",
    )


def _workers(cluster: ClusterConfig) -> str:
    count, use_gpu = plan_workers(cluster, ray.cluster_resources())
    return f"{count} {'GPU' if use_gpu else 'CPU'} worker(s) at once"


def _files(config: Config | None, folder: Place) -> dict[str, Place]:
    """Return files that all nodes must see alike, by the key of the config that names them."""
    files: dict[str, Place] = {"run_dir": folder / MARKER}
    if config is not None:
        files["data.bank"] = config.data.bank.absolute() / HEADER_FILE
        for split in SPLITS:
            manifest = (config.data.shards / split).absolute() / MANIFEST_FILE
            files[f"data.shards ({split})"] = manifest
    return files


def _ask(node: Node, order: Order) -> Any:
    """Have a process on ``node`` look at its machine; return the reference of its report."""
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    store = node.resources.get("object_store_memory", 0)
    return task.options(scheduling_strategy=on(node)).remote(order, store)


def _answer(node: Node, reference: Any) -> Report | Finding:
    try:
        report: Report = ray.get(reference, timeout=PATIENCE)
    except ray.exceptions.GetTimeoutError:
        remedy = "look whether it is overloaded, and into Ray's logs there"
        return fail(f"node {node.name}", f"does not answer within {PATIENCE:g} s", remedy)
    except Exception as error:
        return fail(
            f"node {node.name}",
            f"cannot run raymaml ({last_line(error)})",
            f"install raymaml {raymaml.__version__} there, or submit the command as a job"
            " (launch/submit.sh), which brings the code along",
        )
    return report


def _look(order: Order, store: float) -> Report:
    """Look at the machine of this process, which runs on the node in question."""
    malloc = [malloc_finding("malloc", os.environ)] if order.keep_freed_memory else []
    return Report(
        versions=own_versions(),
        findings=(*machine_findings(store), *malloc),
        files={key: _content(place) for key, place in order.files.items()},
    )


def own_versions() -> dict[str, str]:
    """Return the versions that all nodes must have alike."""
    own = {"python": platform.python_version(), "raymaml": raymaml.__version__}
    return own | shown_versions()


def _content(place: Place) -> str:
    try:
        text: str = place.read_text(encoding="utf-8")
    except Exception:  # of whatever storage it is
        return ""
    return text


def _of_node(node: Node, report: Report) -> Iterator[Finding]:
    """Yield what is not well on a node; one line if all is."""
    troubles = [finding for finding in report.findings if finding.status != "ok"]
    for finding in troubles:
        yield replace(finding, what=f"node {node.name}: {finding.what}")
    if not troubles:
        told = {finding.what: finding.found for finding in report.findings}
        yield ok(f"node {node.name}", f"{told['CPU']}; {told['devices']}; {told['memory']}")


def version_findings(versions: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Compare the versions of each node with those of this process."""
    own, different = own_versions(), False
    for node, found in versions.items():
        for package in sorted(own.keys() | found.keys()):
            has, needs = found.get(package, "none"), own.get(package, "none")
            if has != needs:
                different = True
                remedy = f"install {package} {needs} there: all nodes must have the same"
                yield fail(f"versions on {node}", f"{package} {has}, here {needs}", remedy)
    if not different:
        text = ", ".join(f"{name} {version}" for name, version in own.items())
        yield ok("versions", f"the same on {len(versions)} node(s): {text}")


def _place_findings(
    wanted: Mapping[str, Place], files: Mapping[str, Mapping[str, str]]
) -> Iterator[Finding]:
    """Compare what the nodes see at each place with what this process sees."""
    for key, place in wanted.items():
        own = _content(place)
        if not own:  # said already, of the config's data
            continue
        strangers = [node for node, found in files.items() if found[key] != own]
        if strangers:
            where = f"{place.parent} is not the same folder on {', '.join(strangers)}"
            yield fail(f"place of {key}", where, f"set {key.split()[0]}: {_OTHER_FOLDER}")
        else:
            yield ok(f"place of {key}", f"the same on {len(files)} node(s)")


def _rehearse(cluster: ClusterConfig, folder: Place) -> Iterator[Finding]:
    """Run the tiny run with two workers, or one where there is no room for two."""
    slots, _ = slots_of_cluster(cluster)
    small = cluster.model_copy(update={"num_workers": min(2, slots)})
    yield from rehearse(folder, small, train_on_cluster, judge_on_cluster)


def _remove_caches(nodes: Sequence[Node], cache: Path) -> None:
    """Remove what each node has copied of the tiny run's data."""
    task = ray.remote(num_cpus=0, max_retries=0)(remove_cache)
    removed = [task.options(scheduling_strategy=on(node)).remote(cache) for node in nodes]
    ray.wait(removed, num_returns=len(removed), timeout=PATIENCE)
