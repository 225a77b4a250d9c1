"""Hostile data sets: pickles, npz files, archives, lists and pictures, through the importers."""

from __future__ import annotations

import bz2
import gzip
import importlib.readers  # noqa: F401  (read with the package's own files; not of an input)
import io
import lzma
import os
import pickle
import pickletools
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import raw_png
from helpers_fuzz import NUMBERS, Fuzz, changed_bytes, hostile_values
from helpers_imports import member, pack, plan_source, python2, tar_of, zipped
from hypothesis import strategies as st
from PIL import Image, ImageCms

from raymaml.common.errors import gathered
from raymaml.data.formats import spool
from raymaml.data.importers.cifar import splits_of
from raymaml.data.importers.image_folder import _square
from raymaml.data.importers.images import decode_files, squared, squashed

SIZE = 8


class Bomb:
    """Pickles to a call."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, ("touch ../outside/pwned",)


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb of a megabyte is one here, so that thousands can go off."""
    monkeypatch.setattr(spool, "UNPACKED", 1 << 20)
    assert Image.init() or ImageCms  # loads Pillow's formats, which an import would later


def feed(
    fuzz: Fuzz,
    cases: st.SearchStrategy[Any],
    write: Callable[[Any], object],
    kind: str,
    size: int = SIZE,
    **changes: Any,
) -> None:
    """Have the importer of ``kind`` read each case, after the honest files that lie there."""
    if kind not in {"image-folder", "omniglot"}:
        changes["verify_counts"] = False

    def read(_: object) -> None:
        for planned in plan_source(kind, fuzz.place, size, **changes).classes:
            assert planned.load().dtype == np.uint8

    read(None)
    fuzz(cases, write, read)


# Pickles


def opcodes() -> st.SearchStrategy[bytes]:
    """Programs of a pickle: any opcodes, with arguments that are often too large."""
    numbers = st.sampled_from(NUMBERS).map(lambda number: struct.pack("<Q", number % 2**64))
    names = [b"os\nsystem\n", b"builtins\neval\n", b"numpy\ndtype\n", b"numpy\nndarray\n"]
    names += [b"numpy.core.multiarray\n_reconstruct\n", b"numpy.core.multiarray\nscalar\n"]
    names += [b"numpy.core.numeric\n_frombuffer\n", b"_codecs\nencode\n", b"\n\n", b"a.b\nc.d\n"]
    lines = st.sampled_from(names) | st.binary(max_size=6).map(lambda text: text + b"\n")
    # an argument is a line, or of a number of bytes, or that number in some bytes and then these
    widths = {-1: 0, -2: 1, -3: 4, -4: 4, -5: 8}
    plain, others = [], []
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin1")
        if opcode.arg is None:
            plain.append(code)
        elif opcode.arg.n == -1:
            others.append(lines.map(code.__add__))
        else:
            width = slice(widths.get(opcode.arg.n, opcode.arg.n))
            number = numbers.map(itemgetter(width))
            others.append(st.tuples(st.just(code), number, st.binary(max_size=6)).map(b"".join))
    one = st.sampled_from(plain) | st.one_of(others)
    return st.lists(one, max_size=25).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")


def laughs(depth: int) -> bytes:
    """A pickle of a list of ten lists of ten lists...: small, and endless to go through."""
    level: Any = [0] * 10
    for _ in range(depth):
        level = [level] * 10
    return pickle.dumps({"data": np.zeros((2, 4, 4, 3), np.uint8), "labels": level})


def itself() -> bytes:
    own: list[Any] = []
    own.append(own)
    return pickle.dumps(
        {"data": np.zeros((2, 4, 4, 3), np.uint8), "labels": own, "catname2label": own}
    )


ARRAYS: list[Any] = [
    np.zeros((2, 4, 4, 3), np.uint8),
    np.zeros((2, 0, 4, 3), np.uint8),
    np.zeros((0, 4, 4, 3), np.uint8),
    np.zeros((2, 4, 4, 3), np.float64),
    np.zeros((2, 300, 5, 3), np.uint8),
    np.zeros(300, "U3"),
    np.zeros(3, "S0"),
    np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)),
    *(np.array(3), np.array([1, 2]), np.array([2**63], np.uint64), np.array([True, False])),
]


def labelled(root: Path) -> st.SearchStrategy[bytes]:
    """Pickles of images and labels, of the two forms, with parts that are something else."""
    values = hostile_values(root) | st.sampled_from(ARRAYS)
    labels = st.sampled_from([[0, 1], [0, 0], (0, 1), [-1, 5], ["a", "b"], [2**70, 1], [[0], [1]]])
    either = labels | values
    names = st.dictionaries(st.text(max_size=4) | st.binary(max_size=4), either, max_size=3)
    first = st.fixed_dictionaries(
        {"data": values, "labels": either, "catname2label": names | values}
    )
    second = st.fixed_dictionaries({"image_data": values, "class_dict": names | values})
    honest = {"data": ARRAYS[0], "labels": [0, 1], "catname2label": {"a": 0, "b": 1}}
    cache = {"image_data": ARRAYS[0], "class_dict": {"a": [0], "b": [1]}}
    protocols = st.integers(0, 5)
    made = st.tuples(first | second | either, protocols).map(lambda pair: pickle.dumps(*pair))
    changed = st.tuples(st.sampled_from([honest, cache]), protocols).flatmap(
        lambda pair: changed_bytes(pickle.dumps(*pair))
    )
    old = st.sampled_from([honest, cache]).map(python2).flatmap(changed_bytes)
    tricks = st.sampled_from(
        [laughs(5), laughs(40), itself(), pickle.dumps(Bomb()), pickle.dumps(print)]
    )
    return st.one_of(made, changed, changed, old, opcodes(), opcodes(), tricks)


def test_pickles(fuzz: Fuzz) -> None:
    for split in ("train", "val", "test"):
        honest = pickle.dumps({"data": ARRAYS[0], "labels": [0, 1]})
        (fuzz.place / f"{split}.pickle").write_bytes(honest)
    feed(fuzz, labelled(fuzz.root), (fuzz.place / "test.pickle").write_bytes, "mini-imagenet")


# npz and the pickles beside it


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1", "replace") + b"\n"
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + data


HEADERS = [
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -48), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 4L, 4L, 3L), }",
    "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 4, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 0, 4611686018427387904, 3), }",
    "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (96,), }",
    "{'descr': '|S0', 'fortran_order': False, 'shape': (96,), }",
    "{'descr': 'x', 'fortran_order': 3, 'shape': 'y', }",
    "(" * 300,
    "__import__('os').system('touch ../outside/pwned')",
    "{" + "'a': {" * 90,
]


def npz_cases() -> st.SearchStrategy[bytes]:
    images = ARRAYS[0]
    honest = npz(images=images)
    header = st.sampled_from(HEADERS) | st.text(max_size=60)
    made = st.tuples(
        header,
        st.sampled_from([images.tobytes(), b"", b"x" * 1000]),
        st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]),
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
    ).map(lambda part: zipped({"images.npy": npy(*part[:3])}, part[3]))
    size = 2 << 20
    bomb = npy(
        HEADERS[0].replace("2, 4, 4, 3", f"{size // 48}, 4, 4, 3"), b"\0" * (size // 48 * 48)
    )
    bombs = [zipped({"images.npy": bomb}, method) for method in (8, 12, 14)]
    return st.one_of(
        changed_bytes(honest),
        changed_bytes(zipped({"images.npy": npy(HEADERS[0], images.tobytes())}, 8)),
        made,
        made,
        st.sampled_from(bombs),
    )


def test_npz(fuzz: Fuzz) -> None:
    for number, split in enumerate(("train", "val", "test")):
        images = npz(images=np.zeros((2 + number, 4, 4, 3), np.uint8))
        (fuzz.place / f"{split}_images.npz").write_bytes(images)
        labels = pickle.dumps({"labels": [0] * (1 + number) + [1]})
        (fuzz.place / f"{split}_labels.pkl").write_bytes(labels)
    honest = (fuzz.place / "train_labels.pkl").read_bytes()

    def write(case: tuple[bytes, bytes]) -> None:
        (fuzz.place / "train_images.npz").write_bytes(case[0])
        (fuzz.place / "train_labels.pkl").write_bytes(case[1])

    names = {"labels": [0, 1], "label_specific": [0, 1], "label_specific_str": ["a", "b"]}
    values = hostile_values(fuzz.root) | st.sampled_from(ARRAYS)
    pickles = st.fixed_dictionaries({key: st.just(value) | values for key, value in names.items()})
    others = st.one_of(
        pickles.map(pickle.dumps),
        labelled(fuzz.root),
        st.lists(values | st.binary(max_size=400), max_size=4).map(pickle.dumps),
    )
    whole = npz(images=ARRAYS[0])
    cases = npz_cases().map(lambda case: (case, honest)) | others.map(lambda case: (whole, case))
    feed(fuzz, cases, write, "tiered-imagenet")


# Archives


def cifar_members() -> dict[str, bytes]:
    part = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    contents = {
        "meta": {"fine_label_names": list(splits_of("cifar-fs"))},
        "train": part,
        "test": part,
    }
    return {f"cifar-100-python/{name}": pickle.dumps(own) for name, own in contents.items()}


def odd_names(root: Path) -> st.SearchStrategy[str]:
    out = ["../outside/new", "/etc/passwd", f"{root}/outside/new", "a/../../outside/new", "..", "."]
    odd = ["", "a\nb", "a" * 300, "\udcff", "C:\\x", "./././x", "é" * 90, "//x", "\x1b[2J"]
    odd += [f"cifar-100-python/{name}" for name in ("train", "../../x", "/meta")]
    return st.sampled_from(out + odd)


@st.composite
def tars(draw: st.DrawFn, root: Path, honest: dict[str, bytes]) -> bytes:
    members = [(member(name, len(data)), data) for name, data in honest.items()]
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from([bytes([code]) for code in b"01234567SxV"]))
        name, link = draw(odd_names(root)), draw(odd_names(root))
        size = draw(st.sampled_from([0, 5]))
        odd = member(name, size, type=kind, linkname=link, mode=0o7777)
        members.insert(draw(st.integers(0, len(members))), (odd, b"x" * size))
    format_ = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
    try:
        data = tar_of(members, format=format_)
    except ValueError:  # a name that the format cannot hold
        data = tar_of([(m, d) for m, d in members if m.name in honest])
    if draw(st.booleans()):
        data = _signed(draw(changed_bytes(data)))
    pack = draw(st.sampled_from([bytes, bytes, gzip.compress, bz2.compress, lzma.compress]))
    packed = pack(data)
    return draw(changed_bytes(packed)) if draw(st.integers(0, 4)) == 0 else packed


def _signed(data: bytes) -> bytes:
    """Give each header that begins at a block the checksum that it should have."""
    content = bytearray(data)
    for at in range(0, min(len(content), 1 << 14), 512):
        block = content[at : at + 512]
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % (sum(block) & 0o777777)
    return bytes(content)


def tar_tricks() -> list[bytes]:
    """Archives made by hand: headers that lead back, chains of headers, sparse files, bombs."""

    def header(name: str, size: bytes, kind: bytes) -> bytes:
        block = bytearray(member(name).tobuf(tarfile.GNU_FORMAT))
        block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
        return _signed(bytes(block))

    negative = b"\xff" * 11 + b"\xf0"
    back = b"\xff" * 8 + struct.pack(">i", -1024)
    pax = b"30 GNU.sparse.major=1\n" + b"30 size=-512\n"
    return [
        header("x", negative, b"0") + bytes(1024),
        header("x", back, b"0") * 3 + bytes(1024),
        header("x", b"%011o" % 2**33, b"0") + bytes(1024),
        b"".join(header("x", b"%011o" % 4, b"L") + b"name".ljust(512, b"\0") for _ in range(2000)),
        header("x", b"%011o" % len(pax), b"x") + pax.ljust(512, b"\0") + header("y", b"0", b"0"),
        header("x", b"%011o" % 0, b"S") + bytes(2048),
        *(pack(bytes(4 << 20)) for pack in (gzip.compress, bz2.compress, lzma.compress)),
        *(b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"", bytes(512)),
    ]


def test_tars(fuzz: Fuzz) -> None:
    path = fuzz.place / "cifar-100-python.tar"
    honest = cifar_members()
    pack(path, honest, "w")
    small = {name: data[:40] for name, data in honest.items()}
    made = (tars(fuzz.root, members) for members in (small, small, honest))
    cases = st.one_of(*made, st.sampled_from(tar_tricks()))
    feed(fuzz, cases, path.write_bytes, "cifar-fs", 32)


def drawings(count: int = 2) -> dict[str, bytes]:
    out = io.BytesIO()
    Image.new("1", (10, 10)).save(out, "PNG")
    return {f"/Alphabet{n}/character{n:02d}/0001_{n}.png": out.getvalue() for n in range(count)}


@st.composite
def zips(draw: st.DrawFn, root: Path, prefix: str) -> bytes:
    members = {f"{prefix}{name}": data for name, data in drawings().items()}
    odd = draw(odd_names(root)).encode("utf-8", "replace").decode()
    if draw(st.booleans()):
        members[odd or "x"] = draw(st.binary(max_size=30))
    inside = (
        f"{prefix}/Alphabet0/character00/{draw(st.sampled_from(['x', '0001_0', 'a' * 300]))}.png"
    )
    if draw(st.booleans()):
        members[inside] = draw(st.sampled_from([b"", bytes(3 << 20), b"x" * 50]))
    data = zipped(members, draw(st.sampled_from([0, 8, 12, 14])))
    return draw(changed_bytes(data)) if draw(st.booleans()) else data


def test_zips(fuzz: Fuzz) -> None:
    path = fuzz.place / "images_background.zip"
    for name in ("images_background", "images_evaluation"):
        members = {f"{name}{member}": data for member, data in drawings().items()}
        (fuzz.place / f"{name}.zip").write_bytes(zipped(members))
    changes = {"split": "background_evaluation", "rotations": False}
    cases = zips(fuzz.root, "images_background")
    feed(fuzz, cases, path.write_bytes, "omniglot", **changes)


# Lists


def tables(root: Path, header: list[str], rows: list[list[str]]) -> st.SearchStrategy[bytes]:
    """CSVs with some cells replaced, and with bytes changed."""
    honest = "\n".join(",".join(row) for row in ([header] if header else []) + rows).encode()
    names = odd_names(root).map(lambda name: name.encode("utf-8", "replace").decode())
    odd = names | st.text(max_size=6)
    numbers = st.sampled_from(["9" * 6000, "-1", "²", "٣", "1e5", " 1 ", "0x1", "train", "val"])
    pipes = ["images/pipe.png", "../outside/pipe", f"{root}/outside/pipe", "/dev/zero"]
    fifo = st.sampled_from(pipes)
    cell = st.sampled_from([cell for row in rows for cell in row]) | odd | numbers | fifo
    made = st.lists(st.lists(cell, max_size=4), max_size=6).map(
        lambda table: "\n".join(",".join(row) for row in ([header] if header else []) + table)
    )
    tricks = ['"' * 3, '"a\n' * 50, "a," * 70_000, "\x00", "\ufeff" * 2, "x" * 200_000, "\r\n\r"]
    return st.one_of(
        changed_bytes(honest),
        made.map(lambda text: text.encode("utf-8", "replace")),
        made.map(lambda text: text.encode("utf-8", "replace")),
        st.sampled_from(tricks).map(lambda text: honest + b"\n" + text.encode()),
    )


def pictures(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 9)).save(folder / name)


@pytest.mark.parametrize(
    ("kind", "header", "others"),
    [
        ("image-folder", ["path", "class", "split"], {}),
        ("mini-imagenet", ["filename", "label"], {"val": "a/3.png,n1", "test": "a/3.png,n2"}),
        ("inaturalist-2017", [], {"test": "a/3.png,7"}),
    ],
)
def test_csvs(fuzz: Fuzz, kind: str, header: list[str], others: dict[str, str]) -> None:
    folder = fuzz.place / ("" if kind == "image-folder" else "images")
    pictures(folder, [f"a/{number}.png" for number in range(4)])
    (fuzz.place / "images").mkdir(exist_ok=True)
    os.mkfifo(fuzz.place / "images" / "pipe.png")
    cells = {"image-folder": "n{},train", "mini-imagenet": "n{}", "inaturalist-2017": "{}"}
    rows = [f"a/{n}.png,{cells[kind].format(n % 2)}".split(",") for n in range(3)]
    for name, line in others.items():
        (fuzz.place / f"{name}.csv").write_text(",".join(header) + "\n" + line)
    table = fuzz.place / "train.csv"
    table.write_text("\n".join(map(",".join, [header, *rows])))
    changes = {"csv": table} if kind == "image-folder" else {}
    feed(fuzz, tables(fuzz.root, header, rows), table.write_bytes, kind, **changes)


def test_lists_of_cub(fuzz: Fuzz) -> None:
    names = [f"{number:03d}.Bird/{number}.png" for number in (1, 2, 4)]
    pictures(fuzz.place / "images", names)
    lists = {
        "images.txt": "".join(f"{n} {name}\n" for n, name in enumerate(names, 1)),
        "bounding_boxes.txt": "".join(f"{n} 1.0 1.0 4.0 5.0\n" for n in range(1, 4)),
    }
    numbers = ["nan", "inf", "-1e308", "1e400", "-5", "0", "1_0", "²", "x" * 5000, "9" * 20]
    odd = ["1", "2", "../../outside/pipe", "²³¹.Bird/x", "001/..", "\x1c"]
    words = st.sampled_from([*numbers, *names, *odd])
    lines = st.lists(st.lists(words, max_size=6).map(" ".join), max_size=6).map("\n".join)
    cases = st.sampled_from(list(lists.items())).flatmap(
        lambda item: st.tuples(
            st.just(item[0]),
            changed_bytes(item[1].encode()) | lines.map(lambda made: (item[1] + made).encode()),
        )
    )

    def write(case: tuple[str, bytes]) -> None:
        for name, text in lists.items():
            (fuzz.place / name).write_text(text)
        (fuzz.place / case[0]).write_bytes(case[1])

    write(("images.txt", lists["images.txt"].encode()))
    feed(fuzz, cases, write, "cub", split="cub_100_50_50", crop_to_box=True)


# Pictures


def picture(mode: str, kind: str, size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


def all_pictures() -> list[bytes]:
    modes = {
        "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
        "JPEG": ["L", "RGB", "CMYK"],
        "BMP": ["1", "L", "P", "RGB"],
        "GIF": ["L", "P"],
        "WEBP": ["RGB", "RGBA"],
        "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "F", "I", "I;16", "LAB", "P"],
        "PPM": ["1", "L", "RGB"],
    }
    found = [picture(mode, kind) for kind, own in modes.items() for mode in own]
    found += [
        picture("RGB", "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "tiff_adobe_deflate")
    ]
    return [*found, picture("RGB", "JPEG", progressive=True), picture("P", "PNG", transparency=0)]


def foreign_pictures(root: Path) -> list[bytes]:
    """What Pillow could take for a picture, and must not: it would start a program for some."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    return [
        postscript + f"({root}/outside/new) (w) file closefile showpage\n".encode(),
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a" + bytes(40),
        b"/* XPM */\n",
        b"#define im_width 9\n#define im_height 9\nstatic char im_bits[] = {0};",
        b"SIMPLE  =                    T" + bytes(2880),
        b"\x00\x00\x01\x00\x01\x00" + bytes(64),
        b"icns" + bytes(64),
        b"8BPS" + bytes(64),
        b"DDS " + bytes(128),
    ]


def test_pictures(fuzz: Fuzz) -> None:
    path = fuzz.place / "picture.png"
    claims = st.tuples(*[st.sampled_from([0, 1, 9, 10_000, 20_000, 2**31 - 1, 2**32 - 1])] * 2)
    bombs = claims.map(lambda size: raw_png(*size, 8, 2, b"\0" * 300))
    real = [
        raw_png(30_000, 30_000, 8, 2, bytes(1 << 20)),
        raw_png(200_000, 1, 8, 2, bytes(600_001)),
        picture("L", "PNG", (1, 60_000)),
    ]
    cases = st.one_of(
        st.sampled_from(all_pictures()).flatmap(changed_bytes),
        st.sampled_from(all_pictures()).flatmap(changed_bytes),
        bombs,
        st.sampled_from([*real, *foreign_pictures(fuzz.root), *all_pictures()]),
        st.binary(max_size=40),
    )
    transforms: list[Any] = [
        *(squashed(SIZE), squared(SIZE)),
        *(lambda image, mode=mode: _square(image, mode, SIZE) for mode in ("RGB", "L")),
    ]

    def read(_: object) -> None:
        with gathered() as mistakes:
            for transform in transforms:
                with mistakes.kept():
                    assert decode_files([path], transform).shape[:3] == (1, SIZE, SIZE)

    fuzz(cases, path.write_bytes, read)


def test_a_folder_of_odd_files(fuzz: Fuzz) -> None:
    kinds = ["pipe", "folder", "link", "loop", "device", "empty", "text", "picture"]
    names = ["a.png", "b.JPG", "c.txt", ".d.png", "e\n.png", "f\udcff.png", "g" * 200 + ".gif"]
    places = ["train/x", "val/y", "test/z", "train", ".", "other", "train/\udcff", "train/a/b"]

    def write(case: list[tuple[str, str, str]]) -> None:
        shutil.rmtree(fuzz.place)
        fuzz.place.mkdir()
        pictures(fuzz.place, ["train/x/0.png"])
        for kind, folder, name in case:
            path = fuzz.place / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                make(kind, path, fuzz.root)

    cases = st.lists(st.tuples(*map(st.sampled_from, (kinds, places, names))), max_size=6)
    write([])
    feed(fuzz, cases, write, "image-folder")


def make(kind: str, path: Path, root: Path) -> None:
    content = {"picture": picture("RGB", "PNG"), "empty": b"", "text": b"text"}
    if kind in content:
        path.write_bytes(content[kind])
    elif kind in {"pipe", "folder"}:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    else:
        path.symlink_to({"link": root / "outside" / "pipe", "loop": path}.get(kind, "/dev/zero"))
