"""A process that measures: ``python -m raymaml.bench.scaling.probes FOLDER RANK``.

Several of them measure together, as gloo's workers: what is in ``FOLDER/spec.json``; rank 0 writes
``FOLDER/result.json``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from raymaml.bench.cases import image_shape, made_up_episode
from raymaml.bench.probes import AtenCalls
from raymaml.bench.scaling.fit import Timing
from raymaml.bench.scaling.network import FLOAT, TOUCHED, Collective
from raymaml.config.load import check_config
from raymaml.config.schema import Config
from raymaml.meta.gradients import EpisodeGradient
from raymaml.meta.learner import MetaLearner
from raymaml.training.checkpoint import write_checkpoint
from raymaml.training.loop import meta_step
from raymaml.training.process import prepare_process
from raymaml.training.reduction import mean_in_order
from raymaml.training.session import LocalSession
from raymaml.training.state import TrainState, build_learner, build_state
from raymaml.types import Buffers, EpisodeBatch, Params

CPU = torch.device("cpu")
_STEPS = 7


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the processes measure."""

    workers: int
    """Processes, of which all groups from two on are tried."""
    cores: int
    """Processes that compute at once when all cores are to be busy."""
    configs: list[dict[str, Any]]
    """Whose episodes, steps and checkpoints are timed."""
    episodes: int
    """Timed of each config."""
    sizes: tuple[int, ...]
    """Bytes that a worker hands to a collective."""
    repeats: int
    """Of each collective."""


def main(folder: Path, rank: int) -> None:
    """Measure with the other ranks."""
    spec = Spec(**json.loads((folder / "spec.json").read_text(encoding="utf-8")))
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=spec.workers)
    configs = [check_config(tree, "scale") for tree in spec.configs]
    prepare_process(configs[0].cluster, CPU)
    costs = [_costs(config, spec, rank) for config in configs]
    collectives = time_collectives(spec, rank)
    if rank == 0:
        found = {
            "costs": costs,
            "collectives": [asdict(timing) for timing in collectives],
            "add_rate": add_rate(),
        }
        (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _costs(config: Config, spec: Spec, rank: int) -> dict[str, Any]:
    """Time episodes by one process, and by as many as there are cores; rank 0 times the rest."""
    work = _episode(config) if rank < spec.cores else lambda: None
    work()
    dist.barrier()
    alone = [seconds_of(work) for _ in range(spec.episodes)] if rank == 0 else []
    dist.barrier()
    crowded = [seconds_of(work) for _ in range(spec.episodes)]
    if rank != 0:
        return {}
    shape = image_shape(config)
    state = build_state(config, shape, CPU)
    calls, step = step_costs(config, state)
    size, seconds = checkpoint_costs(config, state)
    return {
        "alone": alone,
        "crowded": crowded,
        "step_calls": calls,
        "step_seconds": step,
        "checkpoint_bytes": size,
        "checkpoint_seconds": seconds,
        "num_params": state.num_params,
        "outcome_width": 3 + sum(m.numel() for m in state.learner.running_moments.values()),
    }


def _episode(config: Config) -> Callable[[], object]:
    learner = build_learner(config, image_shape(config), config.episodes.train.num_ways, CPU)
    episode = made_up_episode(config, "training", CPU, torch.float32)
    return lambda: learner.episode_gradient(episode)


def seconds_of(work: Callable[[], object]) -> float:
    """Time ``work``."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class GivenGradient:
    """Stands for a meta-learner whose episodes take no time: what is left of a step is its own."""

    def __init__(self, learner: MetaLearner, episode: EpisodeBatch) -> None:
        self.params: Params = learner.params
        self.running_moments: Buffers = learner.running_moments
        _, queries = episode.query_y.shape
        self._result = EpisodeGradient(
            loss=torch.zeros(()),
            logits=torch.zeros(queries, int(episode.query_y.max()) + 1),
            grads={name: torch.zeros_like(value) for name, value in self.params.items()},
            buffers=self.running_moments,
        )

    def chunk_gradients(self, _episodes: EpisodeBatch) -> list[EpisodeGradient]:
        """Return what is there."""
        return [self._result]

    def absorb(self, _episodes: list[Buffers]) -> None:
        """Leave the moments as they are."""


def step_costs(config: Config, state: TrainState) -> tuple[int, float]:
    """Return operators, and the median of the seconds, of an outer step beside its episode."""
    step = _bare_step(config, state)
    calls = _calls(step)
    return calls, statistics.median(seconds_of(step) for _ in range(_STEPS))


def step_calls(config: Config) -> int:
    """Return the operators alone, for a config that is not timed here."""
    return _calls(_bare_step(config, build_state(config, image_shape(config), CPU)))


def _calls(step: Callable[[], None]) -> int:
    step()  # the first one makes the optimizer's state
    with AtenCalls() as calls:
        step()
    return int(calls.count)


def _bare_step(config: Config, state: TrainState) -> Callable[[], None]:
    config = config.model_copy(update={"outer": config.outer.model_copy(update=_ONE_EPISODE)})
    episode = made_up_episode(config, "training", CPU, torch.float32)
    batch = EpisodeBatch(
        support_x=episode.support_x[None],
        support_y=episode.support_y[None],
        query_x=episode.query_x[None],
        query_y=episode.query_y[None],
    )
    given = TrainState(cast(MetaLearner, GivenGradient(state.learner, batch)), state.optimizer)
    session = LocalSession(cast(Any, None), CPU)  # reads nothing

    def step() -> None:
        meta_step(given, batch, config, session)

    return step


_ONE_EPISODE = {"meta_batch_size": 1, "schedule": "constant", "milestones": (), "warmup_steps": 0}


def checkpoint_costs(config: Config, state: TrainState) -> tuple[int, float]:
    """Return bytes, and the median of the seconds, of a checkpoint with the hash of the weights."""
    seconds, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            path = Path(folder) / f"checkpoint_{number:08d}"
            start = time.perf_counter()
            state.digest()
            write_checkpoint(
                path, state, config, image_shape=image_shape(config), bank_hash="made up"
            )
            seconds.append(time.perf_counter() - start)
            size = sum(file.stat().st_size for file in path.iterdir())
    return size, statistics.median(seconds)


def add_rate(num_params: int = 1 << 22) -> float:
    """Return the bytes/s at which rows are added up: of 10 rows without what 2 take.

    Of the least seconds of each: a difference of two that are disturbed says nothing.
    """
    rows = torch.randn(10, num_params)

    def least(count: int) -> float:
        return min(seconds_of(lambda: mean_in_order(rows[:count])) for _ in range(9))

    least(2)
    seconds = max(least(10) - least(2), 1e-9)
    return TOUCHED * 8 * num_params / seconds


def time_collectives(spec: Spec, rank: int) -> list[Timing]:
    """Time all collectives of the exact reduction, and all-reduce, in groups of 2, 3, ..."""
    timings = []
    for workers in range(2, spec.workers + 1):
        group: Any = dist.new_group(list(range(workers)))
        for size in spec.sizes if rank < workers else ():
            for name, call in _collectives(workers, size // FLOAT, group).items():
                call()
                seconds = []
                for _ in range(spec.repeats):
                    dist.barrier(group)
                    seconds.append(seconds_of(call))
                timings.append(
                    Timing(
                        collective=name,
                        workers=workers,
                        size=size,
                        seconds=statistics.median(seconds),
                    )
                )
        dist.barrier()
    return timings


def _collectives(workers: int, floats: int, group: Any) -> dict[Collective, Callable[[], object]]:
    floats -= floats % workers
    given, taken = torch.zeros(floats), torch.zeros(floats)
    gathered: Tensor = torch.zeros(workers * floats)
    return {
        "all_to_all": lambda: dist.all_to_all_single(taken, given, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, given, group=group),
        "all_reduce": lambda: dist.all_reduce(given, group=group),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
