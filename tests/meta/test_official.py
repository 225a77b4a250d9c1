"""The shipped config of the official code of MAML, on the vectors of that code (float64)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SHARED
from helpers_meta import flat, relative_error
from torch.nn import functional as F

from raymaml.config.load import load_config
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.types import EpisodeBatch

CASE = SHARED / "family/official-miniimagenet"
CONFIG = Path(__file__).resolve().parents[2] / "configs/mini-imagenet/official-5way-1shot.yaml"
TIMES = 5 * 15 / 1
"""Factor of their query loss over our mean: N Q / K."""


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed", "mixed_mode"])
def test_losses_meta_gradient_and_clip_are_those_of_the_official_code(gradient: str) -> None:
    if not CASE.is_dir():
        pytest.skip(f"{CASE} is not there")
    initial, wanted, found = (
        {name: torch.from_numpy(value) for name, value in np.load(CASE / f"{file}.npz").items()}
        for file in ("initial", "expected", "episodes")
    )
    config = load_config(CONFIG, ["model.width=8", f"inner.gradient={gradient}"])
    model = build_model(config.model, image_shape=(3, 32, 32), num_ways=5, seed=0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    batch = EpisodeBatch(
        support_x=found["support_images"].double() / 255,
        support_y=found["support_labels"],
        query_x=found["query_images"].double() / 255,
        query_y=found["query_labels"],
    )
    learner = MetaLearner(model, config.inner, test_inner=config.test_inner)
    results = [learner.episode_gradient(episode) for episode in batch]
    loss = torch.stack([result.loss for result in results]).mean()
    torch.testing.assert_close(loss * TIMES, wanted["loss"], rtol=1e-8, atol=0)
    grads = {n: torch.stack([r.grads[n] for r in results]).mean(0) for n in learner.params}
    clip = config.outer.clip_value
    clipped = {name: value.clip(-clip, clip) for name, value in grads.items()}
    for kind, ours in (("grad", grads), ("clipped", clipped)):
        theirs = flat({name: wanted[f"{kind}/{name}"] for name in grads})
        assert relative_error(flat(ours) * TIMES, theirs) < 1e-8
    assert not torch.equal(flat(grads), flat(clipped))
    for number, episode in enumerate(batch):  # accuracy by step is judged on these logits
        logits = learner.logits_by_step(episode)[1:6]
        losses = torch.stack([F.cross_entropy(each, episode.query_y) for each in logits])
        torch.testing.assert_close(losses * TIMES, wanted["query_loss"][number], rtol=1e-8, atol=0)
