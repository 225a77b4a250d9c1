"""Files as the data sets' authors wrote them, and the import of a source as a whole."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import spec_of
from PIL import Image
from pydantic import TypeAdapter

from raymaml.common.errors import UserError
from raymaml.config.data_sources import AnySource, Source
from raymaml.config.schema import SPLITS, AllEpisodes, DataConfig
from raymaml.data.bank import ImageBank
from raymaml.data.formats.pickles import load_pickle
from raymaml.data.formats.spool import open_blob
from raymaml.data.importers import import_bank, plan_import
from raymaml.data.importers.plan import ImportPlan


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


def unpack(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def member(name: str, size: int = 0, **other: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in ({"size": size} | other).items():
        setattr(info, key, value)
    return info


def tar_of(
    members: Iterable[tuple[tarfile.TarInfo, bytes]], mode: str = "w", **options: Any
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pack(path: Path, files: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    members = [(member(name, len(data)), data) for name, data in files.items()]
    path.write_bytes(tar_of(members, mode))
    return path


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


SOURCES: TypeAdapter[AnySource] = TypeAdapter(Source)


def plan_source(kind: str, path: Path, size: int = 8, **changes: Any) -> ImportPlan:
    """Plan the import of ``path``; what it unpacks goes beside."""
    source = SOURCES.validate_python({"kind": kind, "path": path} | changes)
    return plan_import(source, size, (path if path.is_dir() else path.parent) / "bank")


def counts(found: ImportPlan) -> list[tuple[int, int]]:
    """Classes and images of each split."""
    own = [[c.count for c in found.classes if c.split == split] for split in SPLITS]
    return [(len(sizes), sum(sizes)) for sizes in own]


def classes(found: ImportPlan) -> list[tuple[str, str, int]]:
    return [(planned.split, planned.name, planned.count) for planned in found.classes]


def problems_of(plan: Callable[..., object], *arguments: Any, **changes: Any) -> list[str]:
    """The mistakes that a plan reports."""
    with pytest.raises(UserError) as caught:
        plan(*arguments, **changes)
    return list(caught.value.problems)


def import_source(
    kind: str,
    path: Path,
    folder: Path,
    size: int = 8,
    *,
    ways: int = 2,
    images: int = 2,
    fit_queries: bool = False,
    tell: Callable[[str], object] = str,
    **changes: Any,
) -> ImageBank:
    """Import ``path`` into ``folder / "bank"``, for episodes of ``images`` a class."""
    bank, spec = folder / "bank", spec_of(ways, 1, images - 1, 1)
    source = SOURCES.validate_python({"kind": kind, "path": path} | changes)
    data = DataConfig(source=source, bank=bank, shards=folder / "shards", image_size=size)
    episodes = AllEpisodes(train=spec, val=spec, test=spec, fit_queries=fit_queries)
    return import_bank(data, episodes, tell)


def save_halves(path: Path, width: int = 30, height: int = 20, **options: Any) -> Path:
    """Save a black image with a white left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (width, height), "black")
    image.paste("white", (0, 0, width // 2, height))
    image.save(path, **options)
    return path
