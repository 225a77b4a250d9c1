"""Calls from several threads give the bits of calls one after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_meta import WAYS, build, episodes, flat
from torch import Tensor

from raymaml.config.inner import InnerConfig
from raymaml.config.model import ModelConfig
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.models.heads import Classifier
from raymaml.training.features import features

THREADS, ROUNDS = 4, 2


def learners(gradient: str) -> list[MetaLearner]:
    """Two over one model, one over another model with the same encoder, one apart."""
    first = build(norm="context", gradient=gradient)
    torch.manual_seed(3)
    other = Classifier(first.model.encoder, 2, WAYS).double()
    more = [MetaLearner(model, InnerConfig(num_steps=1, lr=0.2)) for model in (first.model, other)]
    return [first, *more, build(norm="running", head="zero", gradient=gradient)]


def results(job: tuple[MetaLearner, int]) -> Tensor:
    """The tensors that every kind of call returns, in one."""
    maml, seed = job
    batch = episodes(2, seed=seed)
    loss, logits, grads = maml.meta_gradient(batch)
    *_, fast = maml.adapt(batch[0])
    first = batch[0]
    embedded = features(maml)(first.support_x, first.support_y, first.query_x)
    found = [loss, logits, flat(grads), flat(fast.params), *embedded]
    found += [maml.predict(batch), maml.logits_by_step(first), flat(maml.params)]
    found += [flat(result.grads) for result in maml.chunk_gradients(batch)]
    return torch.cat([value.detach().flatten() for value in found])


@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed", "mixed_mode"])
def test_threads_get_what_serial_calls_get_and_the_model_stays(gradient: str) -> None:
    every = learners(gradient)
    before = [flat(maml.model.state_dict()).clone() for maml in every]
    jobs = [(maml, seed) for seed in range(ROUNDS) for maml in every]
    wanted = [results(job) for job in jobs]
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(map(torch.equal, pool.map(results, jobs), wanted))
    assert all(
        torch.equal(flat(m.model.state_dict()), b) for m, b in zip(every, before, strict=True)
    )


def test_a_step_that_waits_for_its_caller_keeps_no_other_thread_waiting() -> None:
    maml, batch = build(norm="context"), episodes()
    wanted = maml.predict(batch)
    steps = maml.adapt(batch[0])
    next(steps)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(maml.predict, batch).result(), wanted)
    *_, fast = steps
    assert torch.equal(maml.query_logits(fast, batch[0]), wanted[0])


def test_models_that_threads_build_have_the_weights_of_their_seed() -> None:
    """An own encoder draws its weights from PyTorch's random numbers, which all threads share."""
    own = ModelConfig(encoder="helpers_encoders:Plain", norm="none")

    def weights(seed: int) -> Tensor:
        return flat(build_model(own, image_shape=(1, 16, 16), num_ways=3, seed=seed).state_dict())

    wanted = [weights(seed) for seed in range(50)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(map(torch.equal, pool.map(weights, range(50)), wanted))
