"""Several episodes at once, and what a GPU asks of the algorithm: tested without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_meta import METHODS, WAYS, build, episodes, flat, relative_error
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raymaml.common.errors import UserError
from raymaml.models import closed_form
from raymaml.models.norm import RunningNorm2d
from raymaml.models.policies import POLICIES
from raymaml.passes.calls import alone
from raymaml.types import EpisodeBatch

ALL = [*METHODS, "reptile", "implicit"]
HEADS = ["learned", "zero", "shared", "prototypes"]
COUNT = 7


def settings() -> list[tuple[str, str, str, str]]:
    """Each method with each norm, each with each head, and a resnet."""
    with_norms = [("convnet4", norm, "learned", method) for norm in POLICIES for method in ALL]
    with_heads = [
        ("convnet4", "transductive", head, method) for head in HEADS[1:] for method in ALL
    ]
    resnets = [
        ("resnet10", "transductive", "learned", method) for method in ("mixed_mode", "unrolled")
    ]
    # Reptile learns parameters that adapt alone
    return [
        (encoder, norm, head, method)
        for encoder, norm, head, method in [*with_norms, *with_heads, *resnets]
        if method != "reptile" or (head == "learned" and not norm.startswith("tasknorm"))
    ]


def options(method: str) -> dict[str, Any]:
    pulled = {"proximal": 10.0} if method == "implicit" else {}
    return {"gradient": method, "learn_temperature": method != "reptile", **pulled}


@pytest.mark.parametrize(("encoder", "norm", "head", "method"), settings())
def test_no_value_is_read_from_the_device(encoder: str, norm: str, head: str, method: str) -> None:
    """The meta device has no values: each look at one is an error, as in a CUDA graph."""
    learner = build(encoder, norm, head, **options(method))
    learner.to("meta")
    batch = episodes(2).to(torch.device("meta"))
    vars(batch)["num_ways"] = WAYS  # as the loader knows
    found = [learner.chunk_gradients(batch)[1], learner.episode_gradient(batch[0])]
    learner.channels_last = True
    found.append(learner.episode_gradient(batch[0]))
    for each in found:
        assert {value.device.type for value in each.grads.values()} == {"meta"}
    assert learner.logits_by_step(batch).shape == (2, 3, 9, WAYS)
    assert learner.logits_by_step(batch[0]).shape == (3, 9, WAYS)
    with pytest.raises(RuntimeError, match="meta tensors"):  # it would be noticed
        float(batch.query_x.sum())


@pytest.mark.filterwarnings("ignore:inner.proximal is too small")
@pytest.mark.parametrize(("encoder", "norm", "head", "method"), settings())
def test_each_tensor_is_made_where_the_episode_is(
    encoder: str, norm: str, head: str, method: str
) -> None:
    """A tensor that does not name its device would lie on another one, and raise an error."""
    learner, batch = build(encoder, norm, head, **options(method)), episodes(2)
    with torch.device("meta"):
        found = [*learner.chunk_gradients(batch), learner.episode_gradient(batch[0])]
        logits = learner.logits_by_step(batch)
    assert all(flat(each.grads).isfinite().all() for each in found)
    assert logits.isfinite().all()


@pytest.mark.parametrize("norm", ["transductive", "episodic", "context", "layer"])
@pytest.mark.parametrize("gradient", METHODS)
def test_any_number_at_once_is_the_loop(norm: str, gradient: str) -> None:
    batch, learner = episodes(COUNT), build(norm=norm, gradient=gradient)
    loss, logits, grads = learner.meta_gradient(batch)
    steps = torch.stack([learner.logits_by_step(each) for each in batch])
    for at_once in range(2, COUNT + 2):
        found = learner.meta_gradient(batch, at_once=at_once)
        torch.testing.assert_close(found[0], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], logits, rtol=1e-10, atol=1e-10)
        assert relative_error(flat(found[2]), flat(grads)) < 1e-10
        several = [learner.logits_by_step(chunk) for chunk in batch.chunks(at_once)]
        torch.testing.assert_close(torch.cat(several), steps, rtol=1e-10, atol=1e-10)
        last = learner.predict(batch, at_once=at_once)
        torch.testing.assert_close(last, steps[:, -1], rtol=1e-10, atol=1e-10)


WITH_MOMENTS: list[str | dict[str, Any]] = [
    *("running", "episodic", "episodic_biased", "context", "tasknorm_reference"),
    {"policy": "running", "per_step": "both"},
    {"policy": "transductive", "per_step": "affine", "scale": False},
]


@pytest.mark.parametrize("gradient", ["mixed_mode", "first_order", "implicit"])
@pytest.mark.parametrize("norm", WITH_MOMENTS, ids=str)
def test_each_of_several_episodes_keeps_its_own_moments(
    norm: str | dict[str, Any], gradient: str
) -> None:
    batch, learner = episodes(3), build(norm=norm, **options(gradient))
    for each in learner.model.modules():
        if isinstance(each, RunningNorm2d):
            each.mean.copy_(torch.linspace(-0.2, 0.3, each.mean.numel()).view_as(each.mean))
            each.var.copy_(torch.linspace(0.4, 1.2, each.var.numel()).view_as(each.var))
    for found, episode in zip(learner.chunk_gradients(batch), batch, strict=True):
        wanted = learner.episode_gradient(episode)
        assert relative_error(flat(found.grads), flat(wanted.grads)) < 1e-10
        assert found.buffers.keys() == wanted.buffers.keys()
        assert ("running" in str(norm)) == bool(found.buffers)
        for name, value in wanted.buffers.items():
            torch.testing.assert_close(found.buffers[name], value, rtol=1e-12, atol=1e-12)
    several = learner.logits_by_step(batch)
    one_by_one = torch.stack([learner.logits_by_step(each) for each in batch])
    torch.testing.assert_close(several, one_by_one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("norm", "gradient", "in_training", "in_evaluation"),
    [  # a support and a query set; that of queries by `context` is differentiated through moments
        ("transductive", "mixed_mode", 2, 2),
        ("transductive", "first_order", 2, 2),
        ("transductive", "unrolled", 0, 2),
        ("episodic", "mixed_mode", 2, 2),
        ("running", "mixed_mode", 2, 2),
        ("context", "mixed_mode", 1, 1),
        ("tasknorm_i", "mixed_mode", 0, 0),
    ],
)
def test_norms_by_the_batch_or_by_constants_take_batched_products(
    norm: str,
    gradient: str,
    in_training: int,
    in_evaluation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And methods without a graph; ``unrolled`` takes PyTorch's way."""
    made: list[object] = []

    class Spy(closed_form.BatchedImages):
        def __init__(self, *arguments: Any) -> None:
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(closed_form, "BatchedImages", Spy)
    learner = build(norm=norm, gradient=gradient)
    learner.chunk_gradients(episodes(2))
    assert len(made) == in_training
    learner.predict(episodes(2), at_once=2)
    assert len(made) - in_training == in_evaluation


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, result)) if is_tensor(each)]
            self.nbytes += sum(each.nbytes for each in tensors)
        return result


@pytest.mark.parametrize("norm", ["transductive", "episodic"])
def test_the_closed_form_moves_half_the_bytes_of_the_graph(norm: str) -> None:
    """Memory is the limit on a GPU: so ``auto`` takes it there."""
    batch, moved = episodes(4, dtype=torch.float32).to(torch.device("meta")), {}
    vars(batch)["num_ways"] = WAYS
    for gradient in ("mixed_mode", "unrolled"):
        learner = build("kernels", norm, gradient=gradient, num_steps=5, tape_memory=1000)
        learner.float().to("meta")
        with Traffic() as traffic:
            learner.chunk_gradients(batch)
        moved[gradient] = traffic.nbytes
    assert moved["mixed_mode"] < 0.6 * moved["unrolled"], moved


def test_rows_of_each_step_and_a_budget_of_nothing() -> None:
    """Each step its own support images; no activations are kept."""
    batch = episodes(3)
    rows = torch.tensor([[0, 2, 4], [1, 3, 5]]).expand(3, 2, 3)
    vars(batch)["support_batches"] = rows
    for memory in (0, "auto"):
        learner = build(gradient="mixed_mode", tape_memory=memory)
        exact = build(gradient="unrolled")
        for found, episode in zip(learner.chunk_gradients(batch), batch, strict=True):
            wanted = flat(exact.episode_gradient(episode).grads)
            assert relative_error(flat(found.grads), wanted) < 1e-10


def test_the_number_of_ways_is_that_of_the_labels() -> None:
    batch = episodes(2)
    known = EpisodeBatch(**{**vars(batch), "num_ways": WAYS})
    for head in HEADS:
        learner = build(head=head)
        assert torch.equal(learner.predict(known), learner.predict(batch))
    assert known[0].num_ways == known.among(range(1)).num_ways == WAYS
    assert known.to(torch.device("cpu")).num_ways == known.shuffled().num_ways == WAYS


def test_deterministic_kernels_pool_by_two_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; the meta device stands for one."""
    learner = build(norm="layer", gradient="checkpointed")
    monkeypatch.setattr("torch.nn.functional.max_pool2d", None)
    learner.to("meta")
    batch = episodes(2).to(torch.device("meta"))
    torch.use_deterministic_algorithms(True)
    try:
        assert len(learner.chunk_gradients(batch)) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(TypeError):  # it would have been called
        learner.chunk_gradients(batch)


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    words = "roll_cuda does not have a deterministic implementation, but you set 'torch.use"
    with (
        pytest.raises(UserError, match=r"cluster\.deterministic: .* \(roll_cuda does not"),
        alone(),
    ):
        raise RuntimeError(words)
