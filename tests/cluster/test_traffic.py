"""The bytes that a worker sends in a step are those that `launch/README.md` counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import json, sys
import torch, torch.distributed as dist
from raymaml.cluster.session import RaySession
from raymaml.training.reduction import mean_in_order, share_sizes

rank, world, count, length = map(int, sys.argv[1:5])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[5]}", rank=rank, world_size=world)
sent = []
all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_into_tensor

def counted_all_to_all(output, input, output_splits, input_splits):
    sent.append((sum(input_splits) - input_splits[rank]) * input.element_size())
    return all_to_all(output, input, output_splits, input_splits)

def counted_all_gather(output, input):
    sent.append((world - 1) * input.numel() * input.element_size())  # once around the ring
    return all_gather(output, input)

dist.all_to_all_single, dist.all_gather_into_tensor = counted_all_to_all, counted_all_gather
session = object.__new__(RaySession)  # its reduction alone, without Ray
session.rank, session.world_size = rank, world
sizes = share_sizes(count, world)
whole = torch.randn(count, length, generator=torch.Generator().manual_seed(0))
rows, session.fast = whole.split(sizes)[rank], False
mean = session.mean(rows, sizes)
exact = torch.equal(mean, mean_in_order(whole))  # the bits of a lone worker
session.fast = True
fast = session.mean(rows, sizes)
print(json.dumps([sum(sent), exact, (fast - mean).abs().max().item(), fast.sum().item()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "count", "num_params"),
    [
        (3, 5, 999),  # shares of 2, 2 and 1 episodes
        (3, 3, 999),  # one episode a worker: as much as a ring all-reduce
    ],
)
def test_a_worker_sends_its_episodes_once_and_its_slice(
    world: int, count: int, num_params: int, tmp_path: Path
) -> None:
    numbers = [str(number) for number in (world, count, num_params)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *numbers, str(tmp_path / "store")],
            stdout=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    episodes = [count // world + (rank < count % world) for rank in range(world)]
    # (c + 1) P (W - 1) / W floats of 4 bytes
    expected = [(c + 1) * num_params * (world - 1) // world * 4 for c in episodes]
    sent, exact, errors, sums = zip(*outputs, strict=True)
    assert list(sent) == expected
    assert exact == (True,) * world
    # by one all-reduce, to the rounding of a sum of numbers of about 1
    assert max(errors) < count * 2.0**-23
    assert len(set(sums)) == 1  # equal on all workers
