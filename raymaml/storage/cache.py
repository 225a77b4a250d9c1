"""The one copy on each machine of a bank, or of shards, that is given by URI."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from raymaml.common.errors import UserError, reason_of
from raymaml.storage.files import download, new_folder, read_bytes, unreachable
from raymaml.storage.place import Place, at_home, is_remote
from raymaml.storage.temporary import partial_name, remove_dead

CACHE = Path("~/.cache/raymaml")
"""Where copies lie if nothing else is said."""
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Errors of the disk that is copied to, not of where the files come from."""


@dataclass(frozen=True, kw_only=True)
class Copying:
    """How folders of one kind are copied."""

    marker: str
    """The file that was written last; it holds the hashes of the others."""
    others: Callable[[Path], Iterable[str]]
    """Names the other files, once the marker lies in a folder on disk."""
    verify: Callable[[Path], object]
    """Raises UserError where the files in a folder on disk do not fit the hashes."""


def local_copy(place: Place, cache: Path, how: Copying) -> Path:
    """Return ``place`` itself, or a verified copy on disk, made when first asked for.

    Copies are named by the content of the marker, which holds the hashes of all the rest; so a bank
    that was made anew is another copy. Processes of one machine wait for the first that copies.

    Raises:
        UserError: ``place`` cannot be read, or its files are altered.
    """
    if not is_remote(place):
        return place
    try:
        content = read_bytes(place / how.marker)
    except FileNotFoundError:
        raise UserError(
            f"{place / how.marker}: does not exist; make it with `raymaml data import CONFIG` and"
            " `raymaml data sample CONFIG`, or give another place"
        ) from None
    except Exception as error:
        raise unreachable(place / how.marker, error) from None
    try:
        copy = at_home(cache) / hashlib.sha256(content).hexdigest()
    except ValueError as error:
        raise _unusable(cache, f"it {error}") from None
    if not copy.exists():
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(copy.with_suffix(".lock")).acquire()
        except OSError as error:
            raise _unusable(cache, error.strerror or reason_of(error)) from None
        with lock:
            if not copy.exists():
                _copy(place, copy, content, how)
    return copy


def _unusable(cache: Path, problem: str) -> UserError:
    return UserError(
        f"data.cache: {cache}: copies of what is given by URI cannot be kept there ({problem}); set"
        " data.cache to a folder that this user can write"
    )


def _copy(place: Place, copy: Path, marker: bytes, how: Copying) -> None:
    remove_dead(copy.parent, partial_name("*"))
    with new_folder(copy, how.marker) as partial:
        (partial / how.marker).write_bytes(marker)
        names = list(how.others(partial))
        try:
            download(place, names, partial)
        except FileNotFoundError as error:
            raise UserError(
                f"{place}: lacks a file that its {how.marker} names ({reason_of(error)}); make it"
                " again"
            ) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise  # new_folder tells of it
            raise unreachable(place, error) from None
        try:
            how.verify(partial)
        except UserError as error:
            problems = (problem.replace(str(partial), str(place)) for problem in error.problems)
            raise UserError(*problems) from None
