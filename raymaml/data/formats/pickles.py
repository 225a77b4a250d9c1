"""Pickles of data, read without running anything that they ask for (contract 10).

A pickle is a program that asks for functions by name. ``find_class`` answers the few names that
arrays need with stand-ins of this file and refuses every other name before anything is imported. So
a pickle can build numpy arrays and scalars, lists, tuples, dicts, text, bytes and numbers.

Long bytes stay in the file as blobs (``spool.py``): a pickle of ten gigabytes takes memory for its
index alone, and a size that the file cannot have is an error before anything is allocated. Pickles
of protocol 0, and those that Python 3 writes with protocols 1 and 2, hold bytes as text, which is
read into memory. The text of Python 2's pickles is read as latin-1.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Callable
from functools import partial
from typing import IO, Any

import numpy as np

from raymaml.common.errors import UserError
from raymaml.data.formats.spool import Blob, StoredArray, whole

LAZY_BYTES = 256
"""Bytes of this length and more stay in the file."""
_DTYPE = re.compile(r"[<>|=]?([biu][1248]|f[248]|[SU]\d{1,6})")


def load_pickle(name: str, blob: Blob) -> Any:
    """Read the pickle in ``blob``; arrays come as ``StoredArray``, other long bytes as ``Blob``.

    Raises:
        UserError: naming the file (``name``): the pickle asks for anything but data, is torn, or is
            none.
    """
    with whole(name, "pickle of data"), blob.stream() as stream:
        try:
            return _Unpickler(_Source(stream, blob)).load()
        except _RefusedError as refused:
            raise UserError(
                f"{name}: its pickle asks for {str(refused)[:200]}, which could run code",
                remedy="only numpy arrays, lists, tuples, dicts, text and numbers are read: get"
                " the file from its publisher",
            ) from None


class _RefusedError(Exception):
    """A pickle asks for more than data."""


class _Source:
    """A pickle as the unpickler reads it: never beyond its end."""

    def __init__(self, stream: IO[bytes], blob: Blob) -> None:
        self._stream, self._blob = stream, blob

    def read(self, length: int) -> bytes:
        self._require(length)
        return self._stream.read(length)

    def readline(self) -> bytes:
        line = self._stream.readline()
        self._require(0 if line.endswith(b"\n") else 1)
        return line

    def take(self, length: int) -> bytes | Blob:
        """Read short bytes; note where long ones stand and skip them."""
        if length < LAZY_BYTES:
            return self.read(length)
        start = self._require(length)
        self._stream.seek(length, 1)
        return self._blob.part(start, length)

    def _require(self, length: int) -> int:
        """Return the current place; raises ``EOFError`` where too few bytes follow."""
        place = self._stream.tell() - self._blob.offset
        if not 0 <= length <= self._blob.length - place:
            raise EOFError("the file ends too early")
        return place


class _Dtype:
    """A dtype in the making: first its code, then, by BUILD, its byte order."""

    def __init__(self, code: str, _align: bool = False, _copy: bool = False) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"arrays of {code!r}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def fill(self, state: Any) -> None:
        _version, order, subdtype, names, *_sizes = state
        if subdtype is not None or names is not None:
            raise _RefusedError("structured arrays")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(StoredArray):
    """An array in the making: BUILD fills it."""

    __slots__ = ()

    def fill(self, state: Any) -> None:
        """Take version, shape, dtype, whether in Fortran's order, and the values."""
        *_version, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data
        length = raw.length if isinstance(raw, Blob) else len(raw)
        is_shape = all(isinstance(axis, int) and axis >= 0 for axis in shape)
        if not is_shape or length != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array {shape} of {dtype.dtype} cannot have {length} bytes")
        self.data, self.dtype, self.shape = raw, dtype.dtype, tuple(shape)
        self.fortran = bool(fortran)


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.fill((shape, dtype, order == "F", data))
    return array


def _scalar(dtype: _Dtype, data: str | bytes) -> np.generic:
    raw = data.encode("latin1") if isinstance(data, str) else data
    (value,) = np.frombuffer(raw, dtype.dtype)
    return value  # type: ignore[no-any-return]


def _encode(text: str, encoding: str) -> bytes:
    """Undo how Python 3 writes bytes with protocols 1 and 2."""
    if encoding not in {"latin1", "latin-1"}:
        raise _RefusedError(f"the encoding {encoding}")
    return text.encode("latin1")


class _Dict(dict[Any, Any]):
    """A dict of plain keys: the hash of nested tuples may never end."""

    def __setitem__(self, key: object, value: object) -> None:
        if not isinstance(key, str | bytes | int | float | np.generic):
            raise _RefusedError(f"a {type(key).__name__} as a key")
        super().__setitem__(key, value)


_NAMES: dict[str, Any] = {
    "numpy.ndarray": "<numpy.ndarray>",  # arrays name the class, and nothing uses it
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
    # how Python 3 writes b"" with protocol 2; an argument could fill the memory
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), lambda: b""),
}


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python; some of its opcodes are replaced below."""

    def __init__(self, source: _Source) -> None:
        super().__init__(source, encoding="latin1")
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; numpy 1 and 2 call the same module differently."""
        try:
            return _NAMES[f"{module.replace('numpy._core', 'numpy.core')}.{name}"]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _take(unpickler: Any, layout: str) -> None:
    """Push bytes that follow their length, whose layout is as ``struct`` spells it."""
    (length,) = struct.unpack(layout, unpickler.read(struct.calcsize(layout)))
    unpickler.append(unpickler.source.take(length))


def _make_dict(unpickler: Any) -> None:
    if unpickler.pop_mark():
        raise ValueError("a dict that begins with items, which no pickler writes")
    unpickler.append(_Dict())


def _build(unpickler: Any) -> None:
    """Fill an array or a dtype; the attributes of a function could change it."""
    state, target = unpickler.stack.pop(), unpickler.stack[-1]
    if not isinstance(target, _Array | _Dtype):
        raise _RefusedError(f"a change of {type(target).__name__}")
    target.fill(state)


def _refuse(_unpickler: object) -> None:
    """Refuse objects of classes, and sets, whose hashes may never end."""
    raise _RefusedError("objects that are no data")


_OBJECTS = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS),
)
_LONG = {
    **{pickle.BINSTRING: "<i", pickle.BINBYTES: "<I"},
    **{pickle.BINBYTES8: "<Q", pickle.BYTEARRAY8: "<Q"},
}
_OPCODES: dict[bytes, Callable[[Any], None]] = {
    **dict.fromkeys(_OBJECTS, _refuse),
    **{code: partial(_take, layout=layout) for code, layout in _LONG.items()},
    pickle.BUILD: _build,
    pickle.DICT: _make_dict,
    pickle.EMPTY_DICT: lambda unpickler: unpickler.append(_Dict()),
    pickle.FRAME: lambda unpickler: unpickler.read(8),  # groups opcodes; offsets are the file's
}
_Unpickler.dispatch = pickle._Unpickler.dispatch | {c[0]: run for c, run in _OPCODES.items()}
