"""GPUs that are not here: assumptions, each of which can be changed, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from raymaml.bench.scaling.counts import Counts
from raymaml.bench.scaling.model import Job, Machine, Start, Step, Storage, System, predict
from raymaml.bench.scaling.network import REDUCTIONS, Link, Network, Reduction
from raymaml.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is taken for true of a cluster of GPUs; achieved values, not those of data sheets."""

    tflops: float = 20.0
    """TFLOP/s of a GPU in convolutions of such images."""
    call_us: float = 6.0
    """Microseconds of Python and PyTorch for an operator; a GPU that is faster waits."""
    memory_gb: float = 1500.0
    """GB/s of a GPU's memory when gradients are added up."""
    gpus_per_node: int = 8
    nvlink_gb: float = 200.0
    """GB/s that a GPU sends inside its node..."""
    nvlink_us: float = 2.0
    """...and microseconds of a message."""
    network_gb: float = 20.0
    """GB/s of a GPU's share of its node's network cards..."""
    network_us: float = 8.0
    """...and microseconds of a message."""
    stream_per_second: float = 950.0
    """Episodes/s that Ray Data makes ready for a worker (README, Measured: 84x84 colour images)."""
    spread: float = 0.05
    """Standard deviation of the logarithm of an episode's seconds."""
    start: float = 20.0
    """Seconds of a run before and after its steps..."""
    start_per_worker: float = 0.1
    """...and for each worker."""

    def system(self, counts: Counts, step_calls: int, storage: Storage) -> System:
        """Return the cluster at work on an episode of ``counts``.

        Args:
            counts: of the episode.
            step_calls: operators of an outer step beside its episodes.
            storage: where checkpoints go.
        """
        arithmetic = counts.flops / (self.tflops * 1e12)
        calling = counts.calls * self.call_us * 1e-6
        machine = Machine(
            episode_seconds=max(arithmetic, calling),
            bound="arithmetic" if arithmetic >= calling else "operator calls",
            spread=self.spread,
            step_seconds=step_calls * self.call_us * 1e-6,
            add_rate=self.memory_gb * 1e9,
            stream_seconds=1 / self.stream_per_second,
        )
        network = Network(
            workers_per_node=self.gpus_per_node,
            inside=Link(latency=self.nvlink_us * 1e-6, bandwidth=self.nvlink_gb * 1e9),
            between=Link(latency=self.network_us * 1e-6, bandwidth=self.network_gb * 1e9),
        )
        start = Start(seconds=self.start, per_worker=self.start_per_worker)
        return System(machine=machine, network=network, storage=storage, start=start)


def assume(texts: Sequence[str]) -> Assumptions:
    """Read ``NAME=NUMBER`` of the command line.

    Raises:
        UserError: naming all that is unknown, or no positive number.
    """
    known = [field.name for field in fields(Assumptions)]
    changes: dict[str, float] = {}
    problems = []
    for text in texts:
        name, _, number = text.partition("=")
        value = _positive(number)
        if name not in known:
            problems.append(f"--assume: {name!r} is unknown; give some of {', '.join(known)}")
        elif value is None or (name == "gpus_per_node" and value != int(value)):
            what = "whole number" if name == "gpus_per_node" else "number"
            problems.append(f"--assume: {text!r}: give a positive {what}, as in {name}=8")
        else:
            changes[name] = value
    if problems:
        raise UserError(*sorted(problems))
    merged = {**asdict(Assumptions()), **changes}
    return Assumptions(**{**merged, "gpus_per_node": int(merged["gpus_per_node"])})


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A prediction, and which meta-batch it is for."""

    config: str
    scaling: str
    """Episodes a GPU (weak), or in all (strong)."""
    step: Step


def outlook(
    name: str,
    system: System,
    job: Job,
    *,
    gpus: Sequence[int],
    per_gpu: Sequence[int],
    fixed: int,
    reductions: Sequence[Reduction] = REDUCTIONS,
) -> list[Outlook]:
    """Predict for numbers of GPUs: some episodes for each of them, and a fixed meta-batch.

    Args:
        name: of the config.
        system: the cluster.
        job: of which only the meta-batch changes.
        gpus: numbers of workers.
        per_gpu: episodes a GPU.
        fixed: episodes of all GPUs together.
        reductions: each is predicted; `chunk sums` adds up all episodes of a GPU.
    """
    found = []
    for reduction in reductions:
        for workers in gpus:
            for rows in per_gpu:
                chunk = rows if reduction == "chunk sums" else job.chunk
                grown = replace(job, meta_batch=rows * workers, chunk=chunk)
                step = predict(system, grown, workers, reduction=reduction, weak=True)
                found.append(Outlook(config=name, scaling=f"{rows} a GPU", step=step))
            same = replace(job, meta_batch=fixed)
            step = predict(system, same, workers, reduction=reduction)
            found.append(Outlook(config=name, scaling=f"{fixed} in all", step=step))
    return found
