"""PyTorch's forward mode, loaded once."""

from __future__ import annotations

import pytest

from raymaml.passes.derivatives import make_forward_mode_ready


@pytest.fixture(autouse=True, scope="session")
def _forward_mode() -> None:
    make_forward_mode_ready()
