"""Ray Data delivers each worker the very episodes that a lone process reads for it."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from raymaml.cluster.workers import WORKER_CPUS
from raymaml.data.shards import Sampling
from raymaml.training.data import open_training_data
from raymaml.types import EpisodeBatch, tensors_of

pytestmark = pytest.mark.ray

STEPS = 7  # of 4 episodes each: 28 of 24, so that the stream goes round again


@pytest.fixture(scope="module")
def workers(cluster):
    """Three processes that hold as much of the cluster as training workers do."""
    import ray

    @ray.remote(num_cpus=WORKER_CPUS)
    class Worker:
        def open(self, config, rows_at_once, pixels_at_once):
            """Open the data; a reading task returns at most so many rows, or bytes of pixels."""
            from raymaml.cluster import stream

            stream.ROWS_AT_ONCE = rows_at_once
            stream.PIXELS_AT_ONCE = pixels_at_once
            self.data = open_training_data(config, torch.device("cpu"))

        def stream(self, rank, world_size, first_step, num_steps, take):
            """Return the first ``take`` meta-batches of a share, then end the stream."""
            from raymaml.cluster.stream import stream_meta_batches

            steps = range(first_step, num_steps)
            batches = stream_meta_batches(self.data, steps, rank, world_size)
            taken = list(islice(batches, take))
            batches.close()
            return taken

    members = [Worker.remote() for _ in range(3)]
    yield members
    for member in members:
        ray.kill(member)


def stream(workers, config, *, world_size, first_step=0, take=STEPS, at_once=(6, 4000)):
    """Let one worker per rank stream, all at once."""
    import ray

    ranks = workers[:world_size]
    ray.get([worker.open.remote(config, *at_once) for worker in ranks])
    return ray.get(
        [
            worker.stream.remote(rank, world_size, first_step, STEPS, take)
            for rank, worker in enumerate(ranks)
        ]
    )


def read(config, *, rank=0, world_size=1, first_step=0, take=STEPS):
    data = open_training_data(config, torch.device("cpu"))
    batches = data.meta_batches(first_step, rank, world_size)
    taken = list(islice(batches, take))
    batches.close()
    return taken


def assert_same(found: list[EpisodeBatch], expected: list[EpisodeBatch]) -> None:
    assert [len(batch) for batch in found] == [len(batch) for batch in expected]
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name, tensor in tensors_of(one).items():
            assert torch.equal(tensor, vars(other)[name]), (step, name)


# Shares of 4: [4], [2, 2], [2, 1, 1]; of 1: [1, 0]. A task reads 6 rows or 4000 bytes (an episode
# of 9 images of 256 pixels is 2304): several steps of some, less than a step of others.
# Seed 3 starts with episode 5. Step 4 begins with 21 and ends with 24 = 0: a new round; before
# step 7 all is done.
@pytest.mark.parametrize(
    ("world_size", "overrides", "first_step"),
    [
        *((world_size, ("outer.meta_batch_size=4",), 0) for world_size in (1, 2, 3)),
        *((each, ("outer.meta_batch_size=4", "data.materialize=true"), 0) for each in (1, 2, 3)),
        *((1, ("outer.meta_batch_size=4",), first_step) for first_step in (1, 4, 7)),
        (2, ("outer.meta_batch_size=1",), 0),
    ],
)
def test_each_rank_gets_its_share_from_any_step_on(
    workers, make_config, world_size, overrides, first_step
):
    config = make_config("run", *overrides)

    found = stream(workers, config, world_size=world_size, first_step=first_step)

    for rank, batches in enumerate(found):
        assert_same(batches, read(config, rank=rank, world_size=world_size)[first_step:])


def test_a_resumed_stream_reads_no_earlier_shard(workers, make_config, tiny_bank):
    """Shards of 5 episodes; steps 2 and 3 are episodes 5 + 8 to 5 + 15, so the shards 2 to 4."""
    import ray

    config = make_config("run", "outer.meta_batch_size=4")
    folder = config.data.shards / "train"
    shutil.rmtree(folder)
    spec, seed = config.episodes.train, config.episodes.seed
    Sampling(tiny_bank, spec, seed=seed, split="train", folder=folder).write(5)
    expected = read(config, first_step=2, take=2)
    worker = workers[0]
    ray.get(worker.open.remote(config, 4, 4000))  # a step a task
    for number in (0, 1):
        overwrite(folder / f"shard-{number:05d}.arrow")

    assert_same(ray.get(worker.stream.remote(0, 1, 2, 4, 2)), expected)

    with pytest.raises(ray.exceptions.RayTaskError):  # or this test would prove nothing
        ray.get(worker.stream.remote(0, 1, 0, 4, 2))


def test_a_stream_can_end_early_and_another_begin(workers, make_config):
    config = make_config("run", "outer.meta_batch_size=4")

    first = stream(workers, config, world_size=2, take=2)
    again = stream(workers, config, world_size=2)

    for rank in range(2):
        expected = read(config, rank=rank, world_size=2)
        assert_same(first[rank], expected[:2])
        assert_same(again[rank], expected)


def overwrite(path: Path) -> None:
    """Fill a file with zeros, keeping its size, which is all that a reading task checks."""
    path.write_bytes(bytes(path.stat().st_size))
