"""The cost of an outer step: a function of the job, the machines and the number of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raymaml.bench.scaling.network import FLOAT, TOUCHED, Network, Reduction, exchange
from raymaml.bench.scaling.waiting import expected_slowest
from raymaml.training.reduction import share_sizes


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained."""

    num_params: int
    """P."""
    meta_batch: int
    """Episodes in one outer step, over all workers: B."""
    num_steps: int
    """Outer steps of the run, over which its start is spread."""
    outcome_width: int = 3
    """Floats an episode that all workers see beside the gradient: loss, accuracy, stop, moments."""
    chunk: int = 1
    """Episodes that stay together on one worker, and that `chunk sums` adds up there."""
    checkpoint_every: int = 500
    """Outer steps."""
    checkpoint_floats: int = 3
    """Floats of a checkpoint for each parameter: itself, and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a worker computes with."""

    episode_seconds: float
    """Of one meta-gradient, by a worker that has the machine to itself."""
    bound: str = "compute"
    """What these seconds go into."""
    spread: float = 0.0
    """Standard deviation of their logarithm."""
    step_seconds: float = 0.0
    """Of each outer step whatever its episodes: update, metrics, the loop itself."""
    add_rate: float = math.inf
    """Bytes/s when gradients are added up."""
    stream_seconds: float = 0.0
    """Of making an episode ready, while the one before is learned from."""
    cores: float | None = None
    """Shared by all workers, those that Ray's own processes take not counted; None: a worker has
    its own core or GPU."""
    crowding: float = 1.0
    """How many times as long an episode takes when all cores are busy (shared memory, caches)."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where checkpoints go."""

    latency: float = 0.0
    """Of a checkpoint, s."""
    rate: float = math.inf
    """Bytes/s, the hash of the weights included."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Ray's scheduling: of a run, not of a step."""

    seconds: float = 0.0
    per_worker: float = 0.0


@dataclass(frozen=True, kw_only=True)
class System:
    """All that a job runs on."""

    machine: Machine
    network: Network
    storage: Storage = Storage()
    start: Start = Start()


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the seconds of an outer step go, as a mean over the run, and what it takes."""

    workers: int
    meta_batch: int
    reduction: Reduction
    parts: dict[str, float]
    """Seconds by what they are for; they add up to the step."""
    sent: float
    """Bytes to other workers, of the worker with most episodes; as many are received."""
    memory: int
    """Bytes of gradients and of the exchange's buffers, of that worker."""
    efficiency: float = math.nan
    """Episodes/s of a worker by those of a lone one; `predict` says of which."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def episodes_per_second(self) -> float:
        """Of all workers together."""
        return self.meta_batch / self.seconds

    @property
    def bottleneck(self) -> str:
        """What takes most of the step."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def largest_loss(self) -> str:
        """What takes most of the step but the episodes themselves; nothing: all is theirs."""
        names = list(self.parts)[1:]
        name = max(names, key=lambda name: self.parts[name])
        return name if self.parts[name] > 0 else "nothing"


def predict(
    system: System, job: Job, workers: int, *, reduction: Reduction = "slices", weak: bool = False
) -> Step:
    """Predict an outer step, and how efficient the workers are.

    Args:
        system: what it runs on.
        job: what is trained.
        workers: W.
        reduction: how gradients are added up.
        weak: compare with a lone worker that has the largest share of the meta-batch, not with one
            that has all of it.
    """
    step = _outer_step(system, job, workers, reduction)
    alone = max(share_sizes(job.meta_batch, workers, job.chunk)) if weak else job.meta_batch
    lone = _outer_step(system, replace(job, meta_batch=alone), 1, reduction)
    return replace(step, efficiency=step.episodes_per_second / (workers * lone.episodes_per_second))


def _outer_step(system: System, job: Job, workers: int, reduction: Reduction) -> Step:
    machine, sizes = system.machine, share_sizes(job.meta_batch, workers, job.chunk)
    most = max(sizes)
    busy = machine.episode_seconds * makespan(sizes, machine.cores, machine.crowding)
    ideal = min(busy, machine.episode_seconds * _ideal(job.meta_batch, workers, machine))
    slowest = expected_slowest(sizes.count(most), most, machine.spread)
    traded = exchange(
        reduction,
        system.network,
        workers=workers,
        rows=most,
        meta_batch=job.meta_batch,
        num_params=job.num_params,
        chunk=job.chunk,
    )
    crowd = max(1.0, workers / machine.cores) if machine.cores else 1.0
    outcome = FLOAT * most * job.outcome_width
    meeting = system.network.seconds("all_gather", workers, outcome) if workers > 1 else 0.0
    checkpoint_bytes = FLOAT * job.checkpoint_floats * job.num_params
    checkpoint = system.storage.latency + checkpoint_bytes / system.storage.rate
    start = system.start.seconds + workers * system.start.per_worker
    parts = {
        machine.bound: ideal,
        "uneven shares": busy - ideal,
        "waiting for the slowest": busy * (slowest - 1),
        "exchange": crowd * (traded.seconds + meeting),
        "adding": crowd * TOUCHED * traded.added / machine.add_rate,
        "fixed": crowd * machine.step_seconds,
        "checkpoints": checkpoint / job.checkpoint_every,
    }
    parts["data stream"] = max(0.0, most * machine.stream_seconds - sum(parts.values()))
    parts["start"] = start / job.num_steps
    return Step(
        workers=workers,
        meta_batch=job.meta_batch,
        reduction=reduction,
        parts=parts,
        sent=traded.sent + (workers - 1) * outcome,
        memory=traded.memory,
    )


def makespan(sizes: Sequence[int], cores: float | None, crowding: float = 1.0) -> float:
    """Return when the last share is done, in episodes of a lone worker.

    Workers that are at work share the cores evenly; each that is done leaves its part to others.
    """
    if cores is None:
        return float(max(sizes))
    time, done = 0.0, 0
    for number, size in enumerate(sorted(sizes)):
        time += (size - done) / _rate(len(sizes) - number, cores, crowding)
        done = size
    return time


def _rate(workers: int, cores: float, crowding: float) -> float:
    """Return the speed of each of so many workers at once; a lone one's is 1."""
    full = math.ceil(cores)
    crowded = min(1.0, (workers - 1) / (full - 1)) if full > 1 else 0.0
    return min(1.0, cores / workers) / (1 + (crowding - 1) * crowded)


def _ideal(meta_batch: int, workers: int, machine: Machine) -> float:
    """Return the episodes of a lone worker's time, if shares could be even to the fraction."""
    rate = 1.0 if machine.cores is None else _rate(workers, machine.cores, machine.crowding)
    return meta_batch / workers / rate
