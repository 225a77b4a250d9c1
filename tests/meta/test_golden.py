"""The vectors of a reference implementation, where they are at hand (float32, one thread).

They adapt everything but the norms' weights and biases, which do get a meta-gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raymaml.config.model import InnerConfig, ModelConfig
from raymaml.meta import rules
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.types import EpisodeBatch

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
FILES = ("checkpoint.pth", "episodes.npz", "expected.npz")
CASES = {"convnet4-transductive": "unrolled", "convnet4-firstorder": "first_order"}

Arrays = dict[str, NDArray[Any]]


def our_name(name: str) -> str:
    """Turn a parameter's name in the reference into ours."""
    name = name.replace("encoder.encoder.", "encoder.").replace("classifier.linear.", "head.")
    return name.replace("linear.", "head.").replace(".bn.", ".norm.")


def arrays(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[MetaLearner, EpisodeBatch, Arrays]:
    folder = GOLDEN / request.param
    missing = [folder / name for name in FILES if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{missing[0]} is not there")
    monkeypatch.setattr(rules, "learning_rate", lambda n, i: 0.0 if ".norm." in n else i.lr)
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    weights = saved["encoder_state_dict"] | saved["classifier_state_dict"]
    model = build_model(ModelConfig(width=32), image_shape=(3, 84, 84), num_ways=5, seed=0)
    model.load_state_dict({our_name(name): value for name, value in weights.items()})
    inner = InnerConfig(num_steps=5, lr=0.01, gradient=CASES[request.param])
    found = {name: torch.from_numpy(a) for name, a in arrays(folder / "episodes.npz").items()}
    batch = EpisodeBatch(
        support_x=found["support_images"].float() / 255,
        support_y=found["support_labels"],
        query_x=found["query_images"].float() / 255,
        query_y=found["query_labels"],
    )
    return MetaLearner(model, inner), batch, arrays(folder / "expected.npz")


def test_logits_loss_and_meta_gradient_are_the_references(
    case: tuple[MetaLearner, EpisodeBatch, Arrays],
) -> None:
    learner, batch, expected = case
    loss, logits, grads = learner.meta_gradient(batch)
    assert loss.item() == pytest.approx(float(expected["train_loss"]), rel=1e-5)
    assert np.abs(logits.numpy() - expected["train_logits"]).max() < 1e-4
    wanted = {our_name(k.removeprefix("grad/")): v for k, v in expected.items() if "grad/" in k}
    assert set(wanted) == set(grads)
    difference = sum(((grads[n].numpy() - v) ** 2).sum() for n, v in wanted.items())
    length = sum((v**2).sum() for v in wanted.values())
    assert (difference / length) ** 0.5 < 1e-4


def test_predictions_are_the_references(
    case: tuple[MetaLearner, EpisodeBatch, Arrays],
) -> None:
    learner, batch, expected = case
    assert np.abs(learner.predict(batch).numpy() - expected["eval_logits"]).max() < 1e-4
