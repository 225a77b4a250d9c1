"""raymaml and other libraries compute one and the same meta-gradient, and the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_bench import tiny

from raymaml.bench.contenders import EXACT_METHODS, PHASES, Contender, why_not


@pytest.mark.parametrize(
    ("library", "inner"),
    [
        ("plain", {"lr": 0.1, "head_lr": 0.3}),
        ("higher", {"lr": 0.1}),
        ("higher", {"lr": 0.1, "head_lr": 0.3, "momentum": 0.5, "weight_decay": 0.1}),
        ("torchopt", {"lr": 0.1}),
        ("torchopt", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
    ],
)
def test_all_contenders_compute_one_gradient(library: str, inner: dict[str, Any]) -> None:
    """In float64; twice each, since an episode must leave nothing behind."""
    if library != "plain":
        pytest.importorskip(library)
    config = tiny(inner={"num_steps": 3, **inner})

    def build(library: str, method: str) -> Contender:
        cpu = torch.device("cpu")
        return Contender(library, method, config=config, device=cpu, dtype=torch.float64)

    theirs = build(library, "unrolled")
    assert why_not(library, config, theirs.model) is None
    before = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    for phase in PHASES:
        wanted = theirs.compute(phase)
        torch.testing.assert_close(theirs.compute(phase), wanted, rtol=0, atol=0)
        assert wanted.abs().max() > 0
        for method in EXACT_METHODS:
            found = build("raymaml", method).compute(phase)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    after = theirs.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
