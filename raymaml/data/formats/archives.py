"""Files by name, in a folder or in a tar archive that need not be extracted.

Members are read in place. A compressed archive is decompressed once, beside the bank. An archive
whose members or links leave their folder is refused all the same: its publisher did not make it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raymaml.common.errors import UserError
from raymaml.data.formats.spool import Blob, open_blob, spool, whole

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_OPENERS: dict[bytes, Callable[[Path], Any]]
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_BLOCK = 512  # bytes
_ELSEWHERE = "/nowhere"  # nothing is extracted: a folder to check paths against


@dataclass(frozen=True)
class Tree:
    """Files below a root by their path with slashes; each opens when it is needed."""

    name: str
    """For messages."""
    files: dict[str, Callable[[], Blob]]

    def blob(self, path: str) -> Blob:
        """Open a file; raises ``UserError`` where there is none of this name."""
        if path not in self.files:
            raise UserError(f"{self.name}: holds no {path}", remedy="get it again, whole")
        return self.files[path]()


def find_tree(path: Path, marks: Sequence[str], bank: Path, missing: str) -> Tree:
    """Find the folder that holds all files ``marks``, in a folder or in the archives in it.

    Args:
        path: that folder, one above it, or an archive of either.
        marks: names of files.
        bank: archives are decompressed beside it.
        missing: what the message says after "holds" where there is no such folder.

    Raises:
        UserError: there is none, or an archive is damaged or has unsafe members.
    """
    for tree in _trees(path, bank):
        roots = {p.removesuffix(marks[0]) for p in tree.files if f"/{p}".endswith(f"/{marks[0]}")}
        for root in sorted(roots, key=len):
            if all(root + mark in tree.files for mark in marks):
                below = {
                    p.removeprefix(root): f for p, f in tree.files.items() if p[: len(root)] == root
                }
                return Tree(f"{tree.name}/{root}".rstrip("/"), below)
    raise UserError(f"data.source.path: {path} holds {missing}")


def _trees(path: Path, bank: Path) -> Iterator[Tree]:
    if path.is_file():
        yield read_tar(path, bank)
        return
    yield read_folder(path)
    for archive in sorted(path.iterdir()):
        if archive.name.endswith(ARCHIVES) and archive.is_file():
            yield read_tar(archive, bank)


def read_folder(folder: Path) -> Tree:
    """List the visible files of a folder and of all folders below it."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    files = {
        name.as_posix(): partial(open_blob, path)
        for name, path in paths.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    return Tree(str(folder), {**files})


def read_tar(path: Path, bank: Path) -> Tree:
    """List the files of a tar archive, plain or compressed.

    Raises:
        UserError: it is damaged, or a member or link would leave the folder it is extracted to.
    """
    with whole(path, "tar archive"):
        plain = _plain(path, bank)
        with plain.stream() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            members = list(_members(archive))
        # every tar ends with blocks of zeros; tarfile takes a torn one for whole
        if any(plain.part(max(0, plain.length - _BLOCK), min(_BLOCK, plain.length)).read()):
            raise EOFError("the file ends too early")
        if unsafe := [member.name for member in members if not _is_safe(member)]:
            raise UserError(
                f"{path}: holds the unsafe path {unsafe[0]!r:.200}",
                remedy="get the official archive",
            )
    files = {
        member.name.removeprefix("./"): partial(plain.part, member.offset_data, member.size)
        for member in members
        if member.isreg()
    }
    return Tree(str(path), {**files})


def _plain(path: Path, bank: Path) -> Blob:
    """Return the archive without its compression."""
    packed = open_blob(path)
    opener = _OPENERS.get(packed.part(0, min(2, packed.length)).read())
    if opener is None:
        return packed
    with opener(path) as stream:
        return spool(stream.read, packed.length, path, "tar archive", bank)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members; raises ``ValueError`` at a header that leads back, which would loop."""
    offset = -1
    for member in iter(archive.next, None):
        if member.size < 0 or not offset < member.offset < archive.offset:
            raise ValueError("a member leads back")
        offset = member.offset
        yield member


def _is_safe(member: tarfile.TarInfo) -> bool:
    """Whether a member, and the target of its link, stays in the folder it is extracted to."""
    try:
        tarfile.data_filter(member, _ELSEWHERE)
    except tarfile.FilterError:
        return False
    return not member.name.startswith("/") and not member.issparse()
