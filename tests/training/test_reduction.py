"""Shares cover the meta-batch, and sums have one order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raymaml.training.reduction import flatten, mean_in_order, share, share_sizes, unflatten


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize("chunk", [1, 2, 3, 10])
def test_shares_cover_the_range_once_in_order(count: int, world_size: int, chunk: int) -> None:
    shares = [share(count, rank, world_size, chunk) for rank in range(world_size)]
    assert [index for part in shares for index in part] == list(range(count))
    assert all(part.start % chunk == 0 for part in shares if part)
    sizes = [len(part) for part in shares]
    assert share_sizes(count, world_size, chunk) == sizes
    chunks = [-(-size // chunk) for size in sizes]
    assert chunks == sorted(chunks, reverse=True)  # the first ones get the excess
    assert chunks[0] - chunks[-1] <= 1


def test_shares_by_hand() -> None:
    assert [share(8, rank, 3) for rank in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert [share(7, rank, 3, 2) for rank in range(3)] == [range(4), range(4, 6), range(6, 7)]


def test_a_mean_adds_row_after_row() -> None:
    # in float32: 1e8 + 1 = 1e8, so (1e8 + 1) - 1e8 is 0 while (1e8 - 1e8) + 1 is 1
    rows = torch.tensor([[1e8], [1.0], [-1e8]])
    assert mean_in_order(rows).item() == 0.0
    assert rows.tolist() == [[1e8], [1.0], [-1e8]]
    assert mean_in_order(rows[[0, 2, 1]]).item() == pytest.approx(1 / 3)
    assert torch.equal(mean_in_order(list(rows)), mean_in_order(rows))


def test_a_mean_of_many_rows_has_the_bits_of_one_addition_after_the_other() -> None:
    rows = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    total = np.float32(0)
    for value in rows.numpy()[:, 0]:
        total = np.float32(total + value)
    assert mean_in_order(rows).item() == float(total / np.float32(1000))
    assert rows.mean(0).item() != mean_in_order(rows).item()  # torch's own order is another


def test_flatten_and_unflatten_are_inverse() -> None:
    params = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7.0), "c": torch.ones(1, 2, 2)}
    vector = flatten(params)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7, 1, 1, 1, 1]  # in the order of the dictionary
    back = unflatten(vector, params)
    assert list(back) == ["b", "a", "c"]
    assert all(torch.equal(back[name], params[name]) for name in params)
    of_two = unflatten(torch.stack([vector, vector + 1]), params)  # [E, P]: each [E, *shape]
    assert torch.equal(of_two["b"], torch.stack([params["b"], params["b"] + 1]))
    with pytest.raises(RuntimeError):
        unflatten(torch.zeros(5), {"a": torch.zeros(4)})
