"""Where deterministic algorithms are not needed, they are left out, and come back."""

from __future__ import annotations

import pytest
import torch

from raymaml.common.determinism import in_any_order


@pytest.mark.parametrize(("asked", "warns"), [(False, False), (True, False), (True, True)])
def test_deterministic_algorithms_come_back(asked: bool, warns: bool) -> None:
    torch.use_deterministic_algorithms(asked, warn_only=warns)
    try:
        with in_any_order():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(False)
