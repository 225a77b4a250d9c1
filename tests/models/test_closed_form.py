"""ConvNet4's passes by the kernels: when they are taken, and that nothing else changes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymaml.config.inner import InnerConfig
from raymaml.config.model import ModelConfig
from raymaml.kernels.build import NoKernelsError
from raymaml.kernels.chain import Chain
from raymaml.kernels.library import MOST_THREADS, Kernels, usable
from raymaml.meta.learner import MetaLearner
from raymaml.models import build_model
from raymaml.models.closed_form import ConvNet4Pass
from raymaml.models.heads import Classifier
from raymaml.models.policies import POLICIES
from raymaml.types import Episode, tensors_of

STEPS = 3
QUERY_BY_KERNELS = {"transductive", "running", "episodic", "episodic_biased"}
SUPPORT_BY_KERNELS = QUERY_BY_KERNELS | {"context", "tasknorm_reference"}


@pytest.fixture(autouse=True)
def _kernels_are_there() -> None:
    if not isinstance(usable(torch.float64), Kernels):
        pytest.skip("no kernels here")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[ConvNet4Pass]:
    """Gains each pass in closed form."""
    seen: list[Any] = []
    begin = ConvNet4Pass.__init__

    def counted(self: ConvNet4Pass, *args: Any, **options: Any) -> None:
        seen.append(None)
        begin(self, *args, **options)

    monkeypatch.setattr(ConvNet4Pass, "__init__", counted)
    return seen


def episode(size: int = 21, channels: int = 3, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    support, query = (
        torch.randn(3 * count, channels, size, size, generator=generator).double()
        for count in (2, 4)
    )
    return Episode(
        support_x=support,
        support_y=torch.arange(3).repeat_interleave(2),
        query_x=query,
        query_y=torch.arange(3).repeat_interleave(4),
    )


def learner(norm: Any = "transductive", *, kernels: bool = True, **options: Any) -> MetaLearner:
    inner = {"num_steps": STEPS, "lr": 0.1, "gradient": "mixed_mode", **options.pop("inner", {})}
    config = ModelConfig(**{"width": 16, "norm": norm, "learn_temperature": True, **options})
    model = build_model(config, image_shape=(3, 21, 21), num_ways=3, seed=1, num_steps=STEPS)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("norm.weight", "norm.bias", "conv.bias", "temperature")):
                value.add_(torch.linspace(-1.5, 0.5, value.numel()).view_as(value))  # both signs
        for name, buffer in model.named_buffers():
            buffer.add_(0.3 if name.endswith((".mean", ".var")) else 0)
    return MetaLearner(model.double(), InnerConfig(**inner), kernels=kernels)


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [*POLICIES, "affine", "both", "no scale"])
def test_evaluation_is_the_same_by_kernels(norm: str, passes: list[ConvNet4Pass]) -> None:
    options: dict[str, Any] = {
        "affine": {"policy": "transductive", "per_step": "affine"},
        "both": {"policy": "running", "per_step": "both"},
        "no scale": {"policy": "episodic", "scale": False},
    }
    chosen, one = options.get(norm, norm), episode()
    policy = chosen if isinstance(chosen, str) else chosen["policy"]
    found = learner(chosen).logits_by_step(one)
    expected = STEPS * (policy in SUPPORT_BY_KERNELS)
    if policy in QUERY_BY_KERNELS:
        expected += STEPS + 1
    assert len(passes) == expected
    agree(found, learner(chosen, kernels=False).logits_by_step(one))


@pytest.mark.parametrize("norm", POLICIES)
def test_the_gradient_is_the_same_by_kernels(norm: str, passes: list[ConvNet4Pass]) -> None:
    """The moments of an episode, with the biases of the convolutions, go into its query pass."""
    one = learner(norm).episode_gradient(episode())
    expected = STEPS * (norm in SUPPORT_BY_KERNELS) + (norm in QUERY_BY_KERNELS)
    assert len(passes) == expected
    other = learner(norm, kernels=False).episode_gradient(episode())
    assert one.grads.keys() == other.grads.keys()
    for name, value in other.grads.items():
        agree(one.grads[name], value)
    for name, value in other.buffers.items():
        agree(one.buffers[name], value)


class Own(Classifier):
    """A user's own model."""

    def forward(self, x: Tensor) -> Tensor:
        """Add one to the first logit."""
        logits: Tensor = super().forward(x)
        return logits + F.one_hot(torch.tensor(0), logits.shape[1])


def hooked(model: Any) -> None:
    model.encoder.conv2.register_forward_hook(lambda _module, _inputs, out: out * 2)


def replaced_forward(model: Any) -> None:
    block = model.encoder.conv3
    before = block.forward
    block.forward = lambda x: before(x) + 1


def own_norm(model: Any) -> None:
    class Doubled(type(model.encoder.conv4.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor, window: int = 1) -> Tensor:
            out: Tensor = 2 * super().forward(x, window)
            return out

    model.encoder.conv4.norm.__class__ = Doubled


def tied(model: Any) -> None:
    model.encoder.conv3.conv.weight = model.encoder.conv2.conv.weight


class Halved(nn.Module):
    """Half of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        """Halve."""
        return weight / 2


def parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.encoder.conv2.conv, "weight", Halved())


def reflected(model: Any) -> None:
    model.encoder.conv2.conv.padding_mode = "reflect"
    model.encoder.conv2.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def dilated(model: Any) -> None:
    model.encoder.conv2.conv.dilation, model.encoder.conv2.conv.padding = (2, 2), (2, 2)


def subclass(model: Any) -> None:
    model.__class__ = Own


CHANGES = [hooked, replaced_forward, own_norm, tied, reflected, dilated, parametrized, subclass]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_does_more_takes_pytorchs_way(
    change: Callable[[Any], None], passes: list[ConvNet4Pass]
) -> None:
    """A derivative of the change is in the gradient: it is that of the plain graph."""
    one, plain = learner(), learner(inner={"gradient": "unrolled"})
    for each in (one, plain):
        change(each.model)
    one, plain = (
        MetaLearner(each.model, each.inner, kernels=True) for each in (one, plain)
    )  # with the parameters of now
    found, wanted = one.episode_gradient(episode()), plain.episode_gradient(episode())
    assert not passes
    for name, value in wanted.grads.items():
        torch.testing.assert_close(found.grads[name], value, rtol=1e-7, atol=1e-8)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_another_loss_type_width_or_number_of_threads_takes_pytorchs_way(
    passes: list[ConvNet4Pass],
) -> None:
    one = episode()
    wide = learner(width=24)
    own_loss = MetaLearner(learner().model, wide.inner, loss_fn=nn.CrossEntropyLoss())
    half = MetaLearner(learner().model.float(), wide.inner, half_precision=torch.bfloat16)
    single = Episode(**{n: v.float() if v.dim() > 1 else v for n, v in tensors_of(one).items()})
    wide.episode_gradient(one)
    own_loss.episode_gradient(one)
    half.episode_gradient(single)
    with threads(MOST_THREADS + 1):
        learner().episode_gradient(one)
    learner(kernels=False).episode_gradient(one)
    assert not passes
    with threads(MOST_THREADS):
        learner().episode_gradient(one)
    assert len(passes) == STEPS + 1


def test_without_kernels_pytorchs_way_is_taken(
    monkeypatch: pytest.MonkeyPatch, passes: list[ConvNet4Pass]
) -> None:
    none = NoKernelsError("no C++ compiler")
    monkeypatch.setattr("raymaml.kernels.library.usable", lambda _dtype: none)
    learner().episode_gradient(episode())
    assert not passes


@pytest.mark.parametrize("inner", [{}, {"frozen": ("encoder",)}, {"frozen": ("encoder.conv1",)}])
def test_activations_that_are_kept_change_no_bit(
    inner: dict[str, Any], passes: list[ConvNet4Pass]
) -> None:
    found = []
    for budget, again in ((0, STEPS), ("auto", 0)):
        passes.clear()
        one = learner(inner={**inner, "tape_memory": budget})
        found.append(one.episode_gradient(episode()).grads)
        assert len(passes) == STEPS + 1 + again
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


def test_the_memory_of_each_pass_is_added_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of all earlier ones with each: 5 in 5 steps, not 1 + 2 + 3 + 4 + 5."""
    asked: list[None] = []
    size = Chain.nbytes.fget
    assert size is not None

    def counted(self: Chain) -> int:
        asked.append(None)
        return size(self)

    monkeypatch.setattr(Chain, "nbytes", property(counted))
    learner(inner={"num_steps": 5, "tape_memory": "auto"}).episode_gradient(episode())
    assert len(asked) == 5


def test_no_more_activations_are_kept_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four inner steps of 84x84 images, at most as many as 1 MiB holds live at a time."""
    alive: list[int] = []
    product = ConvNet4Pass.product

    def counted(self: ConvNet4Pass, direction: Any) -> Any:
        gc.collect()
        tapes = [each for each in gc.get_objects() if type(each) is ConvNet4Pass]
        alive.append(sum(each.nbytes for each in tapes))
        return product(self, direction)

    monkeypatch.setattr(ConvNet4Pass, "product", counted)
    one = episode(84)
    most = []
    for budget in (0, 12, "auto"):
        alive.clear()
        inner = {"num_steps": 4, "tape_memory": budget}
        model = build_model(
            ModelConfig(width=16, learn_temperature=True),
            image_shape=(3, 84, 84),
            num_ways=3,
            seed=1,
        ).double()
        MetaLearner(model, InnerConfig(gradient="mixed_mode", lr=0.1, **inner)).episode_gradient(
            one
        )
        most.append(max(alive) / (1 << 20))
    single = most[0]
    assert 5 < single < 12  # MiB; one inner step
    assert single < most[1] <= 12 + single  # two, or the budget and the one at work
    assert most[2] == pytest.approx(4 * single, rel=0.01)
