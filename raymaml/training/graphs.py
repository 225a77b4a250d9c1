"""CUDA graphs: the computation of a chunk is recorded once per shape, and replayed after that.

A GPU waits for Python in each of the thousands of calls of an episode. A graph makes all of them
at once. It repeats the calls of its recording: on other episodes and other weights, which lie at
the same addresses, but by the same branches. So a graph stays only if its first replay on episodes
that it was not recorded on agrees with the computation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from raymaml.common.errors import reason_of
from raymaml.common.logs import LOG
from raymaml.config.inner import InnerConfig
from raymaml.config.schema import ClusterConfig
from raymaml.meta.learner import MetaLearner
from raymaml.training.explain import is_out_of_memory
from raymaml.types import EpisodeBatch, tensors_of

T = TypeVar("T")
Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""A computation -> its result, and a replay, which computes the result in the same memory."""
MOST = 4
"""Graphs of a function that are kept at once; each holds the memory of its computation."""
_WARM_UP = 2
"""Calls before a recording, in which libraries choose their kernels."""
_AGREES = 0.05
"""Largest accepted distance of a replay from the computation, relative to its norm: rounding tips
maxima, which moves a gradient by up to a hundredth."""


class _Disagrees(Exception):  # noqa: N818  (not an error)
    """A replay is not what the computation gives."""


def record_on_gpu(computation: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Record a computation as a CUDA graph; see ``Recorder``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            computation()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = computation()
    return result, graph.replay


class Graph(Generic[T]):
    """The recording of a function of episodes of one shape."""

    def __init__(
        self, function: Callable[[EpisodeBatch], T], episodes: EpisodeBatch, record: Recorder
    ) -> None:
        self._function, self._replays = function, 0
        self._inputs = episodes.cloned()
        self._result, self._replay = record(lambda: function(self._inputs))

    def __call__(self, episodes: EpisodeBatch) -> T:
        """Return what the function returns.

        Raises:
            _Disagrees: the replay is something else, on the first episodes after those recorded.
        """
        for name, value in tensors_of(self._inputs).items():
            value.copy_(getattr(episodes, name))
        self._replay()
        # copied: the next replay overwrites it
        found: T = _copied(self._result)
        if self._replays == 1:
            self._require_agreement(found, self._function(episodes))
        self._replays += 1
        return found

    @staticmethod
    def _require_agreement(found: T, wanted: T) -> None:
        both = list(zip(_tensors_in(found), _tensors_in(wanted), strict=True))
        apart = _norm([a.double() - b.double() for a, b in both])
        size = _norm([b.double() for _, b in both])
        if not apart <= _AGREES * size:  # what is no number does not agree
            raise _Disagrees(f"a replay differs by {apart:.1e} from a result of {size:.1e}")


def _copied(value: Any) -> Any:
    """Copy all tensors in lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _copied(each) for name, each in vars(value).items()})
    return value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)
    elif is_dataclass(value):
        yield from _tensors_in(vars(value))


def _norm(values: list[Tensor]) -> float:
    return float(torch.stack([value.square().sum() for value in values]).sum().sqrt())


class Graphs(Generic[T]):
    """A function of episodes that is replayed from the second call with a shape on.

    What cannot be recorded is computed as before, and a line says why.

    Args:
        function: episodes, and what else it depends on -> tensors, in containers.
        key: of the other arguments: calls of equal keys differ by episodes alone.
        record: makes recordings.
        name: of the function, for the line.
    """

    def __init__(
        self,
        function: Callable[..., T],
        key: Callable[..., Hashable],
        record: Recorder,
        *,
        name: str,
    ) -> None:
        self._function, self._key, self._record, self._name = function, key, record, name
        self._graphs: dict[Hashable, Graph[T] | None] = {}
        """By key, the one used last at the end; None: of a key that came once."""
        self._refused: set[Hashable] = set()

    def __call__(self, episodes: EpisodeBatch, *others: Any) -> T:
        """Return what the function returns; the result is the caller's."""
        shapes = [(name, x.shape, x.dtype) for name, x in tensors_of(episodes).items()]
        key = (*shapes, episodes.num_ways, self._key(*others))
        if key in self._refused:
            return self._function(episodes, *others)
        if key not in self._graphs:  # a shape that comes once is not worth a graph
            self._graphs[key] = None
            return self._function(episodes, *others)
        graph = self._graphs.pop(key)
        try:
            if graph is None:
                graph = Graph(lambda each: self._function(each, *others), episodes, self._record)
            found = graph(episodes)
        except (RuntimeError, _Disagrees) as error:
            if is_out_of_memory(error):
                raise
            self._refused.add(key)
            say(self._name, reason_of(error))
        else:
            self._keep(key, graph)
            return found
        return self._function(episodes, *others)

    def _keep(self, key: Hashable, graph: Graph[T]) -> None:
        self._graphs[key] = graph
        recorded = [key for key, graph in self._graphs.items() if graph is not None]
        for oldest in recorded[:-MOST]:
            del self._graphs[oldest]


def replayed(
    function: Callable[..., T],
    learner: MetaLearner,
    inner: InnerConfig,
    cluster: ClusterConfig,
    *,
    name: str,
    key: Callable[..., Hashable] = lambda *others: others,
) -> Callable[..., T]:
    """Return a function of a learner and episodes, by CUDA graphs where it may have them."""
    device = next(learner.model.parameters()).device
    if device.type != "cuda" or not cluster.cuda_graphs:
        return function
    if refusal := refusal_of(learner.model, inner):
        say(name, refusal)
        return function
    return Graphs(function, key, record_on_gpu, name=name)


def say(name: str, reason: str) -> None:
    """Log why a function has no graph."""
    LOG.info("%s: no CUDA graph: %s", name, reason)


def refusal_of(model: nn.Module, inner: InnerConfig) -> str:
    """Return why passes of a model are not recorded; empty: they may be."""
    if inner.support_batch_size is not None:
        return "inner.support_batch_size draws rows in each episode"
    drops = [each for each in model.modules() if "drop" in type(each).__name__.lower()]
    return f"{type(drops[0]).__name__} draws in each pass" if drops else ""
