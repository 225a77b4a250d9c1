"""The doctor on clusters: of one node, and of two of which one sees other files."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_cluster import Command, kill_with_children, start_node

from raymaml.cluster import doctor, network
from raymaml.cluster.doctor import Order, examine_cluster, own_versions, version_findings
from raymaml.cluster.network import Trip, living_nodes, network_findings, pairs, trip_finding
from raymaml.config.schema import ClusterConfig
from raymaml.doctor.rehearsal import rehearsal_folder
from raymaml.training.process import MALLOC_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
WELL = Trip(seconds=0.001, bytes_per_second=1e9, skew=-0.001)


def test_versions_that_differ() -> None:
    own = own_versions()
    assert own.keys() >= {"python", "raymaml", "ray", "torch", "torchvision"}
    assert [each.status for each in version_findings({"a": own, "b": own})] == ["ok"]
    without = {key: value for key, value in own.items() if key != "pyarrow"}
    found = list(version_findings({"a": own, "b": without | {"torch": "2.0.0"}}))
    assert [(each.status, each.what) for each in found] == [("fail", "versions on b")] * 2
    assert [each.found.split(",")[0] for each in found] == ["pyarrow none", "torch 2.0.0"]
    assert found[1].remedy.startswith(f"install torch {own['torch']} there")


def test_networks_that_are_slow_and_clocks_that_differ() -> None:
    found = trip_finding("network", WELL)
    assert (found.status, found.remedy) == ("ok", "")
    assert found.found == "round trip 1.0 ms, 1000 MB/s, clocks 0.001 s apart"
    for change in ({"seconds": 0.05}, {"bytes_per_second": 1e6}):
        found = trip_finding("network", Trip(**{**vars(WELL), **change}))
        assert found.status == "warn"
        assert "nearer" in found.remedy
    found = trip_finding("network", Trip(**{**vars(WELL), "skew": -9.0}))
    assert (found.status, "NTP" in found.remedy) == ("warn", True)


def test_which_pairs_are_measured() -> None:
    assert pairs(1) == []
    assert pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert pairs(10) == [*((node, node + 1) for node in range(9)), (9, 0)]


@pytest.mark.slow
def test_a_cluster_that_does_not_answer(start) -> None:
    with socket.socket() as reserved:  # bound and not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        command = start("doctor", "--json", RAY_ADDRESS=address)
        assert command.finish() == 1
    assert command.errors == ""
    (finding,) = [each for each in findings(command) if each["status"] == "fail"]
    assert finding["what"] == "cluster"
    assert f"RAY_ADDRESS is {address}: no Ray cluster answers there" in finding["found"]
    assert finding["remedy"].startswith("start one with `ray start --head`")


@pytest.mark.ray
def test_a_cluster_of_one_node(cluster, make_config):
    config = make_config("run")
    with rehearsal_folder(config.run_dir) as folder:
        found = list(examine_cluster(config.cluster, config, folder))
    assert {each.status for each in found} <= {"ok", "warn"}, found
    whats = [each.what for each in found]
    assert whats[:2] == ["cluster", "cluster.num_workers"]
    assert {"versions", "place of data.bank", "process group (gloo)"} <= set(whats)
    assert whats[-1] == "rehearsal: test"
    assert not config.run_dir.exists()


@pytest.mark.ray
def test_a_cluster_that_is_too_small(cluster, tmp_path):
    with rehearsal_folder(tmp_path) as folder:
        found = list(examine_cluster(ClusterConfig(num_workers=99, device="cpu"), None, folder))
    (failed,) = [each for each in found if each.status == "fail"]
    assert failed.what == "cluster.num_workers"
    assert failed.remedy == "use at most 4, or auto"
    assert not any("rehearsal" in each.what for each in found)


class OnlyHere:
    """Nothing that a process elsewhere could import."""


@pytest.mark.ray
def test_nodes_that_cannot_run_raymaml_or_do_not_answer(cluster, monkeypatch):
    (node,) = living_nodes()
    order = Order(files={"run_dir": OnlyHere()}, keep_freed_memory=True)
    finding = doctor._answer(node, doctor._ask(node, order))
    assert (finding.status, finding.what) == ("fail", f"node {node.name}")
    assert finding.found.startswith("cannot run raymaml (")
    assert "launch/submit.sh" in finding.remedy
    for module in (doctor, network):
        monkeypatch.setattr(module, "PATIENCE", 0.001)
    finding = doctor._answer(node, doctor._ask(node, Order(files={}, keep_freed_memory=True)))
    assert (finding.status, finding.found) == ("fail", "does not answer within 0.001 s")
    (finding,) = network_findings([node])
    assert (finding.status, finding.what) == ("fail", "process group (gloo)")
    assert "open all ports" in finding.remedy


@dataclass(frozen=True)
class Two:
    """A cluster of two nodes; the second sees other files in ``hidden``, if the kernel lets it."""

    address: str
    environment: dict[str, str]
    hidden: Path
    is_hidden: bool


@pytest.fixture(scope="module")
def two(tmp_path_factory, short_folder) -> Iterator[Two]:
    home = tmp_path_factory.mktemp("home")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**inherited, "HOME": str(home), "RAY_AUTH_MODE": "disabled"}
    for name in ("PYTHONPATH", *MALLOC_ENVIRONMENT):
        environment.pop(name, None)
    hidden = Path(tempfile.mkdtemp(prefix="raymaml-hidden-"))
    options = ("--num-cpus=1", "--object-store-memory=100000000")
    unshare = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    away = [*unshare, str(hidden)]
    is_hidden = shutil.which("unshare") is not None and not (
        subprocess.run([*away, "true"], capture_output=True, check=False).returncode
    )
    nodes: list[subprocess.Popen] = []
    try:
        head = ("--head", "--port=0", "--include-dashboard=false")
        temp_dir = f"--temp-dir={short_folder / 'two'}"
        nodes.append(start_node(home / "head.txt", environment, *options, *head, temp_dir))
        session = short_folder / "two" / "ray_current_cluster"
        address = session.read_text(encoding="utf-8").strip()
        join = f"--address={address}"
        within = away if is_hidden else ()
        nodes.append(start_node(home / "other.txt", environment, *options, join, within=within))
        yield Two(address, environment, hidden, is_hidden)
    finally:
        for node in reversed(nodes):
            kill_with_children(node)
        shutil.rmtree(hidden)


def run_doctor(start, two: Two, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run ``raymaml doctor --json`` on the two nodes; nothing else is on stdout or stderr."""
    command = start(
        *("doctor", "--json", *arguments),
        cwd=ROOT,  # where the workers, too, find the code
        RAY_ADDRESS=two.address,
        RAY_AUTH_MODE="disabled",
    )
    code = command.finish()
    assert command.errors == ""
    return code, {finding["what"]: finding for finding in findings(command)}


def findings(command: Command) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads("\n".join(command.lines))["findings"]
    return found


@pytest.mark.ray
def test_two_nodes(two, start):
    code, found = run_doctor(start, two)
    assert code == 0, found
    assert found["cluster"]["found"].startswith("2 node(s), 2 CPU cores, 0 GPUs")
    assert found["versions"]["found"].startswith("the same on 2 node(s): python 3.")
    (trip,) = [what for what in found if what.startswith("network ")]
    assert found[trip]["found"].startswith("round trip ")
    assert found["process group (gloo)"]["found"] == "2 processes on 2 node(s) met"
    # neither node was started with the allocator's settings
    malloc = [each for what, each in found.items() if what.endswith("malloc")]
    assert [each["status"] for each in malloc] == ["warn", "warn"]
    assert found["rehearsal: same result"]["status"] == "ok"
    assert found["rehearsal: test"]["status"] == "ok"


@pytest.mark.ray
def test_a_run_dir_that_is_not_the_same_folder_on_both(two, start, tmp_path, make_config):
    if not two.is_hidden:
        pytest.skip(
            "another view of files for a process needs root, and a container that allows it"
        )
    make_config("run")
    path = str(tmp_path / "run" / "config.yaml")
    code, found = run_doctor(start, two, path, f"run_dir={two.hidden / 'runs'}")
    assert code == 1
    finding = found["place of run_dir"]
    assert finding["status"] == "fail"
    # of the two nodes, which Ray may give one address, one is told
    assert re.search(r" is not the same folder on [\d.]+(#\d)?$", finding["found"])
    assert finding["remedy"].startswith("set run_dir: put it on a disk that all nodes share")
    assert found["place of data.bank"]["status"] == "ok"
    assert not any(what.startswith("rehearsal") for what in found)
    assert list(two.hidden.iterdir()) == []
