"""What needs a CUDA GPU to be seen: ``pytest -m gpu``, on a machine that has one.

RAYMAML_TEST_DEVICE=cpu runs those that a CPU can: a check of the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_meta import METHODS, WAYS, build, episodes, flat, relative_error
from test_golden import CASES, gradient_error, load

from raymaml import MetaLearner, UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.training.checkpoint import WEIGHTS, checkpoint_path
from raymaml.training.graphs import Graphs, record_on_gpu
from raymaml.training.settings import set_determinism, set_precision
from raymaml.training.tensor_file import read_weights
from raymaml.training.worker import train_locally
from raymaml.types import EpisodeBatch

DEVICE = torch.device(os.environ.get("RAYMAML_TEST_DEVICE", "cuda"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU"
    ),
]
NORMS = ["transductive", "context", "episodic", "running", "tasknorm_i", "layer"]
MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def _float32() -> None:
    """PyTorch's convolutions multiply in TF32 by default."""
    set_precision(ClusterConfig())


def on_device(learner: MetaLearner, batch: EpisodeBatch) -> tuple[MetaLearner, EpisodeBatch]:
    learner.model.to(DEVICE, torch.float32)
    tensors = {name: value for name, value in vars(batch).items() if name.endswith("_x")}
    single = {name: value.float() for name, value in tensors.items()}
    return learner, EpisodeBatch(**{**vars(batch), **single, "num_ways": WAYS}).to(DEVICE)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gradient", METHODS)
def test_the_gradient_is_that_of_float64_on_a_cpu(norm: str, gradient: str) -> None:
    """Contract 1: one episode, and several at once. The largest error on an H200 was 2.4e-6."""
    exact, batch = build(norm=norm, gradient=gradient), episodes(3)
    wanted = [flat(exact.episode_gradient(each).grads) for each in batch]
    learner, batch = on_device(build(norm=norm, gradient=gradient), batch)
    together = learner.chunk_gradients(batch)
    for episode, found, value in zip(batch, together, wanted, strict=True):
        assert relative_error(flat(found.grads).cpu(), value) < 1e-4
        alone = flat(learner.episode_gradient(episode).grads)
        assert relative_error(alone.cpu(), value) < 1e-4


@pytest.mark.parametrize("name", [each for each in CASES if "firstorder" not in each])
@pytest.mark.parametrize("gradient", ["unrolled", "checkpointed", "mixed_mode"])
def test_golden_vectors(name: str, gradient: str) -> None:
    learner, batch, expected = load(name)
    learner.inner = learner.inner.model_copy(update={"gradient": gradient})
    learner.model.to(DEVICE)
    _, logits, grads = learner.meta_gradient(batch.to(DEVICE))
    found = {key: value.cpu() for key, value in grads.items()}
    in_short = name.startswith("resnet")
    # rounding decides the side of a kink: see test_golden
    assert gradient_error(learner, found, expected, in_short=in_short) < 1e-2
    assert logits.isfinite().all()


@needs_gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gradient", METHODS)
def test_a_graph_is_the_computation(norm: str, gradient: str) -> None:
    learner, batch = on_device(build(norm=norm, gradient=gradient), episodes(3))
    graphs: Graphs[Any] = Graphs(
        learner.chunk_gradients, lambda *others: others, record_on_gpu, name="training"
    )
    for seed in range(5):
        batch = on_device(learner, episodes(3, seed=seed))[1]
        wanted = learner.chunk_gradients(batch, 0)
        for found, each in zip(graphs(batch, 0), wanted, strict=True):
            assert relative_error(flat(found.grads), flat(each.grads).double()) < 1e-4
        with torch.no_grad():
            for value in learner.model.parameters():
                value.mul_(1.01)
    assert not graphs._refused


@needs_gpu
@pytest.mark.parametrize("gradient", METHODS)
def test_deterministic_kernels_give_the_same_bits_again(
    gradient: str, make_config: MakeConfig
) -> None:
    set_determinism(make_config("a", "cluster.deterministic=true").cluster)
    try:
        learner, batch = on_device(build(gradient=gradient), episodes(3))
        first, second = (learner.chunk_gradients(batch) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert torch.equal(flat(one.grads), flat(other.grads))
    finally:
        torch.use_deterministic_algorithms(False)


def trained(config: Config) -> dict[str, torch.Tensor]:
    assert train_locally(config, lambda _line: None)
    path = checkpoint_path(config.run_folder, config.outer.num_steps)
    return read_weights((path / WEIGHTS).read_bytes(), torch.device("cpu"))


def test_a_run_that_goes_on_is_the_whole_run_to_rounding(make_config: MakeConfig) -> None:
    device = f"cluster.device={DEVICE.type}"
    whole = trained(make_config("whole", device, "outer.num_steps=6"))
    half = make_config("half", device, "outer.num_steps=3")
    trained(half)
    found = trained(make_config("half", device, "outer.num_steps=6"))
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_that_has_no_memory_names_the_remedies(make_config: MakeConfig) -> None:
    config = make_config("a", f"cluster.device={DEVICE.type}", "cluster.episodes_per_chunk=2")
    if DEVICE.type == "cpu":
        pytest.skip("a CPU has no limit to set")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(UserError, match=r"out of memory .* cluster\.episodes_per_chunk"):
            train_locally(config, lambda _line: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
