"""The contenders of one configuration: starting them, and checking that they compute the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raymaml.bench.cases import PHASES, Phase, image_shape
from raymaml.bench.children import Child, ChildError
from raymaml.bench.contenders import EXACT_METHODS, missing, what_it_lacks
from raymaml.bench.rows import disagreements, label, relative_difference
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.storage.temporary import temporary_folder
from raymaml.training.state import build_learner

Echo = Callable[[str], None]
Precision = Literal["float32", "float64"]


@dataclass(kw_only=True)
class Contestant:
    """A contender at work: its processes, and what the first of them has said of itself."""

    library: str
    method: str
    threads: int
    """Intra-op threads of each process."""
    children: list[Child]
    peak_mib: dict[Phase, float | None] = field(default_factory=dict)
    aten_calls: dict[Phase, int] = field(default_factory=dict)
    results: dict[tuple[Precision, Phase], NDArray[Any]] = field(default_factory=dict)
    """Gradient, [P], or logits of the queries, [N*Q * N]."""
    differences: dict[tuple[Precision, Phase], float] = field(default_factory=dict)
    """Of the results from those of the first contestant, relative."""

    @property
    def name(self) -> str:
        """For messages."""
        threads = "" if self.threads == 1 else f" ({self.threads} threads)"
        return label(self.library, self.method) + threads

    def begin(self, config: Config, precision: Precision = "float32") -> None:
        """Let all processes build the model of ``config``, at the same time."""
        content = config.model_dump(mode="json")
        for child in self.children:
            child.send("begin", config=content, dtype=precision)
        for child in self.children:
            child.receive()


@contextlib.contextmanager
def contest(
    config: Config, names: Sequence[str], threads: Set[int], device: torch.device, echo: Echo
) -> Iterator[list[Contestant]]:
    """Start a process for each contender that can do the episode; end all after the block.

    Args:
        config: what they will be measured at; raymaml takes its number of threads.
        names: of ``EXACT_METHODS`` and ``OTHERS``.
        threads: others get a process for each of these, since their best is not known.
        device: where they compute.
        echo: where it is said who is left out, and why.

    Raises:
        UserError: the model cannot be built.
    """
    everyone: list[Contestant] = []
    try:
        for library, method, count in _candidates(config, names, threads, echo):
            children = [Child(library, method, count, device)]
            everyone.append(
                Contestant(library=library, method=method, threads=count, children=children)
            )
        drop_failing(everyone, lambda contestant: contestant.children[0].receive(), echo)
        yield everyone
    finally:
        for contestant in everyone:
            dismiss(contestant)


def dismiss(contestant: Contestant) -> None:
    """End its processes."""
    for child in contestant.children:
        child.close()


def drop_failing(
    everyone: list[Contestant], act: Callable[[Contestant], object], echo: Echo
) -> None:
    """Act on each; whoever's process ends by itself is taken out of the list, and it is said."""
    for contestant in list(everyone):
        try:
            act(contestant)
        except ChildError as error:
            echo(f"  {contestant.name}: left out from here on: {error}")
            dismiss(contestant)
            everyone.remove(contestant)


def compare(config: Config, everyone: list[Contestant], echo: Echo) -> None:
    """Note each one's memory and calls in one episode, and check that all compute the same.

    Raises:
        UserError: two do not (it names both), or nobody is left.
    """
    with temporary_folder() as folder:
        path = folder / "result.npy"
        drop_failing(everyone, lambda contestant: _look_at(contestant, config, path), echo)
    if not everyone:
        raise UserError(f"{config.name}: no contender is left; the lines above say why")
    problems = []
    for phase in PHASES:
        what = "gradient" if phase == "training" else "logits"
        results = {each.name: each.results["float64", phase] for each in everyone}
        problems += disagreements(f"{config.name}: {what}", results)
    if problems:
        raise UserError(*problems)
    for each in everyone:
        each.differences = {
            key: relative_difference(result, everyone[0].results[key])
            for key, result in each.results.items()
        }


def _candidates(
    config: Config, names: Sequence[str], threads: Set[int], echo: Echo
) -> Iterator[tuple[str, str, int]]:
    """Yield (library, method, threads) of those who can do the episode."""
    ways = config.episodes.train.num_ways
    model = build_learner(config, image_shape(config), ways, torch.device("cpu")).model
    for name in names:
        if name in EXACT_METHODS:
            yield "raymaml", name, config.cluster.threads_per_worker
        elif missing(name):
            echo(f"  {name}: left out: not installed (pip install raymaml[bench])")
        elif lacks := what_it_lacks(name, config, model):
            echo(f"  {name}: left out: does without {', '.join(lacks)}")
        else:
            yield from ((name, "unrolled", count) for count in sorted(threads))


def _look_at(contestant: Contestant, config: Config, path: Path) -> None:
    """Fill in what a contestant says of one episode; ``path`` is for the results."""
    (child,) = contestant.children
    precisions: tuple[Precision, ...] = ("float32", "float64")
    for precision in precisions:
        contestant.begin(config, precision)
        for phase in PHASES:
            answer = child.ask("outcome", phase=phase, path=str(path))
            contestant.results[precision, phase] = np.load(path)
            if precision == "float32":
                contestant.peak_mib[phase] = answer["peak_mib"]
                contestant.aten_calls[phase] = child.ask("aten_calls", phase=phase)["count"]
    contestant.begin(config)
