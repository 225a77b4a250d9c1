"""This machine's part of the model: processes that measure together, and what they found."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raymaml.bench.measure import number_of_cores
from raymaml.bench.scaling.fit import Timing, fit_link, fit_storage
from raymaml.bench.scaling.model import Job, Machine, Storage, System
from raymaml.bench.scaling.network import Link, Network
from raymaml.bench.scaling.probes import Spec
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.training.process import MALLOC_ENVIRONMENT

_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one config, by one process of this machine."""

    alone: list[float]
    """Seconds of single episodes."""
    crowded: list[float]
    """The same while as many processes compute as there are cores."""
    step_calls: int
    """Operators of an outer step beside its episodes."""
    step_seconds: float
    """Of an outer step beside its episodes."""
    checkpoint_bytes: int
    checkpoint_seconds: float
    num_params: int
    """P."""
    outcome_width: int
    """Floats of an episode beside its gradient."""

    @property
    def episode_seconds(self) -> float:
        """Of a lone process."""
        return statistics.fmean(self.alone)

    @property
    def crowding(self) -> float:
        """How many times as long an episode takes when all cores are busy."""
        return max(1.0, statistics.fmean(self.crowded) / self.episode_seconds)

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of an episode's seconds."""
        return statistics.pstdev(map(math.log, self.alone))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What this machine was found to do."""

    cores: int
    costs: list[Costs]
    """Of each config."""
    timings: list[Timing]
    link: Link
    """Between two processes."""
    add_rate: float
    """Bytes/s when gradients are added up."""
    storage: Storage

    def system(self, costs: Costs, background: float) -> System:
        """Return this machine at work; Ray's own processes take ``background`` cores."""
        machine = Machine(
            episode_seconds=costs.episode_seconds,
            spread=costs.spread,
            step_seconds=costs.step_seconds,
            add_rate=self.add_rate,
            cores=max(self.cores - background, 0.5),
            crowding=costs.crowding,
        )
        network = Network(workers_per_node=1 << 30, inside=self.link, between=self.link)
        return System(machine=machine, network=network, storage=self.storage)


def job(config: Config, *, num_params: int, outcome_width: int) -> Job:
    """Return what ``config`` trains."""
    outer = config.outer
    floats = {"adam": 3, "adamw": 3, "rmsprop": 2 + bool(outer.momentum)}
    return Job(
        num_params=num_params,
        meta_batch=outer.meta_batch_size,
        num_steps=outer.num_steps,
        outcome_width=outcome_width,
        chunk=config.cluster.episodes_per_chunk,
        checkpoint_every=min(outer.validate_every, outer.checkpoint_every or outer.validate_every),
        checkpoint_floats=floats.get(outer.optimizer, 1 + bool(outer.momentum)),
    )


def measure(
    configs: Sequence[Config], *, workers: int, episodes: int, repeats: int = 15
) -> Measured:
    """Measure this machine with ``configs``.

    Args:
        configs: whose episodes, steps and checkpoints are timed; all on CPU.
        workers: processes of the largest collective, at least 2.
        episodes: timed of each config.
        repeats: of each collective.

    Raises:
        UserError: a process ended by itself.
    """
    cores = number_of_cores()
    spec = Spec(
        workers=max(workers, 2),
        cores=min(cores, max(workers, 2)),
        configs=[config.model_dump(mode="json") for config in configs],
        episodes=episodes,
        sizes=_SIZES,
        repeats=repeats,
    )
    found = _run(spec)
    timings = [Timing(**timing) for timing in found["collectives"]]
    costs = [Costs(**each) for each in found["costs"]]
    return Measured(
        cores=cores,
        costs=costs,
        timings=timings,
        link=fit_link(timings, cores),
        add_rate=found["add_rate"],
        storage=fit_storage(
            [each.checkpoint_bytes for each in costs], [each.checkpoint_seconds for each in costs]
        ),
    )


def _run(spec: Spec) -> dict[str, Any]:
    """Let the processes measure; all are ended before this returns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
        errors = [folder / f"{rank}.txt" for rank in range(spec.workers)]
        processes = [_start(folder, rank, path) for rank, path in enumerate(errors)]
        try:
            _wait(processes, errors)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def _start(folder: Path, rank: int, errors: Path) -> subprocess.Popen[bytes]:
    with errors.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "raymaml.bench.scaling.probes", str(folder), str(rank)],
            env=os.environ | MALLOC_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], errors: Sequence[Path]) -> None:
    """Wait until all are done; one that fails leaves the others waiting for it."""
    left = dict(zip(processes, errors, strict=True))
    while left:
        for process, path in list(left.items()):
            try:
                code = process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            if code != 0:
                lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"exit code {code}"
                raise UserError(f"a process that measures has ended by itself: {reason}")
            del left[process]
