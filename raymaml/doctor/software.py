"""Versions: Python, the packages that raymaml requires, and pairs that must match."""

from __future__ import annotations

import configparser
import importlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import raymaml
from raymaml.common.errors import UserError
from raymaml.doctor.finding import Finding, attempt, fail, ok, warn

SHOWN = ("torch", "torchvision", "ray", "numpy", "pyarrow")
"""Packages whose versions are told where all is well, and which all nodes must have alike."""
_SETUP = Path(raymaml.__file__).parents[1] / "setup.cfg"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What raymaml requires."""

    python: str
    """A range, such as ``>=3.10``."""
    packages: tuple[str, ...]
    """Requirements as pip takes them."""


def software_findings() -> Iterator[Finding]:
    """Check all versions on this machine."""
    try:
        needs = needs_of_raymaml()
    except UserError as error:
        yield warn("packages", str(error), "install it: pip install .")
    else:
        yield python_finding(platform.python_version(), needs.python)
        yield from package_findings(needs.packages)
    yield from pair_findings()


def needs_of_raymaml() -> Needs:
    """Return what the installed package says, or ``setup.cfg`` of the folder it is run from.

    Raises:
        UserError: there is neither.
    """
    try:
        about = metadata.metadata("raymaml")
        requires = metadata.requires("raymaml") or []
    except metadata.PackageNotFoundError:
        return needs_of_setup(_SETUP)
    return Needs(python=about["Requires-Python"], packages=tuple(_applying(requires, "")))


def needs_of_setup(path: Path) -> Needs:
    """Return what a ``setup.cfg`` says.

    Raises:
        UserError: there is none.
    """
    parser = configparser.ConfigParser()
    if not parser.read(path):
        raise UserError("raymaml is not installed, and no setup.cfg lies beside it")
    options = parser["options"]
    packages = options["install_requires"].splitlines()
    return Needs(
        python=options["python_requires"],
        packages=tuple(line.strip() for line in packages if line.strip()),
    )


def python_finding(version: str, allowed: str) -> Finding:
    """Check the version of Python."""
    if SpecifierSet(allowed).contains(version, prereleases=True):
        return ok("Python", version)
    return fail("Python", version, f"use a Python {allowed}, such as by PYTHON=... launch/test.sh")


def package_findings(requirements: Sequence[str]) -> Iterator[Finding]:
    """Check that every requirement is installed in a version that it allows, extras included."""
    problems = dict(problem for each in requirements for problem in _unmet(each))
    for package, (found, wanted) in problems.items():
        yield fail(f"package {package}", found, f"pip install '{wanted}'")
    if not problems:
        versions = ", ".join(f"{name} {version}" for name, version in shown_versions().items())
        yield ok("packages", f"{len(requirements)} as required: {versions}")


def pair_findings() -> Iterator[Finding]:
    """Check that torchvision was built for the torch that is here, and loads."""
    yield from attempt("torchvision loads", _load_torchvision)
    try:
        versions = metadata.version("torch"), metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return  # said above
    yield pair_finding(*versions)


def pair_finding(torch: str, torchvision: str) -> Finding:
    """Check two version numbers: torchvision 0.(N+15) belongs to torch 2.N."""
    found = f"{torch} and {torchvision}"
    one, other = Version(torch), Version(torchvision)
    if (one.major, other.major) == (2, 0) and other.minor != one.minor + 15:
        remedy = f"install torchvision 0.{one.minor + 15}, which was built for torch 2.{one.minor}"
        return fail("torch and torchvision", found, remedy)
    return ok("torch and torchvision", found)


def shown_versions() -> dict[str, str]:
    """Return the installed versions of what matters most."""
    return {name: metadata.version(name) for name in SHOWN if _is_installed(name)}


def _load_torchvision() -> str:
    try:
        extension = importlib.import_module("torchvision.extension")
        extension._assert_has_ops()
    except Exception as error:
        raise UserError(
            f"it does not ({error}); install torch and torchvision together, as a matching pair"
        ) from None
    return "with its compiled part"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _unmet(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each package that does not meet a requirement: what is found, and what is wanted."""
    requirement = Requirement(text)
    name = requirement.name
    if not _is_installed(name):
        yield name, ("is not installed", text)
        return
    version = metadata.version(name)
    if not requirement.specifier.contains(version, prereleases=True):
        yield name, (f"{version}, but {requirement.specifier} is required", text)
    for extra in sorted(requirement.extras):
        for each in _applying(metadata.requires(name) or [], extra):
            needed = Requirement(each).name
            if not _is_installed(needed):
                yield needed, (f"is not installed, and {name}[{extra}] needs it", text)


def _applying(requires: Iterable[str], extra: str) -> Iterator[str]:
    """Yield the requirements that apply to this machine with one extra, without their markers."""
    for text in requires:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": extra}):
            requirement.marker = None
            yield str(requirement)
