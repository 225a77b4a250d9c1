"""Pickles of data, read without running anything that they ask for (contract 10).

A pickle is a program. Here it may build numpy arrays and scalars, lists, tuples, dicts, text,
bytes and numbers, and nothing else: every other name it asks for is refused before anything is
imported, and no name ever leads to a function but this file's own. The base class (the standard
library's own unpickler in Python) keeps the meaning of the opcodes; those listed are all it runs.

Large values are not loaded. They stay in the file as blobs (``stored.py``), so that a pickle of
ten gigabytes costs no memory but for its index, and a size that the file cannot have is an error
before anything is allocated. An exception are pickles of protocol 0, which are text.

Python 2's pickles are read with text as latin-1, as ``encoding="latin1"`` does.
"""

from __future__ import annotations

import codecs
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from raymaml.common.errors import UserError, reason_of
from raymaml.data.importers.stored import CHUNK, Blob, Scratch, ScratchFile, StoredArray, is_shape

LAZY_BYTES = 256
"""Values of this length and more stay in the file."""
_DTYPE = re.compile(r"[<>|=]?([biu][1248]|f[248]|[SU]\d{1,6})")


def load_pickle(name: str, blob: Blob, scratch: Scratch) -> Any:
    """Read the pickle in ``blob``; arrays come as ``StoredArray``, other large values as ``Blob``.

    Raises:
        UserError: naming the file (``name``) and what it asks for that is refused; or the file is
            torn or no pickle.
    """
    try:
        with blob.file.stream() as stream:
            stream.seek(blob.offset)
            return _Unpickler(stream, blob, scratch).load()
    except _RefusedError as refused:
        raise UserError(
            f"{name}: its pickle asks for {str(refused)[:200]}, which could run code; only numpy"
            " arrays, lists, tuples, dicts, text and numbers are read: get the file from its"
            " publisher"
        ) from None
    except UserError:
        raise
    except Exception as error:  # the base class has no list of what it raises on damage
        raise UserError(
            f"{name}: is not a whole pickle of data ({reason_of(error)[:200]}); get the file again"
        ) from None


class _RefusedError(Exception):
    """A pickle asks for more than data."""


class _Text(Blob):
    """A blob of UTF-8: how Python 3 writes bytes with protocol 2, through ``_codecs.encode``."""


class _Dtype:
    """A dtype in the making: first its code, then, by BUILD, its byte order."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"arrays of {code!r}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def build(self, state: Any) -> None:
        _version, order, subdtype, names, *_sizes = state
        if subdtype is not None or names is not None:
            raise _RefusedError("structured arrays")
        self.dtype = self.dtype.newbyteorder(order)


_NDARRAY = "<numpy.ndarray>"
"""Stands for the class, which arrays name and nothing uses."""


class _Unpickler(pickle._Unpickler):
    append: Callable[[object], None]  # the base class binds it to the stack in use
    read: Callable[[int], bytes]

    def __init__(self, stream: IO[bytes], blob: Blob, scratch: Scratch) -> None:
        super().__init__(stream, encoding="latin1")
        self._stream, self._blob, self._scratch = stream, blob, scratch
        self._unpacked: ScratchFile | None = None
        self._globals: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): lambda code, _align=False, _copy=False: _Dtype(code),
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: StoredArray(),
            ("numpy.core.multiarray", "scalar"): _scalar,
            ("numpy.core.numeric", "_frombuffer"): _from_buffer,
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytes"): _no_bytes,
            ("__builtin__", "bytes"): _no_bytes,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Give the stand-in for a name; numpy 1 and 2 call the same module differently."""
        try:
            return self._globals[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: data has no outside objects."""
        raise _RefusedError("an object outside the file")

    def number(self, layout: str) -> int:
        """Read a number, as ``struct`` spells its layout."""
        (value,) = struct.unpack(layout, self.read(struct.calcsize(layout)))
        if not 0 <= value <= self._blob.length:
            raise EOFError(f"a length of {value} in a file of {self._blob.length} bytes")
        return int(value)

    def take(self, length: int, kind: type[Blob] = Blob) -> bytes | Blob:
        """Read a short value; of a long one, note where it stands and go on behind it."""
        offset = self._stream.tell()
        if offset + length > self._blob.offset + self._blob.length:
            raise EOFError("the file ends too early")
        if length < LAZY_BYTES:
            return self.read(length)
        self._stream.seek(offset + length)
        return kind(self._blob.file, offset, length)

    def _encode(self, text: str | _Text, encoding: str = "latin1") -> bytes | Blob:
        if encoding not in {"latin1", "latin-1"}:
            raise _RefusedError(f"the encoding {encoding}")
        if isinstance(text, _Text):
            self._unpacked = self._unpacked or self._scratch.new_file()
            return self._unpacked.append(_latin1(text))
        return text.encode("latin1")


def _latin1(text: _Text) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, text.length, CHUNK):
        length = min(CHUNK, text.length - start)
        yield decoder.decode(text.file.read(text.offset + start, length)).encode("latin1")


def _no_bytes() -> bytes:
    """Python 3 writes ``bytes()`` so with protocol 2; with an argument it could fill the memory."""
    return b""


def _scalar(dtype: _Dtype, data: str | bytes) -> np.generic:
    raw = data.encode("latin1") if isinstance(data, str) else data
    (value,) = np.frombuffer(raw, dtype.dtype)
    assert isinstance(value, np.generic)
    return value


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> StoredArray:
    array = StoredArray()
    _fill(array, (1, shape, dtype, order == "F", data))
    return array


def _fill(array: StoredArray, state: Any) -> None:
    """Give an array its content: version, shape, dtype, whether in Fortran's order, bytes."""
    *_version, shape, dtype, fortran, data = state
    raw = data.encode("latin1") if isinstance(data, str) else data
    length = raw.length if isinstance(raw, Blob) else len(raw)
    if not is_shape(shape) or length != math.prod(shape) * dtype.dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype.dtype} cannot have {length} bytes")
    array.data, array.dtype, array.shape = raw, dtype.dtype, tuple(shape)
    array.fortran = bool(fortran)


# Opcodes: those whose meaning in the base class is plain data, and those given another one below


def _build(unpickler: Any) -> None:
    state, target = unpickler.stack.pop(), unpickler.stack[-1]
    if isinstance(target, StoredArray):
        _fill(target, state)
    elif isinstance(target, _Dtype):
        target.build(state)
    else:
        raise _RefusedError(f"a change of {type(target).__name__}")


def _name(unpickler: Any) -> Any:
    lines = [unpickler.readline(), unpickler.readline()]
    if not lines[1].endswith(b"\n"):
        raise EOFError("the file ends too early")
    module, name = (line[:-1].decode("utf-8", "replace") for line in lines)
    return unpickler.find_class(module, name)


def _instance(unpickler: Any) -> None:
    raise _RefusedError(f"an instance of {_name(unpickler)}")


def _set_items(unpickler: Any, pairs: list[Any]) -> None:
    target = unpickler.stack[-1]
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str | bytes | int | float | np.generic):
            raise _RefusedError(f"a {type(key).__name__} as a key")  # hashing it may take for ever
        target[key] = value


def _set_item(unpickler: Any) -> None:
    value, key = unpickler.stack.pop(), unpickler.stack.pop()
    _set_items(unpickler, [key, value])


def _make_dict(unpickler: Any) -> None:
    pairs = unpickler.pop_mark()
    unpickler.append({})
    _set_items(unpickler, pairs)


def _lazy_bytes(layout: str) -> Callable[[Any], None]:
    return lambda unpickler: unpickler.append(unpickler.take(unpickler.number(layout)))


def _lazy_text(unpickler: Any, layout: str) -> None:
    value = unpickler.take(unpickler.number(layout), _Text)
    unpickler.append(value.decode("utf-8") if isinstance(value, bytes) else value)


def _python2_string(unpickler: Any) -> None:
    value = unpickler.take(unpickler.number("<i"))
    unpickler.append(value.decode("latin1") if isinstance(value, bytes) else value)


def _frame(unpickler: Any) -> None:
    unpickler.read(8)  # frames only group the opcodes; without them offsets are the file's


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        if opcode not in pickle._Unpickler.dispatch:
            raise ValueError(f"{bytes([opcode])!r} is no opcode")
        raise _RefusedError(f"the opcode {bytes([opcode])!r}")


_PLAIN = (
    *("PROTO", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "SHORT_BINSTRING", "SHORT_BINBYTES", "UNICODE", "SHORT_BINUNICODE"),
    *("TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET"),
    *("LONG_BINGET", "STACK_GLOBAL", "REDUCE"),
)
_CODES = {name: getattr(pickle, name)[0] for name in _PLAIN}
_Unpickler.dispatch = _Opcodes(
    {code: pickle._Unpickler.dispatch[code] for code in _CODES.values()}
    | {
        pickle.BUILD[0]: _build,
        pickle.GLOBAL[0]: lambda unpickler: unpickler.append(_name(unpickler)),
        pickle.INST[0]: _instance,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: lambda unpickler: _set_items(unpickler, unpickler.pop_mark()),
        pickle.DICT[0]: _make_dict,
        pickle.BINBYTES[0]: _lazy_bytes("<I"),
        pickle.BINBYTES8[0]: _lazy_bytes("<Q"),
        pickle.BYTEARRAY8[0]: _lazy_bytes("<Q"),
        pickle.BINSTRING[0]: _python2_string,
        pickle.BINUNICODE[0]: lambda unpickler: _lazy_text(unpickler, "<I"),
        pickle.BINUNICODE8[0]: lambda unpickler: _lazy_text(unpickler, "<Q"),
        pickle.FRAME[0]: _frame,
    }
)
