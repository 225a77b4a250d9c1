"""Arrow tables: columns of uint8 tensors, which hold pixels, and pieces of wanted lengths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def tensor_type(shape: Sequence[int]) -> pa.DataType:
    """Return the type of a column whose entries are uint8 tensors of ``shape``."""
    return pa.fixed_shape_tensor(pa.uint8(), list(shape))


def tensor_column(tensors: NDArray[np.uint8]) -> pa.Array:
    """Return an array [n, ...] as a column of n tensors; a contiguous array is not copied."""
    # FixedShapeTensorArray.from_numpy_ndarray derives the order of the axes from their strides,
    # which axes of length one leave open.
    shape = tensors.shape[1:]
    flat = pa.array(np.ascontiguousarray(tensors).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(tensor_type(shape), storage)


def cut(tables: Iterator[pa.Table], counts: Iterable[int]) -> Iterator[pa.Table | None]:
    """Yield consecutive pieces of ``counts`` rows, across the tables; None for a count of 0.

    Raises:
        RuntimeError: the tables end before the counts do.
    """
    ahead: list[pa.Table] = []
    rows = 0
    for count in counts:
        while rows < count:
            table = next(tables, None)
            if table is None:
                raise RuntimeError(f"the stream ended with {rows} of {count} rows wanted")
            ahead.append(table)
            rows += len(table)
        if count == 0:
            yield None
            continue
        joined = ahead[0] if len(ahead) == 1 else pa.concat_tables(ahead)
        yield joined.slice(0, count)
        ahead, rows = [joined.slice(count)], rows - count
