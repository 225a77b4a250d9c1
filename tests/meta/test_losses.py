"""Any loss, any targets, any name of the head; a learner as an ``nn.Module`` (float64)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import SHARED
from helpers_meta import METHODS, WAYS, Graph, build, episodes, flat, learner, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import raymaml
from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.layers import LOCK
from raymaml.meta.learner import MetaLearner
from raymaml.types import EpisodeBatch, tensors_of

EXACT = METHODS[:3]
SINUSOIDS = SHARED / "family"


class Sinusoid(nn.Module):
    """1-40-40-1, as in Finn et al. 2017, section 5.1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(1, 40), nn.Linear(40, 40)
        self.layer3 = nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Any:
        return self.layer3(torch.relu(self.layer2(torch.relu(self.layer1(x)))))


def sinusoids(gradient: str = "checkpointed", **inner: Any) -> MetaLearner:
    torch.manual_seed(0)
    return MetaLearner(
        Sinusoid().double(),
        InnerConfig(**{"num_steps": 1, "lr": 0.01, "gradient": gradient, **inner}),
        head="layer3",
        loss_fn=F.mse_loss,
    )


def waves(count: int = 2) -> EpisodeBatch:
    """Five support and seven query points of sinusoids."""
    phase = torch.arange(count, dtype=torch.float64)[:, None, None]
    support, query = (
        torch.linspace(-5, 5, n).double().expand(count, -1)[..., None] for n in (5, 7)
    )
    return EpisodeBatch(
        support_x=support,
        support_y=2 * torch.sin(support + phase),
        query_x=query,
        query_y=2 * torch.sin(query + phase),
    )


@pytest.mark.parametrize("case", ["sinusoid-5shot", "sinusoid-10shot"])
@pytest.mark.parametrize("gradient", EXACT)
def test_sinusoid_regression_is_that_of_cbfinn_maml(case: str, gradient: str) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("initial", "episodes", "expected"):
        path = SINUSOIDS / case / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        with np.load(path) as file:
            found[name] = {key: torch.from_numpy(value) for key, value in file.items()}
    maml, wanted = sinusoids(gradient), found["expected"]
    weights = {n: v for n, v in found["initial"].items() if not n.startswith("hyper/")}
    maml.model.load_state_dict(weights)
    names = ("support_x", "support_y", "query_x", "query_y")
    batch = EpisodeBatch(**{name: found["episodes"][name] for name in names})
    assert maml.backward(batch).item() == pytest.approx(wanted["loss"].item(), rel=1e-12)
    grads = {name: value.grad for name, value in maml.model.named_parameters()}
    expected = {name: wanted[f"grad/{name}"] for name in grads}
    assert relative_error(flat(grads), flat(expected)) < 1e-12
    maml.test_inner = maml.inner.model_copy(update={"num_steps": 5})
    outputs = torch.stack([maml.logits_by_step(one)[1:] for one in batch])  # [E, T, Q, 1]
    torch.testing.assert_close(outputs, wanted["query_outputs"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(maml.predict(batch), outputs[:, -1], rtol=0, atol=0)


def linear(outputs: Tensor, targets: Tensor) -> Tensor:
    """Its gradient in the outputs is a constant, so that no tangent reaches the model from it."""
    return (outputs * targets).mean()


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Neither a mean over images nor a function of one output at a time."""
    return (outputs - targets).square().sum() / (1 + outputs.square().sum())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "sum": partial(F.mse_loss, reduction="sum"),
    "binary": F.binary_cross_entropy_with_logits,
    "probabilities": nn.CrossEntropyLoss(),
    "linear": linear,
    "weighted": weighted,
}


def with_targets(batch: EpisodeBatch) -> EpisodeBatch:
    """The same images with a probability of each class."""
    soft = {
        name: torch.softmax(getattr(batch, name[:-1] + "x").flatten(2)[..., :WAYS], -1)
        for name in ("support_y", "query_y")
    }
    return replace(batch, **soft)


@pytest.mark.parametrize(("norm", "frozen"), [("transductive", ("head",)), ("context", ())])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_methods_are_one_number_for_any_loss(
    loss: str, norm: str, frozen: tuple[str, ...]
) -> None:
    """With raymaml's closed rules, and with a head whose gradient has no tangent."""
    batch, found = with_targets(episodes(2)), {}
    for method in EXACT:
        maml = build(norm=norm, gradient=method, frozen=frozen)
        maml.loss_fn = LOSSES[loss]
        single = [maml.episode_gradient(episode) for episode in batch]
        mean, _, grads = maml.meta_gradient(batch)
        torch.testing.assert_close(mean, sum(each.loss for each in single) / 2)
        found[method] = flat(grads)
        if norm == "context":
            chunk = maml.chunk_gradients(batch)
            for one, other in zip(single, chunk, strict=True):
                assert relative_error(flat(other.grads), flat(one.grads)) < 1e-9
                torch.testing.assert_close(one.loss, other.loss)
    assert found["unrolled"].norm() > 0
    for method in EXACT[1:]:
        assert relative_error(found[method], found["unrolled"]) < 1e-10


class LogGraph(Graph):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).log_softmax(1)


def test_a_loss_of_labels_is_that_of_the_inner_and_the_outer_loop() -> None:
    """Cross-entropy is ``nll_loss`` of log-probabilities; a smoothed one is another loss."""
    batch, (plain, logs) = (
        episodes(2, size=4),
        (learner(kind().double()) for kind in (Graph, LogGraph)),
    )
    logs.model.load_state_dict(plain.model.state_dict())
    logs.loss_fn = F.nll_loss
    wanted = plain.meta_gradient(batch)[2]
    assert relative_error(flat(logs.meta_gradient(batch)[2]), flat(wanted)) < 1e-12
    plain.loss_fn = partial(F.cross_entropy, label_smoothing=0.3)
    assert relative_error(flat(plain.meta_gradient(batch)[2]), flat(wanted)) > 1e-2


class Grid(nn.Module):
    """Inputs [B, 2, 3] -> outputs [B, 2, 3]: a head that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.tanh(self.body(x)))


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("head_start", ["learned", "zero"])
def test_outputs_and_targets_are_of_any_shape(gradient: str, head_start: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 11, 2, 3).double()
    batch = EpisodeBatch(
        support_x=x[:, :5], support_y=x[:, :5].sin(), query_x=x[:, 5:], query_y=x[:, 5:].sin()
    )
    inner = InnerConfig(num_steps=2, lr=0.1, gradient=gradient)
    maml = MetaLearner(
        Grid().double(),
        inner,
        head="last",
        head_start=head_start,
        loss_fn=F.mse_loss,
        channels_last=True,
    )
    assert maml.predict(batch).shape == (3, 6, 2, 3)
    assert maml.logits_by_step(batch[0]).shape == (3, 6, 2, 3)
    if head_start == "zero":
        assert not maml.logits_by_step(batch[0])[0].any()
    loss, outputs, grads = maml.meta_gradient(batch)
    torch.testing.assert_close(loss, F.mse_loss(outputs, batch.query_y))
    torch.testing.assert_close(outputs, maml.predict(batch))
    chunk = maml.chunk_gradients(batch)
    means = {n: torch.stack([each.grads[n] for each in chunk]).mean(0) for n in grads}
    assert relative_error(flat(means), flat(grads)) < 1e-10
    raymaml.check_gradient(maml, batch[0])


class _Once(torch.autograd.Function):
    """The square, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def test_the_loss_is_checked_with_the_model() -> None:
    episode, maml = waves()[0], sinusoids("checkpointed", num_steps=2)
    single = replace(episode, **{n: v.float() for n, v in tensors_of(episode).items()})
    raymaml.check_gradient(maml, single)  # float32 targets, compared in float64
    maml.loss_fn = lambda outputs, targets: _Once.apply(outputs - targets).mean()
    with pytest.raises(UserError, match=r"model or of the loss is once_differentiable"):
        raymaml.check_gradient(maml, episode)
    maml.inner = maml.inner.model_copy(update={"gradient": "mixed_mode"})
    with pytest.raises(
        UserError, match=r"loss_fn: an operation of the loss is once_differentiable"
    ):
        maml.episode_gradient(episode)


class Sideways(Sinusoid):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).T


@pytest.mark.parametrize("call", ["meta_gradient", "chunk_gradients", "predict"])
@pytest.mark.parametrize(
    ("model", "loss_fn", "says"),
    [
        (Sinusoid, F.cross_entropy, r"hold torch\.float64, .* loss is cross-entropy .* loss_fn=F"),
        (Sinusoid, partial(F.mse_loss, reduction="none"), r"loss_fn: returns .*\[5, 1\].*mean"),
        (Sinusoid, lambda *_: 0.5, r"loss_fn: returns <class 'float'>"),
        (Sideways, F.mse_loss, r"turns 5 inputs into .*\[1, 5\].* outputs, .*\[5, \.\.\.\]"),
    ],
)
def test_what_is_no_loss_and_no_output_is_refused(
    model: type[nn.Module], loss_fn: Any, says: str, call: str
) -> None:
    inner = InnerConfig(num_steps=1)
    maml = MetaLearner(model().double(), inner, head="layer3", loss_fn=loss_fn)
    with pytest.raises(UserError, match=says):
        getattr(maml, call)(waves())


class Renamed(nn.Module):
    """A ``Graph`` whose head is ``classifier.1``, as torchvision names its own."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.a, self.b = graph.a, graph.b
        self.classifier = nn.Sequential(nn.Identity(), graph.head)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(Graph.encode(self, x.flatten(1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("head_start", ["learned", "zero", "shared"])
@pytest.mark.parametrize("gradient", METHODS)
def test_a_head_by_another_name_gives_the_bits_of_one_named_head(
    head_start: Any, gradient: str
) -> None:
    batch, graph = episodes(2, size=4), Graph().double()
    if head_start == "shared":
        graph.head = nn.Linear(3, 1).double()
    found = {}
    for head, model in (("head", graph), ("classifier.1", Renamed(graph))):
        inner = InnerConfig(num_steps=2, lr=0.3, head_lr=0.1, gradient=gradient, frozen=("a",))
        maml = MetaLearner(model, inner, head=head, head_start=head_start)
        loss, logits, grads = maml.meta_gradient(batch)
        assert len(maml.params) == (4 if head_start == "zero" else 6)
        one = batch[0]
        embedded = raymaml.features(maml)(one.support_x, one.support_y, one.query_x)
        parts = [loss, logits, *grads.values(), maml.predict(batch), *embedded]
        found[head] = torch.cat([part.flatten().double() for part in parts])
    assert torch.equal(*found.values())


def test_backward_adds_the_mean_gradient_as_pytorch_does() -> None:
    maml, batch = build(norm="running", head="zero"), episodes(3)
    loss, _, grads = maml.meta_gradient(batch)
    moments = {name: value.clone() for name, value in maml.running_moments.items()}
    assert torch.equal(maml.backward(batch), loss)
    assert maml.model.head.weight.grad is None  # a head that starts at zero is not learned
    for name, value in maml.params.items():
        assert torch.equal(value.grad, grads[name])
    held = {name: value.grad for name, value in maml.params.items()}
    assert any(not torch.equal(v, moments[n]) for n, v in maml.running_moments.items())
    twin = copy.deepcopy(maml)
    twin.zero_grad()
    twin.backward(batch)  # from the moments that the first moved
    maml.backward(batch)
    for name, value in maml.params.items():
        assert value.grad is held[name]
        assert torch.equal(value.grad, grads[name] + twin.params[name].grad)
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.5)
    before = {name: value.detach().clone() for name, value in maml.params.items()}
    optimizer.step()
    for name, value in maml.params.items():
        torch.testing.assert_close(value.detach(), before[name] - 0.5 * held[name])


def test_a_regression_is_learned_by_three_lines_of_pytorch() -> None:
    maml, batch = sinusoids(), waves(8)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(maml.backward(batch).item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_learner_is_a_module() -> None:
    maml, batch = build(norm="running", head="zero"), episodes(2)
    one = batch[0]
    wanted = maml.predict(batch)
    assert torch.equal(maml(one.support_x, one.support_y, one.query_x), wanted[0])
    assert not maml(one.support_x, one.support_y, one.query_x).requires_grad
    assert [id(value) for value in maml.parameters()] == [*map(id, maml.model.parameters())]
    assert torch.equal(maml.eval().predict(batch), wanted)
    assert not maml.model.training
    assert torch.equal(maml.train().predict(batch), wanted)

    for twin in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(twin.predict(batch), wanted)
        assert torch.equal(flat(twin.meta_gradient(batch)[2]), flat(maml.meta_gradient(batch)[2]))
        with torch.no_grad():
            twin.params["encoder.conv1.conv.weight"].add_(1)
        assert torch.equal(maml.predict(batch), wanted)
        assert not torch.equal(twin.predict(batch), wanted)
        twin.load_state_dict(maml.state_dict())
        assert torch.equal(twin.predict(batch), wanted)
        assert {f"model.{name}" for name in maml.model.state_dict()} == set(twin.state_dict())
        twin.float()
        floats = {n: v.float() if v.is_floating_point() else v for n, v in tensors_of(one).items()}
        assert twin.episode_gradient(replace(one, **floats)).logits.dtype == torch.float32


def test_a_module_that_is_a_loss_moves_with_the_learner() -> None:
    maml, batch = build(), episodes()
    maml.loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    maml.double()
    assert "loss_fn.weight" in maml.state_dict()
    assert maml.meta_gradient(batch)[0].dtype == torch.float64
    raymaml.check_gradient(maml, batch[0])


def test_weights_are_not_read_or_moved_during_a_call_of_another_thread() -> None:
    maml = learner(Graph)
    state = maml.state_dict()
    calls = [
        maml.state_dict,
        partial(maml.load_state_dict, state),
        lambda: [*maml.parameters()],
        maml.float,
        partial(copy.deepcopy, maml),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        with LOCK:
            jobs = [pool.submit(call) for call in calls]
            assert not wait(jobs, timeout=0.2).done
        for job in jobs:
            job.result()
