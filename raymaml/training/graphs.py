"""CUDA graphs: the computation of a chunk is recorded once per shape, and replayed after that.

A GPU waits for Python in each of the thousands of calls of an episode. A graph makes all of them
at once. It repeats the calls of its recording: on other episodes and other weights, which lie at
the same addresses, but by the same branches. So a graph is recorded on other episodes than it is
called with, and stays only if its first replay agrees with the computation itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
"""Graphs of a function that are kept at once."""
_WARM_UP = 2
"""Calls before a recording, in which libraries choose their kernels."""
_AGREES = 0.05
"""Largest accepted distance of a replay from the computation, relative to its norm: rounding tips
maxima, which moves a gradient by up to a hundredth."""
_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}
_BY_INDEX = {"index", "index_put", "index_put_"}
"""These read a mask."""


class _Disagrees(Exception):  # noqa: N818  (not an error)
    """A replay is not what the computation gives."""


class WithoutReads(TorchDispatchMode):
    """Raises an error where a computation looks at a value, for which it waits for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Make the call, if it is none of these."""
        name = func.overloadpacket.__name__
        by_mask = name in _BY_INDEX and any(
            each is not None and each.dtype is torch.bool for each in args[1]
        )
        if name in _READS or by_mask:
            raise RuntimeError(f"{name} reads a value from the device")
        return func(*args, **(kwargs or {}))


@functools.cache
def _place_of_recordings(_device: int) -> tuple[torch.cuda.Stream, Any]:
    """Return the stream and the memory of all recordings: replays follow one another, and their
    results are copied."""
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


def record_on_gpu(computation: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Record a computation as a CUDA graph; see ``Recorder``.

    Another thread may load episodes meanwhile. After an error, PyTorch keeps memory back for ever
    and leaves the stream of the recording current: what reads a value ends before the recording.
    """
    side, pool = _place_of_recordings(torch.cuda.current_device())
    now = torch.cuda.current_stream()
    side.wait_stream(now)
    with torch.cuda.stream(side), WithoutReads():  # type: ignore[no-untyped-call]
        for _ in range(_WARM_UP):
            computation()
    now.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    recording = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
    with torch.cuda.stream(now), recording:
        result = computation()
    return result, graph.replay


class Graph(Generic[T]):
    """The recording of a function of episodes of one shape.

    Raises:
        _Disagrees: a replay is not what the function gives.
    """

    def __init__(
        self, function: Callable[[EpisodeBatch], T], episodes: EpisodeBatch, record: Recorder
    ) -> None:
        wanted = function(episodes)  # before the recording, which takes as much memory
        self._inputs = episodes.shuffled()
        self._result, self._replay = record(lambda: function(self._inputs))
        self._require_agreement(self(episodes), wanted)

    def __call__(self, episodes: EpisodeBatch) -> T:
        """Return what the function returns."""
        for name, value in tensors_of(self._inputs).items():
            value.copy_(getattr(episodes, name))
        self._replay()
        # copied: the next replay overwrites it
        found: T = _copied(self._result, {})
        return found

    @staticmethod
    def _require_agreement(found: T, wanted: T) -> None:
        both = list(zip(_tensors_in(found), _tensors_in(wanted), strict=True))
        apart = _norm([a.double() - b.double() for a, b in both])
        size = _norm([b.double() for _, b in both])
        if not apart <= _AGREES * size:  # what is no number does not agree
            raise _Disagrees(f"a replay differs by {apart:.1e} from a result of {size:.1e}")


def _copied(value: Any, copies: dict[Tensor, Tensor]) -> Any:
    """Copy all tensors in lists, dictionaries and dataclasses; views of one tensor stay views.

    Args:
        value: the containers.
        copies: by the tensor.
    """
    if isinstance(value, Tensor):
        base = value if value._base is None else value._base
        if base not in copies:
            copies[base] = base.clone()
        copy, first = copies[base], value.storage_offset() - base.storage_offset()
        if copy.stride() != base.stride():  # of memory with holes
            return value.clone()
        return copy.as_strided(value.shape, value.stride(), first)
    if isinstance(value, list | tuple):
        return type(value)(_copied(each, copies) for each in value)
    if isinstance(value, dict):
        return {name: _copied(each, copies) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **_copied(vars(value), copies))
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
        _ALL.add(self)

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
            self._refused.add(key)
            say(self._name, reason_of(error))
            no_memory = is_out_of_memory(error)
        else:
            self._keep(key, graph)
            return found
        if no_memory:
            forget_recordings()
        return self._function(episodes, *others)

    def forget(self) -> None:
        """Give back the memory of all recordings."""
        self._graphs.clear()

    def _keep(self, key: Hashable, graph: Graph[T]) -> None:
        self._graphs[key] = graph
        recorded = [key for key, graph in self._graphs.items() if graph is not None]
        for oldest in recorded[:-MOST]:
            del self._graphs[oldest]


_ALL: WeakSet[Graphs[Any]] = WeakSet()


def forget_recordings() -> None:
    """Give back the memory of all recordings of this process, where there is none left."""
    for graphs in _ALL:
        graphs.forget()


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
