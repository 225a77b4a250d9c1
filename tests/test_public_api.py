"""The names that people build on, and how little ``import raymaml`` costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

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


def test_a_loop_of_ones_own() -> None:
    """As the README shows it: plain tensors, a model, and torch's optimizer."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 1, 16, 16, generator=generator)

    def images(per_class: int) -> torch.Tensor:
        clean = patterns.repeat_interleave(per_class, 0).expand(2, -1, -1, -1, -1)
        return clean + torch.randn(clean.shape, generator=generator)

    labels = torch.arange(3)
    batch = raymaml.EpisodeBatch(
        support_x=images(2),  # [E, N*K, C, H, W]
        support_y=labels.repeat_interleave(2).expand(2, -1),
        query_x=images(4),
        query_y=labels.repeat_interleave(4).expand(2, -1),
    )
    model = raymaml.build_model(
        raymaml.ModelConfig(width=8, norm="context"), image_shape=(1, 16, 16), num_ways=3, seed=0
    )
    learner = raymaml.MetaLearner(model, raymaml.InnerConfig(num_steps=2, lr=0.1))
    optimizer = torch.optim.Adam(learner.params.values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss, logits, grads = learner.meta_gradient(batch)
        for name, parameter in learner.params.items():
            parameter.grad = grads[name]
        optimizer.step()
        losses.append(loss.item())
    assert logits.shape == (2, 12, 3)
    assert losses[-1] < 0.5 * losses[0]
    assert learner.predict(batch).shape == (2, 12, 3)
