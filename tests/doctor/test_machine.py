"""One machine: its own values, and numbers that it does not have."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import psutil
import pytest
import torch

from raymaml.common.memory import memory_limit, tape_budget
from raymaml.doctor.machine import (
    ENOUGH_MEMORY,
    GIB,
    amount_finding,
    disk_finding,
    machine_findings,
    shared_memory_finding,
    unmet_requirements,
)


def test_this_machine_is_checked() -> None:
    found = {finding.what: finding for finding in machine_findings()}
    assert list(found) == ["versions", "devices", "kernels", "memory", "disk for Ray"]
    assert found["versions"].status == "ok"
    assert f"python {platform.python_version()}, raymaml " in found["versions"].found
    assert "torch 2." in found["versions"].found
    assert "ray 2." in found["versions"].found


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    """Make a package's metadata, as pip leaves it."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (place / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_versions_that_a_package_does_not_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants = ("numpy>=1", "torch==2.1", "none-such; extra == 'x'", "none; sys_platform == 'none'")
    install(tmp_path, "made-up", "1.0", *wants)
    install(tmp_path, "needs-a-build", "1.0", "made-up==1.0")
    monkeypatch.syspath_prepend(tmp_path)
    (mistake,) = unmet_requirements("made-up")
    assert mistake.problem.startswith("torch is 2.")
    assert mistake.problem.endswith(", but made-up requires ==2.1")
    assert mistake.remedy == "pip install 'torch==2.1'"
    assert list(unmet_requirements("needs-a-build")) == []


def test_the_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's device file stands in for a driver; that torch sees no GPU is made so."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in {"/dev/nvidiactl", "/"})
    for hidden, status in ((None, "fail"), ("", "ok")):
        if hidden is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        (finding,) = [each for each in machine_findings() if each.what == "devices"]
        assert finding.status == status
    assert finding.found.startswith("no GPU; CPU of ")


def test_amounts() -> None:
    for free, status in ((3.0, "ok"), (2.9, "warn"), (1.0, "warn"), (0.9, "fail")):
        finding = amount_finding("memory", free * GIB, 16 * GIB, ENOUGH_MEMORY, "end others")
        assert (finding.status, finding.found) == (status, f"{free} of 16.0 GiB free")
        assert finding.remedy == ("" if status == "ok" else "end others")


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    finding = disk_finding("disk", tmp_path / "a" / "b")
    total = psutil.disk_usage(str(tmp_path)).total / GIB
    assert finding.found.endswith(f" of {total:.1f} GiB free")
    assert not (tmp_path / "a").exists()


def test_shared_memory(tmp_path: Path) -> None:
    total = psutil.disk_usage(str(tmp_path)).total
    assert shared_memory_finding(tmp_path, total).status == "ok"
    finding = shared_memory_finding(tmp_path, total + GIB)
    assert (finding.status, "--shm-size" in finding.remedy) == ("warn", True)
    assert shared_memory_finding(tmp_path / "none", GIB).status == "ok"


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_limit_of_a_container(name: str, tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == math.inf
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for text, limit in (("max\n", math.inf), ("1073741824\n", GIB)):
        (tmp_path / name).write_text(text, encoding="ascii")
        assert memory_limit(tmp_path) == limit


def test_activations_may_take_a_share_of_the_free_memory_of_their_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raymaml.common.memory.memory", lambda: (800.0, 1000.0))
    monkeypatch.setattr("raymaml.common.memory.psutil.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (4000, 9000))
    budget = tape_budget.__wrapped__
    assert budget(torch.device("cpu")) == 50  # a quarter of 800, of each of 4 processes
    assert budget(torch.device("cuda", 0)) == 2000
