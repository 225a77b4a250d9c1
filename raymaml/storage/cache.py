"""One copy on each machine of a bank, or of shards, at a URI."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from raymaml.common.errors import Mistake, UserError, reason_of
from raymaml.storage.files import download, new_folder, read_bytes
from raymaml.storage.place import Place, at_home, is_remote
from raymaml.storage.temporary import partial_name, remove_dead

CACHE = Path("~/.cache/raymaml")
"""The default folder of the copies."""


@dataclass(frozen=True, kw_only=True)
class Copying:
    """How folders of one kind are copied."""

    marker: str
    """The file that is written last; it holds the hashes of the others."""
    others: Callable[[Path], Iterable[str]]
    """Returns the names of the other files, given a folder on disk that holds the marker."""
    verify: Callable[[Path], object]
    """Raises a UserError if the files in a folder on disk do not match the hashes."""


def local_copy(place: Place, cache: Path, how: Copying) -> Path:
    """Return ``place`` itself, or a verified copy of it on disk, which the first call makes.

    The name of a copy is the hash of the marker, which holds the hashes of all other files. So a
    bank that was made again has another copy. Other processes of the machine wait for the first.

    Raises:
        UserError: ``place`` cannot be read, or its files are altered.
    """
    if not is_remote(place):
        return place
    try:
        content = read_bytes(place / how.marker)
    except FileNotFoundError:
        raise UserError(
            f"{place / how.marker}: does not exist",
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
        if not copy.exists():
            _copy(place, copy, content, how)
    return copy


def _copy(place: Place, copy: Path, marker: bytes, how: Copying) -> None:
    remove_dead(copy.parent, partial_name("*"))
    with new_folder(copy, how.marker) as partial:
        (partial / how.marker).write_bytes(marker)
        names = list(how.others(partial))
        try:
            download(place, names, partial)
        except FileNotFoundError as error:
            raise UserError(
                f"{place}: lacks a file that its {how.marker} names ({reason_of(error)})",
                remedy="make it again",
            ) from None
        try:
            how.verify(partial)
        except UserError as error:
            raise UserError(
                *(
                    Mistake(problem.replace(str(partial), str(place)), remedy)
                    for problem, remedy in error.mistakes
                )
            ) from None
