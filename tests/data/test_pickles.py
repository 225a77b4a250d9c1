"""The restricted unpickler reads data of every protocol, and refuses what a pickle could run."""

from __future__ import annotations

import builtins
import codecs
import collections
import functools
import os
import pickle
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_imports import python2, read, read_bytes

from raymaml.common.errors import UserError
from raymaml.data.formats.spool import Blob, StoredArray

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
PLAIN = {
    "labels": [1, -2, 300, 70_000, 2**40],
    "names": {"n01": [0, 1], b"bytes": "text", 3: "\u00e4"},
    "rest": ((), (1.5, True, None), [], {}, b"", ""),
}
DATA = {
    "data": PIXELS,
    "few": np.arange(3),
    "swapped": np.arange(5, dtype=">i4"),
    "text": np.array(["ab", "c"]),
    "bytes": np.array([b"ab", b"c"]),
    "scalar": np.int64(-7),
    "real": np.float32(0.5),
    "empty": np.empty((0, 4), np.uint8),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_data_of_every_protocol_and_numpy_come_back_equal(
    tmp_path: Path, protocol: int, module: str
) -> None:
    data = pickle.dumps(DATA | {"plain": PLAIN}, protocol=protocol)
    assert b"numpy._core" in data  # numpy 2 wrote it
    if module == "numpy.core" and protocol < 4:  # where names have a length, the swap would not fit
        data = data.replace(b"numpy._core", b"numpy.core")
    loaded = read_bytes(tmp_path, data)
    assert loaded.pop("plain") == PLAIN
    for key, value in DATA.items():
        if isinstance(value, np.ndarray):
            assert isinstance(loaded[key], StoredArray)
            np.testing.assert_array_equal(loaded[key].read(), value)
            assert loaded[key].dtype == value.dtype
        else:
            assert loaded[key] == value
            assert type(loaded[key]) is type(value)


def test_pickles_of_python_2_come_back_as_text(tmp_path: Path) -> None:
    value = {"data": PIXELS, "labels": [5, 6], "names": {"n01": np.arange(40)}, "long": "x" * 300}
    loaded = read_bytes(tmp_path, python2(value))
    np.testing.assert_array_equal(loaded["data"].read(), PIXELS)
    np.testing.assert_array_equal(loaded["names"]["n01"].read(), np.arange(40))
    assert loaded["labels"] == [5, 6]
    assert isinstance(loaded["long"], Blob)
    assert loaded["long"].read() == b"x" * 300


def test_rows_are_read_in_any_order_and_twice(tmp_path: Path) -> None:
    rows = np.array([9, 0, 0, 4])
    for value in (PIXELS, np.asfortranarray(PIXELS), PIXELS[:, :1, :1]):
        array = read_bytes(tmp_path, pickle.dumps(value, protocol=2))
        np.testing.assert_array_equal(array.rows(rows), value[rows])


@pytest.mark.parametrize(
    "dump", [pickle.dumps, functools.partial(pickle.dumps, protocol=3), python2]
)
def test_large_arrays_stay_in_the_file(tmp_path: Path, dump: Any) -> None:
    size = 8 << 20
    value = {"data": np.zeros((8, size // 8), np.uint8), "list": [np.ones(10_000, np.uint8)] * 2}
    path = tmp_path / "large.pkl"
    path.write_bytes(dump(value))
    tracemalloc.start()
    try:
        loaded = read(path)
        row = loaded["data"].rows(np.array([3]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert row.shape == (1, size // 8)
    assert peak < size / 2  # one row of 1 MiB and its copy


class Asks:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "asks"),
    [
        (Asks(os.system, "touch ran"), "posix.system"),
        (Asks(eval, "open('ran', 'w')"), "eval"),
        (Asks(exec, "open('ran', 'w')"), "exec"),
        (Asks(getattr, "x", "upper"), "getattr"),
        (Asks(subprocess.Popen, "touch ran"), ".Popen"),
        (Asks(functools.partial, len), "functools.partial"),
        (Asks(codecs.decode, "x", "hex"), "_codecs.decode"),
        (Asks(np.load, "x"), "numpy"),
        (Asks(open, "ran", "w"), "open"),
        (Asks(bytearray, 1 << 40), "bytearray"),
        (builtins.__import__, "__import__"),
        (collections.Counter("a"), "collections.Counter"),
        (Path("x"), "Path"),
        (np.array([None]), "arrays of 'O8'"),
        (np.zeros(2, [("a", "i4")]), "arrays of 'V4'"),
        ({1, 2}, ""),
    ],
)
def test_whatever_could_run_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, asks: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read_bytes(tmp_path, pickle.dumps(value, protocol=protocol))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'file.pkl'}: its pickle asks for ")
    assert asks in problem
    assert "could run code" in problem
    assert not (tmp_path / "ran").exists()


def nested(*parts: str) -> bytes:
    """A name with dots, which protocol 4 follows attribute by attribute."""
    texts = (b"\x8c" + bytes([len(part)]) + part.encode() for part in parts)
    return b"\x80\x04" + b"".join(texts) + b"\x93."


OBJECTS = (
    *(b"(S'touch ran'\nios\nsystem\n", b"(inumpy\nndarray\n"),
    *(b"cnumpy\nndarray\n)\x81", b"cnumpy\nndarray\n)}\x92"),  # NEWOBJ, NEWOBJ_EX
    *(b"\x82\x01", b"Pname\n", b"NQ", b"\x97", b"\x8f"),  # EXT1, PERSID, BINPERSID, buffer, set
)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (nested("numpy", "ndarray.tofile"), "numpy.ndarray.tofile"),
        (nested("numpy.core.multiarray", "_reconstruct.__globals__"), "_reconstruct.__globals__"),
        *((b"\x80\x02" + code + b".", "objects that are no data") for code in OBJECTS),
        # BUILD on a function would change the program
        (b"\x80\x02c_codecs\nencode\n}U\x01aK\x01sb.", "a change of"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00utf7\x86R.", "utf7"),
        (b"\x80\x02}))s.", "a tuple as a key"),
    ],
)
def test_tricks_of_opcodes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read_bytes(tmp_path, data)
    assert says in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_torn_pickle_is_named_wherever_it_ends(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(DATA | PLAIN, protocol=protocol)
    for length in {0, 1, len(data) - 1, *range(0, len(data), 97)}:
        with pytest.raises(UserError, match=r"file\.pkl: is not a whole pickle of data .*again"):
            read_bytes(tmp_path, data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02T\xff\xff\xff\x7f.",  # a string of 2 GiB
        b"\x80\x02T\xff\xff\xff\xff.",  # of -1 bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",  # bytes of an exabyte
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        # an array of 2**40 bytes that holds 4
        python2(np.zeros(4, np.uint8)).replace(
            b"(J\x04\x00\x00\x00t", b"(\x8a\x06" + b"\0" * 5 + b"\x01t"
        ),
        b"no pickle at all",
        b"",
    ],
    ids=range(7),
)
def test_sizes_that_the_file_cannot_have_are_damage(tmp_path: Path, data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"file\.pkl: "):
            read_bytes(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
