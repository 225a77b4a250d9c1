"""The number of episodes at once: by a stand-in for the memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raymaml.config.inner import InnerConfig
from raymaml.config.schema import ClusterConfig
from raymaml.training.at_once import SHARE, AtOnce, judging_at_once

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Pretended:
    """A memory in which each episode takes 10 bytes, and more than ``room`` raise an error."""

    def __init__(self, free: int, room: int = 1_000) -> None:
        self.bytes, self.room, self.released = free, room, 0
        self.runs: list[list[int]] = []

    def free(self) -> int:
        return self.bytes

    def peak_of(self, call: Callable[[], list[int]]) -> tuple[list[int], int]:
        found = call()
        return found, 10 * len(found)

    def release(self) -> None:
        self.released += 1

    def compute(self, rows: range) -> list[int]:
        self.runs.append(list(rows))
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [100 + row for row in rows]


def lengths(at_once: AtOnce, memory: Pretended, count: int) -> list[int]:
    memory.runs.clear()
    assert list(at_once.apply(count, memory.compute)) == list(range(100, 100 + count))
    return [len(run) for run in memory.runs]


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [1] * 7), (3, [3, 3, 1]), (9, [7]), ("auto", [1] * 7)]
)
def test_a_given_number_cuts_at_its_multiples(number: int, expected: list[int]) -> None:
    """So that a worker's share computes the same episodes together as a lone process."""
    assert lengths(AtOnce(number, CPU), Pretended(0), 7) == expected


def test_memory_decides_after_two_episodes() -> None:
    """100 bytes, a share of 0.7 for them: 7 episodes of 10 bytes."""
    assert SHARE == 0.7
    memory = Pretended(100)
    at_once = AtOnce("auto", GPU, memory)
    assert lengths(at_once, memory, 1) == [1]  # one is computed another way: not measured
    assert lengths(at_once, memory, 16) == [2, 7, 7]
    assert lengths(at_once, memory, 16) == [6, 5, 5]  # not 7, 7, 2
    assert lengths(at_once, memory, 7) == [7]
    assert lengths(at_once, memory, 0) == []


def test_little_memory_means_one_by_one() -> None:
    memory = Pretended(1)
    assert lengths(AtOnce("auto", GPU, memory), memory, 4) == [2, 1, 1]


def test_out_of_memory_halves_until_it_fits() -> None:
    memory = Pretended(1000, room=9)
    at_once = AtOnce("auto", GPU, memory)
    assert lengths(at_once, memory, 34) == [2, 32, 16, 8, 8, 8, 8]
    assert memory.released == 2
    assert lengths(at_once, memory, 16) == [8, 8]


def test_the_measured_episodes_themselves_may_not_fit() -> None:
    memory = Pretended(1000, room=1)
    assert lengths(AtOnce("auto", GPU, memory), memory, 3) == [2, 1, 1, 1]


def test_one_episode_without_memory_and_other_errors_are_errors() -> None:
    memory = Pretended(1000, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        list(AtOnce("auto", GPU, memory).apply(3, memory.compute))
    assert [len(run) for run in memory.runs] == [2, 1]
    with pytest.raises(ZeroDivisionError):
        list(AtOnce("auto", GPU, memory).apply(3, lambda rows: [1 // 0 for _ in rows]))
    with pytest.raises(torch.OutOfMemoryError):  # a given number stays
        list(AtOnce(2, GPU, memory).apply(3, memory.compute))


def test_draws_of_an_episode_do_not_depend_on_others() -> None:
    cluster = ClusterConfig(episodes_per_chunk=4)
    memory = Pretended(0)
    assert lengths(judging_at_once(cluster, InnerConfig(), CPU), memory, 5) == [4, 1]
    drawing = InnerConfig(support_batch_size=2)
    assert lengths(judging_at_once(cluster, drawing, CPU), memory, 5) == [1] * 5
