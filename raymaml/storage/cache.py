"""One copy on each machine of a bank, or of shards, at a URI."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from raymaml.common.errors import Mistake, UserError, reason_of
from raymaml.storage.files import PIECE, new_folder, reaching, read_bytes
from raymaml.storage.place import Place, at_home, is_remote
from raymaml.storage.temporary import partial_name, remove_dead

CACHE = Path("~/.cache/raymaml")
"""The default folder of the copies."""


def local_copy(
    place: Place,
    cache: Path,
    *,
    marker: str,
    others: Callable[[Path], Iterable[str]],
    verify: Callable[[Path], object],
) -> Path:
    """Return ``place`` itself, or a verified copy of it on disk, which the first call makes.

    The name of a copy is the hash of the marker, which holds the hashes of all other files. So a
    bank that was made again has another copy. Other processes of the machine wait for the first.

    Args:
        place: a folder on disk or at a URI.
        cache: the folder of the copies.
        marker: the file that is written last; it holds the hashes of the others.
        others: returns the names of the other files, given a folder on disk that holds the marker.
        verify: raises a UserError if the files in a folder on disk do not match the hashes.

    Raises:
        UserError: ``place`` cannot be read, or its files are altered.
    """
    if not is_remote(place):
        return place
    try:
        content = read_bytes(place / marker)
    except FileNotFoundError:
        raise UserError(
            f"{place / marker}: does not exist",
            remedy="make it with `raymaml data import CONFIG` and `raymaml data sample CONFIG`, or"
            " give another place",
        ) from None
    try:
        copy = at_home(cache) / hashlib.sha256(content).hexdigest()
        if copy.exists():
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(copy.with_suffix(".lock")).acquire()
    except (OSError, ValueError) as error:
        reason = f"it {error}" if isinstance(error, ValueError) else error.strerror
        raise UserError(
            f"data.cache: {cache}: copies of data at a URI cannot be kept there"
            f" ({reason or reason_of(error)})",
            remedy="set data.cache to a folder that this user can write",
        ) from None
    with lock:
        if copy.exists():  # another process has made it meanwhile
            return copy
        remove_dead(copy.parent, partial_name("*"))
        with new_folder(copy, marker) as partial:
            (partial / marker).write_bytes(content)
            _download(place, marker, others(partial), partial)
            try:
                verify(partial)
            except UserError as error:
                raise UserError(*_at(place, partial, error)) from None
    return copy


def _at(place: Place, partial: Path, error: UserError) -> Iterator[Mistake]:
    """Yield mistakes that name the files at the URI, and not those of the copy."""
    for problem, remedy in error.mistakes:
        yield Mistake(problem.replace(str(partial), str(place)), remedy)


def _download(place: Place, marker: str, names: Iterable[str], target: Path) -> None:
    """Copy files of a URI to disk, piece by piece; an ``OSError`` is one of the disk."""
    for name in names:
        try:
            with reaching(place, FileNotFoundError):
                source = (place / name).open("rb")
        except FileNotFoundError as error:
            raise UserError(
                f"{place}: lacks a file that its {marker} names ({reason_of(error)})",
                remedy="make it again",
            ) from None
        with source, (target / name).open("wb") as copy:
            while True:
                with reaching(place):
                    piece = source.read(PIECE)
                if not piece:
                    break
                copy.write(piece)
