"""Pickles as the data sets' authors wrote them: by Python 2, whose text is bytes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from raymaml.data.formats.pickles import load_pickle
from raymaml.data.formats.spool import open_blob


def python2(value: Any) -> bytes:
    """What Python 2's ``cPickle.dumps(value, protocol=2)`` means, with text as byte strings."""
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value: Any) -> bytes:  # noqa: PLR0911
    if isinstance(value, str | bytes):
        data = value.encode("latin1") if isinstance(value, str) else value
        if len(data) < 256:
            return b"U" + bytes([len(data)]) + data
        return b"T" + struct.pack("<i", len(data)) + data
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list | tuple):
        marks = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
        return marks[0] + b"".join(map(_encode, value)) + marks[1]
    if isinstance(value, dict):
        items = (_encode(key) + _encode(item) for key, item in value.items())
        return b"}(" + b"".join(items) + b"u"
    assert isinstance(value, np.ndarray), type(value)
    dtype = b"cnumpy\ndtype\n" + _encode((value.dtype.str[1:], 0, 1)) + b"R"
    order = value.dtype.str[0]
    dtype += _encode((3, order, None, None, None, -1, -1, 0)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _encode((0,))
    state = _encode(1) + _encode(value.shape) + dtype + b"\x89" + _encode(value.tobytes())
    return empty + _encode("b") + b"tR(" + state + b"tb"


def read(path: Path) -> Any:
    return load_pickle(str(path), open_blob(path))


def read_bytes(folder: Path, data: bytes) -> Any:
    path = folder / "file.pkl"
    path.write_bytes(data)
    return read(path)
