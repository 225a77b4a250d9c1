"""The bookkeeping of CUDA graphs, by a stand-in that records and repeats the calls of PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raymaml import EpisodeBatch, InnerConfig, MetaLearner, ModelConfig, UserError, build_model
from raymaml.config.schema import ClusterConfig
from raymaml.training.graphs import (
    MOST,
    Graphs,
    WithoutReads,
    _copied,
    refusal_of,
    replayed,
)


class Recording(TorchDispatchMode):
    """As a CUDA graph: repeats the calls, in the same memory, without any Python around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_flat(result), _flat(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return (
        [each for part in value for each in _flat(part)] if isinstance(value, list | tuple) else []
    )


class Recorder:
    def __init__(self) -> None:
        self.count = 0

    @torch.no_grad()
    def _replay(self, mode: Recording) -> None:
        mode.replay()

    def __call__(self, computation: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.count += 1
        with Recording() as mode:
            result = computation()
        return result, lambda: self._replay(mode)


def batch(seed: int, count: int = 2, shots: int = 1) -> EpisodeBatch:
    generator = torch.Generator().manual_seed(seed)

    def images(per_class: int) -> Tensor:
        return torch.rand(count, 3 * per_class, 1, 28, 28, generator=generator).double()

    def labels(per_class: int) -> Tensor:
        return torch.arange(3).repeat_interleave(per_class).expand(count, -1).contiguous()

    return EpisodeBatch(
        support_x=images(shots),
        support_y=labels(shots),
        query_x=images(2),
        query_y=labels(2),
        num_ways=3,
    )


def learner(**options: Any) -> MetaLearner:
    options = {"num_steps": 2, "lr": 0.05, **options}
    config = ModelConfig(width=4, norm=options.pop("norm", "transductive"))
    model = build_model(config, image_shape=(1, 28, 28), num_ways=3, seed=0).double()
    return MetaLearner(model, InnerConfig(**options))


def graphs_of(function: Callable[..., Any], recorder: Recorder) -> Graphs[Any]:
    return Graphs(function, lambda *others: others, recorder, name="training")


@pytest.mark.parametrize("norm", ["transductive", "running", "tasknorm_i"])
@pytest.mark.parametrize("method", ["unrolled", "checkpointed", "mixed_mode", "first_order"])
def test_a_replay_is_the_computation_on_other_episodes_and_weights(method: str, norm: str) -> None:
    """No number of the recording stays: neither of its episodes, nor of theta, nor of moments."""
    learns, recorder = learner(gradient=method, norm=norm), Recorder()
    graphs, results = graphs_of(learns.chunk_gradients, recorder), []
    for step in range(5):
        wanted = learns.chunk_gradients(batch(step), 0)
        found = graphs(batch(step), 0)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.grads, b.grads, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close((a.loss, a.logits), (b.loss, b.logits))
            torch.testing.assert_close(a.buffers, b.buffers)
        results.append((found[1].logits, found[1].logits.clone()))
        learns.absorb([each.buffers for each in found])
        with torch.no_grad():  # an outer step
            for value in learns.model.parameters():
                value.add_(0.1 * torch.randn_like(value))
    assert recorder.count == 1
    assert all(torch.equal(kept, before) for kept, before in results)  # the caller's own


def test_evaluation_is_replayed_as_well() -> None:
    judged, recorder = learner(), Recorder()
    graphs = graphs_of(judged.logits_by_step, recorder)
    for step in range(4):
        torch.testing.assert_close(graphs(batch(step)), judged.logits_by_step(batch(step)))
    assert recorder.count == 1


def test_each_shape_and_setting_has_a_graph_from_its_second_call_on() -> None:
    recorder = Recorder()
    graphs = graphs_of(
        lambda episodes, factor: factor * episodes.query_x.sum((1, 2, 3, 4)), recorder
    )

    def call(count: int, factor: int, shots: int = 1) -> None:
        episodes = batch(count, count, shots)
        wanted = factor * episodes.query_x.sum((1, 2, 3, 4))
        torch.testing.assert_close(graphs(episodes, factor), wanted)

    for expected in (0, 1, 1, 1):
        call(2, 1)
        assert recorder.count == expected
    for count, factor, shots in [(3, 1, 1), (2, 5, 1), (2, 1, 2)]:
        before = recorder.count
        call(count, factor, shots)
        assert recorder.count == before
        call(count, factor, shots)
        assert recorder.count == before + 1


def test_the_graphs_used_last_are_kept() -> None:
    recorder = Recorder()
    graphs = graphs_of(lambda episodes, factor: factor * episodes.query_x, recorder)
    for factor in (*range(MOST), 0, MOST):  # 0 is used again, and 1 is the oldest
        graphs(batch(0), factor)
        graphs(batch(0), factor)
    assert recorder.count == MOST + 1
    graphs(batch(0), 0)
    assert recorder.count == MOST + 1
    graphs(batch(0), 1)
    graphs(batch(0), 1)
    assert recorder.count == MOST + 2


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "raymaml.run")
    return lambda: [each.getMessage() for each in caplog.records]


def test_a_branch_that_changes_is_found(lines: Callable[[], list[str]]) -> None:
    """As in an encoder of one's own; a recording knows one branch."""
    calls = []

    def fickle(episodes: EpisodeBatch) -> Tensor:
        calls.append(0)
        return episodes.query_x if len(calls) < 3 else -episodes.query_x

    graphs = graphs_of(fickle, recorder := Recorder())
    for step, sign in enumerate([1, -1, -1]):  # computed; recorded, and otherwise; computed
        torch.testing.assert_close(graphs(batch(step)), sign * batch(step).query_x)
    assert recorder.count == 1
    (line,) = lines()
    assert line.startswith("training: no CUDA graph: a replay differs by ")


def test_what_reads_a_value_is_computed_as_before(lines: Callable[[], list[str]]) -> None:
    def reads(episodes: EpisodeBatch) -> Tensor:
        return episodes.query_x * float(episodes.query_x.sum() > 0)

    graphs = graphs_of(reads, Recorder())
    for step in range(4):
        assert torch.equal(graphs(batch(step)), batch(step).query_x)
    expected = (
        "training: no CUDA graph: CUDA error: operation not permitted when stream is capturing"
    )
    assert lines() == [expected]


def test_without_memory_for_a_recording_all_are_forgotten(lines: Callable[[], list[str]]) -> None:
    def record(computation: Callable[[], Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def triple(episodes: EpisodeBatch) -> Tensor:
        return 3 * episodes.query_x

    others = graphs_of(triple, recorder := Recorder())
    graphs = Graphs(triple, lambda: None, record, name="training")
    for step in range(3):
        assert torch.equal(others(batch(step)), 3 * batch(step).query_x)
        assert torch.equal(graphs(batch(step)), 3 * batch(step).query_x)
    assert lines() == ["training: no CUDA graph: CUDA out of memory"]
    assert recorder.count == 1  # forgotten at step 1, and at step 2 a shape that comes once
    others(batch(3))
    assert recorder.count == 2


def test_errors_of_memory_of_the_computation_are_for_the_caller() -> None:
    """It halves the episodes at once."""

    def too_large(episodes: EpisodeBatch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = graphs_of(too_large, Recorder())
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            graphs(batch(0))


def test_a_computation_and_its_recording_are_never_in_memory_together() -> None:
    """The computation, on the episodes of the call; then the recording, on others."""
    seen: list[tuple[str, EpisodeBatch]] = []

    def record(computation: Callable[[], Any]) -> Any:
        seen.append(("recording", batch(1)))
        return Recorder()(computation)

    def double(episodes: EpisodeBatch) -> Tensor:
        seen.append(("call", episodes))
        return 2 * episodes.query_x

    graphs = Graphs(double, lambda: None, record, name="training")
    for step in range(4):
        graphs(batch(step))
    assert [kind for kind, _ in seen] == ["call", "call", "recording", "call"]
    given, recorded = seen[1][1], seen[3][1]
    assert torch.equal(given.query_x, batch(1).query_x)
    assert recorded.query_x.shape == given.query_x.shape


@pytest.mark.parametrize("count", [1, 3])
def test_other_episodes_have_other_images_and_the_same_labels(count: int) -> None:
    episodes = batch(0, count)
    others = episodes.shuffled()
    assert not torch.equal(others.support_x, episodes.support_x)
    assert torch.equal(others.support_x[0, 0], episodes.support_x[-1, -1])
    assert torch.equal(others.query_y, episodes.query_y)
    assert others.query_y.data_ptr() != episodes.query_y.data_ptr()


def test_views_of_one_tensor_are_copied_at_once() -> None:
    base = torch.arange(12.0).view(3, 4)
    part = torch.arange(10.0)[::2]
    copied = _copied([base[1], base[2, 1:], base.T, part], {})
    for found, wanted in zip(copied, [base[1], base[2, 1:], base.T, part], strict=True):
        assert torch.equal(found, wanted)
    base.zero_()
    part.zero_()
    assert float(copied[0].sum()) == 4 + 5 + 6 + 7
    assert torch.equal(copied[3], torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0]))
    assert copied[0]._base is copied[1]._base


def test_a_look_at_a_value_ends_a_warm_up() -> None:
    x = torch.arange(3.0)
    for look in (lambda: bool(x.sum() > 0), x.nonzero, lambda: x[x > 1], lambda: x.equal(x)):
        with pytest.raises(RuntimeError, match="reads a value from the device"), WithoutReads():
            look()
    with WithoutReads():
        assert len(x.relu()) == 3


def test_mistakes_of_the_user_stay_messages() -> None:
    def wrong(episodes: EpisodeBatch) -> Tensor:
        raise UserError("model: is wrong")

    graphs = graphs_of(wrong, Recorder())
    for _ in range(3):
        with pytest.raises(UserError, match="model: is wrong"):
            graphs(batch(0))


def test_a_shape_that_cannot_be_recorded_leaves_the_others_theirs() -> None:
    """Such as an episode alone, which is computed another way."""

    def reads_alone(episodes: EpisodeBatch) -> Tensor:
        if len(episodes) == 1:
            return episodes.query_x * float(episodes.query_x.sum() > 0)
        return episodes.query_x

    graphs = graphs_of(reads_alone, recorder := Recorder())
    for step, count in enumerate([2, 2, 1, 1, 2, 1]):
        assert torch.equal(graphs(batch(step, count)), batch(step, count).query_x)
    assert recorder.count == 2  # of two episodes, and the try of one


def test_on_a_cpu_nothing_is_recorded() -> None:
    learns = learner()
    function = replayed(
        learns.chunk_gradients, learns, learns.inner, ClusterConfig(), name="training"
    )
    assert function == learns.chunk_gradients


def test_what_draws_is_refused() -> None:
    plain = nn.Linear(2, 2)
    assert refusal_of(plain, InnerConfig()) == ""
    drops = nn.Sequential(plain, nn.Dropout2d(0.1))
    assert refusal_of(drops, InnerConfig()) == "Dropout2d draws in each pass"
    refusal = refusal_of(plain, InnerConfig(support_batch_size=2))
    assert refusal == "inner.support_batch_size draws rows in each episode"
