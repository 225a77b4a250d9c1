"""The names that people build on, and how little ``import raymaml`` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import raymaml
import raymaml.reports.write


def test_every_public_name_is_there() -> None:
    for name in raymaml.__all__:
        # a module of the same name would stand in its place once anything imports it
        assert isinstance(getattr(raymaml, name), ModuleType) == (name == "convert")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = raymaml.nothing


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(raymaml.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {f"{each.module}.{each.names[0].asname}" for each in block.body}  # type: ignore[attr-defined]
    names = [*filter("__version__".__ne__, raymaml.__all__)]
    assert {each.rpartition(".")[2] for each in found} == {*names}
    for name in {*names} - {"convert"}:
        assert f"{raymaml._HOME[name]}.{name}" in found


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("raymaml", {"torch", "ray", "pydantic"}),
        ("raymaml.cli", {"torch", "ray", "matplotlib"}),
        ("raymaml.data.importers", {"torch", "ray"}),  # an import's memory is its images'
    ],
)
def test_importing_imports_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
