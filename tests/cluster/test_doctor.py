"""The doctor on clusters: of one node, and of two that do not see the same files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from machinery import ROOT, Nodes

from raymaml.cluster import runtime
from raymaml.cluster.runtime import on_every_node
from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig
from raymaml.doctor.machine import own_versions
from raymaml.doctor.nodes import cluster_findings, problems_of_node
from raymaml.doctor.rehearsal import rehearsal_folder


def test_versions_that_differ() -> None:
    wanted = own_versions()
    assert wanted.keys() >= {"python", "raymaml", "ray", "torch", "torchvision"}
    found = problems_of_node({}, {}, wanted | {"torch": "2.0.0"})
    (finding,) = [each for each in found if each.status == "fail"]
    assert (finding.what, finding.found) == ("torch", f"{wanted['torch']}, here 2.0.0")
    assert finding.remedy == "install the same version on all nodes"


@pytest.mark.ray
def test_a_cluster_that_is_too_small(cluster, tmp_path):
    with rehearsal_folder(tmp_path) as folder:
        found = list(cluster_findings(ClusterConfig(num_workers=99, device="cpu"), None, folder))
    (failed,) = [each for each in found if each.status == "fail"]
    assert failed.found.startswith("cluster.num_workers is 99 but the Ray cluster has 4 CPU cores")
    assert failed.remedy == "use at most 4, or auto"


class OnlyHere:
    """No process elsewhere can import this class."""


@pytest.mark.ray
def test_nodes_that_cannot_run_raymaml_or_do_not_answer(cluster, monkeypatch):
    thing = OnlyHere()
    ((name, answer),) = on_every_node(lambda _resources: str(thing))
    assert name.startswith("node 1 (")
    assert isinstance(answer, UserError)
    assert str(answer).startswith("it cannot run raymaml (")
    assert "launch/submit.sh" in str(answer)
    monkeypatch.setattr(runtime, "NODE_PATIENCE", 0.001)
    ((_, answer),) = on_every_node(lambda resources: resources["CPU"])
    assert "Get timed out" in str(answer)


@pytest.fixture
def two(short_folder) -> Iterator[Nodes]:
    """A head of one CPU; a second node joins in each test."""
    cluster = Nodes(short_folder / "two", 1)
    yield cluster
    cluster.close()


@pytest.fixture
def hidden() -> Iterator[tuple[Path, list[str]]]:
    """A folder, and the command in front of another from which that sees other files there."""
    folder = Path(tempfile.mkdtemp(prefix="raymaml-hidden-"))
    elsewhere = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    within = [*elsewhere, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*within, "true"], check=False).returncode:
        pytest.skip("another view of files needs root, and a container that allows it")
    yield folder, within
    shutil.rmtree(folder)


def run_doctor(start, two: Nodes, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run ``raymaml doctor --json`` on the two nodes; nothing else is on stdout or stderr."""
    command = start(
        *("doctor", "--json", *arguments),
        cwd=ROOT,  # where the workers, too, find the code
        RAY_ADDRESS=two.address,
        RAY_AUTH_MODE="disabled",
    )
    code = command.finish()
    assert command.errors == ""
    found = json.loads("\n".join(command.lines))["findings"]
    return code, {finding["what"]: finding for finding in found}


@pytest.mark.ray
def test_two_nodes(two, start, tmp_path, make_config):
    two.join()
    config = make_config("run")
    path = str(tmp_path / "run" / "config.yaml")
    code, found = run_doctor(start, two, path, "cluster.num_workers=auto")
    assert code == 0, [each for each in found.values() if each["status"] == "fail"]
    assert {what[:7] for what in found if what.startswith("node ")} == {"node 1 ", "node 2 "}
    assert [(what, each["status"]) for what, each in found.items()][-5:] == [
        (f"rehearsal: {stage}", "ok")
        for stage in ("data", "train", "resume", "same result", "test")
    ]
    assert not config.run_dir.exists()


@pytest.mark.ray
def test_a_run_dir_that_is_not_the_same_folder_on_both(two, hidden, start, tmp_path, make_config):
    folder, within = hidden
    two.join(within=within)
    make_config("run")
    path = str(tmp_path / "run" / "config.yaml")
    code, found = run_doctor(start, two, path, f"run_dir={folder / 'runs'}")
    assert code == 1
    # the driver's own node sees its folder
    (finding,) = [each for each in found.values() if each["status"] == "fail"]
    assert re.fullmatch(r"node \d \([\d.]+\): run_dir", finding["what"])
    differ = r"nothing in (\S+), here \1 with content [0-9a-f]{8}"
    assert re.fullmatch(differ, finding["found"])
    assert finding["remedy"].startswith("set it to a disk that all nodes share")
    assert not any(what.startswith("rehearsal") for what in found)
    assert list(folder.iterdir()) == []
