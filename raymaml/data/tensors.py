"""Columns of fixed-shape uint8 tensors: the one way pixels lie in Arrow files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def tensor_type(shape: Sequence[int]) -> pa.DataType:
    """Return the type of a column whose entries are uint8 tensors of ``shape``."""
    return pa.fixed_shape_tensor(pa.uint8(), list(shape))


def tensor_column(tensors: NDArray[np.uint8]) -> pa.Array:
    """Turn an array [n, ...] into a column of n tensors; no copy where it is contiguous."""
    # not FixedShapeTensorArray.from_numpy_ndarray: it reads a permutation of the axes out of the
    # strides, which axes of length one leave open
    shape = tensors.shape[1:]
    flat = pa.array(np.ascontiguousarray(tensors).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(tensor_type(shape), storage)
