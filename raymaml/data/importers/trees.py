"""Files by name, in a folder or in a tar archive that nobody has to unpack.

Nothing is extracted: members are read in place. A compressed archive is decompressed once, beside
the bank. Archives whose members or links would leave their folder are refused all the same: they
are not what their publisher made.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import stays_inside
from raymaml.data.importers.stored import Blob, Scratch, bounded, chunks_of, open_blob

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_PACKED: dict[bytes, Callable[[Path], gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZ": bz2.BZ2File,
    b"\xfd7": lzma.LZMAFile,
}
_BLOCK = 512  # bytes


@dataclass(frozen=True)
class Tree:
    """Files below a root, by their path with slashes; each is opened when it is asked for."""

    name: str
    """For messages."""
    files: dict[str, Callable[[], Blob]]

    def blob(self, path: str) -> Blob:
        """Open a file.

        Raises:
            UserError: there is none of this name.
        """
        if path not in self.files:
            raise UserError(f"{self.name}: holds no {path}; get it again, whole")
        return self.files[path]()

    def below(self, folder: str) -> Tree:
        """Return the files below ``folder``, their paths starting there."""
        if folder in {"", "."}:
            return self
        own = {
            path.removeprefix(f"{folder}/"): open_
            for path, open_ in self.files.items()
            if path.startswith(f"{folder}/")
        }
        return Tree(f"{self.name}/{folder}", own)


def find_tree(path: Path, marks: Sequence[str], scratch: Scratch) -> Tree | None:
    """Find the folder that holds all files ``marks``, in a folder or in the archives in it.

    ``path`` may be that folder, one above it, or an archive of either.

    Raises:
        UserError: an archive is damaged or has unsafe members.
    """
    for tree in _trees(path, scratch):
        roots = {str(PurePosixPath(file).parent) for file in tree.files if file.endswith(marks[0])}
        for root in sorted(roots, key=len):
            found = tree.below(root)
            if all(mark in found.files for mark in marks):
                return found
    return None


def _trees(path: Path, scratch: Scratch) -> Iterator[Tree]:
    if path.is_file():
        yield read_tar(path, scratch)
        return
    if not path.is_dir():
        raise UserError(f"data.source.path: {path} does not exist; give a folder or an archive")
    yield read_folder(path)
    for archive in sorted(path.iterdir()):
        if archive.name.endswith(ARCHIVES) and archive.is_file():
            yield read_tar(archive, scratch)


def read_folder(folder: Path) -> Tree:
    """List the visible files of a folder and all below."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return Tree(
        str(folder),
        {
            name: _opener(path)
            for name, path in names.items()
            if not any(part.startswith(".") for part in name.split("/"))
        },
    )


def _opener(path: Path) -> Callable[[], Blob]:
    return lambda: open_blob(path)


def read_tar(path: Path, scratch: Scratch) -> Tree:
    """List the files of a tar archive, plain or compressed.

    Raises:
        UserError: it is damaged, or a member or link would leave the folder it is extracted to.
    """
    plain = _plain(path, scratch)
    try:
        with plain.file.stream() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            members = list(_members(archive))
    except Exception as error:  # tarfile has no list of what it raises on damage
        raise _damaged(path, error) from None
    if unsafe := [member.name for member in members if not is_safe(member)]:
        raise UserError(
            f"{path}: holds the unsafe path {unsafe[0]!r:.200}; get the official archive"
        )
    files = {member.name.removeprefix("./"): member for member in members if member.isreg()}
    # every tar ends with blocks of zeros; tarfile takes a torn one for whole
    if any(plain.file.read(max(0, plain.length - _BLOCK), min(_BLOCK, plain.length))):
        raise _damaged(path, EOFError("the file ends too early"))
    return Tree(str(path), {name: _member(plain, member) for name, member in files.items()})


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members; a header that leads back to where it stands would do so for ever.

    Raises:
        ValueError: there is one.
    """
    offset = -1
    while (member := archive.next()) is not None:
        if member.offset <= offset or member.size < 0 or archive.offset <= member.offset:
            raise ValueError("a member leads back")
        offset = member.offset
        yield member


def _member(plain: Blob, member: tarfile.TarInfo) -> Callable[[], Blob]:
    offset, size = member.offset_data, member.size
    return lambda: Blob(plain.file, offset, size)


def _plain(path: Path, scratch: Scratch) -> Blob:
    """Return the archive without its compression."""
    packed = open_blob(path)
    opener = _PACKED.get(packed.file.read(0, min(2, packed.length)))
    if opener is None:
        return packed
    with opener(path) as stream:
        chunks = bounded(chunks_of(stream.read), packed.length)
        return scratch.new_file().append(_readable(path, chunks))


def _readable(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    except Exception as error:  # nor do the libraries of compression
        raise _damaged(path, error) from None


def is_safe(member: tarfile.TarInfo) -> bool:
    """Whether a member, and what it links to, stays inside the folder it is extracted to."""
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return False  # devices and pipes
    if member.issparse() or not stays_inside(member.name):
        return False
    if member.issym():
        return stays_inside(str(PurePosixPath(member.name).parent / member.linkname))
    return not member.islnk() or stays_inside(member.linkname)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: is not a whole tar archive ({reason_of(error)[:200]}); get it again")
