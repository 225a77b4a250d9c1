"""A call changes nothing in a model, however its modules hang together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from helpers_meta import METHODS, Graph, episodes, flat, learner, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from raymaml.common.errors import UserError
from raymaml.meta.learner import MetaLearner


class TwoAttributes(Graph):
    def hang(self) -> None:
        self.net = nn.Sequential(self.a, nn.Tanh(), self.b, nn.Tanh())

    def encode(self, x: Tensor) -> Any:
        return self.net(x)


class ListAlias(TwoAttributes):
    def hang(self) -> None:
        blocks = nn.ModuleList([nn.Sequential(self.a, nn.Tanh()), nn.Sequential(self.b, nn.Tanh())])
        self.net = nn.Sequential(*blocks)
        self.blocks, self.first, self.by_name = blocks, blocks[0], nn.ModuleDict({"b": self.b})


class PlainList(Graph):
    def hang(self) -> None:
        self.layers, self.pairs = [self.a, self.b], {"b": (self.b.weight, self.b.bias)}

    def encode(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.layers[0](x))
        return torch.tanh(nn.functional.linear(hidden, *self.pairs["b"]))


ALIASES: list[type[Graph]] = [TwoAttributes, ListAlias, PlainList]


class Tied(Graph):
    """One Parameter in two modules, under two names of one of them, and on both sides of a pass."""

    def hang(self) -> None:
        self.c = nn.Linear(3, 3)
        self.c.weight = self.b.weight
        self.c.again = self.b.weight

    def encode(self, x: Tensor) -> Any:
        return torch.tanh(self.c(super().encode(x)) @ self.c.again.T)


def hung(hang: Callable[[Graph], object]) -> type[Graph]:
    return type("Hung", (Graph,), {"hang": hang})


Orthogonal = hung(lambda model: parametrizations.orthogonal(model.b))
WeightNorm = hung(
    lambda m: (parametrizations.weight_norm(m.a), parametrizations.spectral_norm(m.b))
)
OldSpectralNorm = hung(lambda model: nn.utils.spectral_norm(model.b))
"""A hook writes the weight into an attribute, and changes buffers in place."""
NO_FORWARD_DERIVATIVE = [WeightNorm, OldSpectralNorm]


class Recurrent(Graph):
    def hang(self) -> None:
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def encode(self, x: Tensor) -> Any:
        return self.rnn(x.view(-1, 4, 4))[0][:, -1]


class Counting(Graph):
    """A buffer that two modules share and one changes in place."""

    def hang(self) -> None:
        self.register_buffer("seen", torch.ones((), dtype=torch.float64))
        self.a.register_buffer("seen", self.seen)

    def encode(self, x: Tensor) -> Any:
        self.seen.add_(1)
        return super().encode(x) / self.a.get_buffer("seen")


class Centres(nn.Module):
    """Keeps an average in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.average.mul_(0.5).add_(x.detach().mean(0))


class Attributes(Graph):
    """State of every other kind: attributes, containers, a buffer that is there from a pass on."""

    def hang(self) -> None:
        self.register_buffer("lazy", None)
        self.calls, self.log, self.plain = 0, [], torch.zeros(())
        self.hidden = [Centres()]

    def encode(self, x: Tensor) -> Any:
        if self.lazy is None:
            self.lazy = torch.full((3,), 2.0)
        self.calls += 1
        self.log.append(x)
        self.plain.add_(1)
        self.last = super().encode(x)
        self.new = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.hidden[0].train()
        return self.hidden[0](self.last) * self.lazy * self.calls * self.plain * self.new


class Pair(NamedTuple):
    seen: Tensor
    calls: int


class Containers(Graph):
    """State in the containers of the standard library."""

    def hang(self) -> None:
        self.last = deque([torch.zeros(3)], maxlen=2)
        self.pair = Pair(torch.ones(()), 1)
        self.kept = {torch.ones(())}
        self.layer = deque([self.b])

    def encode(self, x: Tensor) -> Any:
        out = torch.tanh(self.layer[0](torch.tanh(self.a(x))))
        self.last.append(out.detach().mean(0))
        self.pair.seen.add_(1)
        for each in self.kept:
            each.mul_(2)
        return out * sum(self.last) * self.pair.seen * sum(self.kept)


GRAPHS = [
    *ALIASES,
    Tied,
    Orthogonal,
    Recurrent,
    Counting,
    Attributes,
    Containers,
    *NO_FORWARD_DERIVATIVE,
]


def built(graph: type[Graph]) -> Graph:
    torch.manual_seed(0)
    model = graph().double()
    model.a.eval()  # a mode that is nobody's but the user's
    return model


def everything(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every object of the model by identity, every tensor by value, every module by its flags."""
    state: list[tuple[Any, ...]] = []
    for module in [*model.modules(), *getattr(model, "hidden", [])]:
        for key, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else [value]
            for item in held:
                shown = item.tolist() if isinstance(item, Tensor) else repr(item)
                state.append((key, id(item), shown))
        state.append(("gradients", [p.grad is None for p in module.parameters()]))
    return state


def calls(maml: MetaLearner) -> list[Callable[[], object]]:
    batch = episodes(2, size=4)
    return [
        lambda: maml.episode_gradient(batch[0]),
        lambda: maml.meta_gradient(batch),
        lambda: maml.predict(batch),
        lambda: maml.logits_by_step(batch[0]),
        lambda: list(maml.adapt(batch[0])),
        lambda: next(maml.adapt(batch[0])),
    ]


@pytest.mark.parametrize("graph", GRAPHS)
def test_calls_change_nothing_and_exact_methods_give_one_number(graph: type[Graph]) -> None:
    batch = episodes(2, size=4)
    exact = flat(learner(built(graph)).episode_gradient(batch[0]).grads)
    for gradient in METHODS:
        model = built(graph)
        maml = learner(model, gradient)
        optimizer = torch.optim.SGD(maml.params.values(), lr=1)
        before, logits = everything(model), maml.logits_by_step(batch[0])
        fails = gradient == "mixed_mode" and graph in NO_FORWARD_DERIVATIVE
        for number, call in enumerate(calls(maml)):
            with pytest.raises(UserError) if fails and number < 2 else nullcontext():
                call()
            assert everything(model) == before, (gradient, number)
        assert torch.equal(maml.logits_by_step(batch[0]), logits)
        held = [id(value) for group in optimizer.param_groups for value in group["params"]]
        assert held == [id(parameter) for parameter in model.parameters()]
        if gradient != "first_order" and not fails:
            found = flat(maml.episode_gradient(batch[0]).grads)
            assert relative_error(found, exact) < 1e-10, gradient


@pytest.mark.parametrize("gradient", METHODS)
def test_an_alias_changes_no_number(gradient: str) -> None:
    batch, plain = episodes(2, size=4), built(Graph)
    wanted = learner(plain, gradient)
    for graph in ALIASES:
        other = built(graph)
        other.load_state_dict(plain.state_dict(), strict=False)
        found = learner(other, gradient)
        assert found.params.keys() == wanted.params.keys()
        assert torch.equal(found.predict(batch), wanted.predict(batch))
        assert torch.equal(*(flat(maml.meta_gradient(batch)[2]) for maml in (found, wanted)))
        for one, two in zip(*(m.chunk_gradients(batch) for m in (found, wanted)), strict=True):
            assert torch.equal(flat(one.grads), flat(two.grads))


@pytest.mark.parametrize("graph", [Tied, Counting])
@pytest.mark.parametrize("gradient", METHODS)
def test_several_episodes_at_once_are_the_loop(graph: type[Graph], gradient: str) -> None:
    maml, batch = learner(built(graph), gradient), episodes(3, size=4)
    for found, episode in zip(maml.chunk_gradients(batch), batch, strict=True):
        assert relative_error(flat(found.grads), flat(maml.episode_gradient(episode).grads)) < 1e-10


def test_a_hidden_average_cannot_take_several_episodes_at_once() -> None:
    with pytest.raises(UserError, match=r"set cluster\.episodes_per_chunk: 1"):
        learner(built(Attributes)).chunk_gradients(episodes(2, size=4))


def test_a_tied_weight_adapts_as_one() -> None:
    model, episode = built(Tied), episodes(size=4)[0]
    *_, fast = learner(model, num_steps=1).adapt(episode)
    loss = nn.functional.cross_entropy(model(episode.support_x), episode.support_y)
    (slope,) = torch.autograd.grad(loss, [model.b.weight])  # by all four places together
    torch.testing.assert_close(fast.params["b.weight"], model.b.weight.detach() - 0.3 * slope)
    assert "c.weight" not in fast.params


class Failing(TwoAttributes):
    def encode(self, x: Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        out = super().encode(x)
        if len(x) == 9:  # the query set
            raise ValueError("in the middle of a pass")
        return out


@pytest.mark.parametrize("gradient", METHODS)
def test_after_an_error_the_model_is_whole(gradient: str) -> None:
    model = built(Failing)
    before, maml = everything(model), learner(model, gradient)
    for call in calls(maml)[:4]:
        with pytest.raises(ValueError, match="in the middle of a pass"):
            call()
        assert everything(model) == before


class KeepsItsMode(TwoAttributes):
    modes: tuple[bool, bool]

    def train(self, mode: bool = True) -> KeepsItsMode:
        super().train(mode)
        self.b.eval()
        return self

    def encode(self, x: Tensor) -> Any:
        type(self).modes = (self.a.training, self.b.training)
        return super().encode(x)


def test_a_module_that_sets_its_own_modes_is_heard() -> None:
    maml, batch = learner(built(KeepsItsMode)), episodes(size=4)
    maml.meta_gradient(batch)
    assert KeepsItsMode.modes == (True, False)
    maml.predict(batch)
    assert KeepsItsMode.modes == (False, False)


class Replaces(Counting):
    def encode(self, x: Tensor) -> Any:
        self.seen = self.seen + 1
        return Graph.encode(self, x)


def test_a_shared_buffer_that_comes_apart_is_refused() -> None:
    with pytest.raises(UserError, match=r"replaces the buffer seen .* at one of its places alone"):
        learner(built(Replaces)).predict(episodes(size=4))


def test_adaptation_works_where_gradients_are_off_and_leaves_them_off() -> None:
    maml, batch = learner(built(Graph)), episodes(size=4)
    wanted = maml.predict(batch)
    with torch.no_grad():
        assert torch.equal(maml.predict(batch), wanted)
        assert [torch.is_grad_enabled() for _ in maml.adapt(batch[0])] == [False] * 3
