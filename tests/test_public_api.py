"""The names that people build on, and how little ``import raymaml`` costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import raymaml


def test_every_public_name_is_there() -> None:
    for name in raymaml.__all__:
        assert getattr(raymaml, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = raymaml.nothing


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
