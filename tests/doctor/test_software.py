"""Versions, against requirements that are met and that are not."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.doctor.software import (
    needs_of_raymaml,
    needs_of_setup,
    package_findings,
    pair_finding,
    python_finding,
    software_findings,
)

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def install(folder: Path, name: str, version: str, *lines: str) -> None:
    """Make a package's metadata, as pip leaves it."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
    (place / "METADATA").write_text("\n".join(header) + "\n", encoding="utf-8")


def test_here_all_is_well() -> None:
    findings = list(software_findings())
    assert [finding.what for finding in findings] == [
        *("Python", "packages", "torchvision loads", "torch and torchvision")
    ]
    assert {finding.status for finding in findings} == {"ok"}
    assert findings[0].found == platform.python_version()
    assert "torch 2." in findings[1].found
    assert "ray 2." in findings[1].found


def test_the_requirements_are_those_of_setup_cfg(tmp_path: Path) -> None:
    needs = needs_of_setup(SETUP)
    assert needs.python == ">=3.10"
    assert any(each.startswith("ray[") for each in needs.packages)
    assert len(needs.packages) >= 15
    with pytest.raises(UserError, match="raymaml is not installed"):
        needs_of_setup(tmp_path / "setup.cfg")


def test_those_of_an_installed_raymaml_leave_out_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants = ('Requires-Dist: b>=2; extra == "test"', "Requires-Dist: a[x]>=1")
    wants += ('Requires-Dist: c; sys_platform == "none"', "Requires-Python: >=3.11")
    install(tmp_path, "raymaml", "0.1.0", *wants)
    monkeypatch.syspath_prepend(tmp_path)
    needs = needs_of_raymaml()
    assert (needs.packages, needs.python) == (("a[x]>=1",), ">=3.11")


def test_python() -> None:
    assert python_finding("3.11.7", ">=3.10").status == "ok"
    assert python_finding("3.14.0rc1", ">=3.10").status == "ok"
    old = python_finding("3.9.1", ">=3.10")
    assert (old.status, old.found) == ("fail", "3.9.1")
    assert ">=3.10" in old.remedy


def test_packages_that_are_absent_or_of_another_version() -> None:
    findings = list(package_findings(["numpy>=1", "torch>=99", "no-such-package-of-anyone>=2"]))
    assert [(each.status, each.what, each.remedy) for each in findings] == [
        ("fail", "package torch", "pip install 'torch>=99'"),
        (
            "fail",
            "package no-such-package-of-anyone",
            "pip install 'no-such-package-of-anyone>=2'",
        ),
    ]
    assert findings[0].found.endswith("but >=99 is required")
    (well,) = package_findings(["numpy>=1", "ray[data,train]>=2"])
    assert (well.status, well.what) == ("ok", "packages")


def test_what_an_extra_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wants = ('Requires-Dist: no-such-thing>=1; extra == "x"', "Provides-Extra: x")
    install(tmp_path, "made-up-package", "1.0", *wants)
    monkeypatch.syspath_prepend(tmp_path)
    assert [each.status for each in package_findings(["made-up-package"])] == ["ok"]
    (finding,) = package_findings(["made-up-package[x]>=1"])
    assert (finding.status, finding.what) == ("fail", "package no-such-thing")
    assert finding.found == "is not installed, and made-up-package[x] needs it"
    assert finding.remedy == "pip install 'made-up-package[x]>=1'"


def test_torch_and_torchvision_go_in_pairs() -> None:
    assert pair_finding("2.9.1", "0.24.1").status == "ok"
    assert pair_finding("2.14.1+cpu", "0.29.1").status == "ok"
    other = pair_finding("2.14.1", "0.24.1")
    assert other.status == "fail"
    assert other.remedy == "install torchvision 0.29, which was built for torch 2.14"
