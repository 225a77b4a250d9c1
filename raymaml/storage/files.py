"""Folders and files that appear whole or not at all, on disk and at URIs.

On disk what is not whole yet has a hidden name, and is renamed. At a URI nothing can be renamed,
but a file appears as a whole: there the file that names all the others, the marker, is written
last, and a folder without it counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pyarrow.fs import FSSpecHandler, PyFileSystem

from raymaml.common.errors import StorageError, UserError, reason_of, storage_error
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import own_folder, partial_name, temporary_folder

_PIECE = 8 << 20
"""Bytes of a file that are in memory while it is copied."""


@contextlib.contextmanager
def new_folder(folder: Place, marker: str) -> Iterator[Path]:
    """Yield an empty folder on disk that becomes ``folder``, whole, when the block ends.

    Beside a folder on disk it is a hidden one, which is renamed once its files are on disk; at a
    URI the files are copied there, ``marker`` last. When the block raises, nothing remains; of a
    process that is killed, what remains is removed by the next that makes ``folder``.

    Raises:
        FileExistsError: ``folder`` exists; it is left as it is.
        StorageError: the storage refuses; the message says how much room there is.
    """
    if is_remote(folder):
        with temporary_folder() as temporary:
            yield temporary
            if exists(folder / marker):
                raise FileExistsError(folder)
            upload(temporary, folder, last=marker)
        return
    _require_free(folder)
    with contextlib.ExitStack() as stack:
        with storing(folder, folder):
            own = own_folder(folder.parent, partial_name(folder.name))
            partial = stack.enter_context(own)
        with storing(folder, partial):
            yield partial
            for path in partial.iterdir():
                _fsync(path)
            _fsync(partial)
            if folder.exists():  # os.rename would replace an empty folder
                raise FileExistsError(folder)
            partial.rename(folder)
            _fsync(folder.parent)


def _require_free(folder: Path) -> None:
    """Check, before much is written, that the folder could be made.

    Raises:
        StorageError: its name is too long.
        UserError: it is a link that leads nowhere.
    """
    with storing(folder, folder):
        if folder.is_symlink() and not folder.exists():
            raise UserError(
                f"{folder}: is a link to {folder.readlink()}, which does not exist; make that,"
                " remove the link, or give another path"
            )
        folder.exists()


@contextlib.contextmanager
def on_disk(folder: Place) -> Iterator[Path]:
    """Yield ``folder`` itself, or a folder on disk whose files are copied there at the end."""
    if not is_remote(folder):
        yield folder
        return
    with temporary_folder() as temporary:
        yield temporary
        upload(temporary, folder)


def upload(source: Path, folder: Place, last: str | None = None) -> None:
    """Copy all files below ``source`` to a URI, piece by piece, ``last`` after the others."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    with reaching(folder):
        for path in sorted(files, key=lambda path: path.name == last):
            target = folder / path.relative_to(source).as_posix()
            with path.open("rb") as file, target.open("wb") as copy:
                shutil.copyfileobj(file, copy, _PIECE)


def download(folder: Place, names: Iterable[str], target: Path) -> None:
    """Copy files of a URI to disk, piece by piece."""
    for name in names:
        with (folder / name).open("rb") as source, (target / name).open("wb") as copy:
            shutil.copyfileobj(source, copy, _PIECE)


@contextlib.contextmanager
def reaching(place: Place, *expected: type[Exception]) -> Iterator[None]:
    """Tell what keeps the block from reading or writing a URI; on disk it changes nothing.

    Raises:
        StorageError: instead of any error but those that are ``expected``.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(place) or isinstance(error, (*expected, UserError)):
            raise
        raise unreachable(place, error) from error


def unreachable(place: Place, error: Exception) -> StorageError:
    """Return what is said where a URI cannot be read or written."""
    return StorageError(
        f"{place}: cannot be reached ({reason_of(error)}); check the address, the network and the"
        " credentials (for s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
    )


def as_arrow(place: Place) -> tuple[str, Any]:
    """Return a place as pyarrow and Ray take it: a path, and its file system (None: the disk)."""
    if not is_remote(place):
        return str(place.absolute()), None
    return place.path, PyFileSystem(FSSpecHandler(place.fs))


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the bytes of ``path``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Place) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path``, whole, when the block ends.

    A reader sees the old file or the new one, never a part; an error leaves the old one. The
    folder is made when it is missing.

    Raises:
        StorageError: the storage refuses; the message says how much room there is.
    """
    if is_remote(path):
        content = io.BytesIO()
        yield content
        with reaching(path):
            path.write_bytes(content.getvalue())
        return
    hidden = path.with_name(f"{partial_name(path.name)}-{secrets.token_hex(4)}")
    try:
        with storing(path, hidden):
            path.parent.mkdir(parents=True, exist_ok=True)
            with hidden.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            hidden.replace(path)
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def storing(path: Place, partial: Place) -> Iterator[None]:
    """Tell what the storage refuses in the block, which writes ``path`` by way of ``partial``.

    Raises:
        StorageError: naming the path, the reason, the room that is left, and the remedy.
    """
    try:
        yield
    except OSError as error:
        if (problem := storage_error(error, path, _space(path, partial))) is None:
            raise
        raise problem from error


def _space(path: Place, partial: Place) -> str:
    """Say how much room is left beside what ``partial`` holds by now, which was not enough."""
    if is_remote(path):
        return ""
    try:
        there = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(there).free
        files = partial.iterdir() if partial.is_dir() else [partial]
        written = sum(file.stat().st_size for file in files if file.exists())
    except OSError:
        return ""
    return f"{free:,} bytes are free in {there} and more than {written + free:,} are needed"


def make_folder(folder: Place, key: str) -> None:
    """Make a folder, where folders are made; a URI is looked at.

    Raises:
        UserError: it cannot be made, or not be reached; ``key`` is the option that names it.
    """
    try:
        if is_remote(folder):
            exists(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{key}: {folder} cannot be made a folder ({error.strerror}); give another {key}"
        ) from None


def exists(place: Place) -> bool:
    """Tell whether there is such a file or folder.

    Raises:
        StorageError: the URI cannot be reached.
    """
    with reaching(place):
        return bool(place.exists())


def remove(path: Place) -> None:
    """Remove a file, if it is there.

    Raises:
        StorageError: the URI cannot be reached.
    """
    with reaching(path):
        path.unlink(missing_ok=True)


def read_bytes(path: Place) -> bytes:
    """Return what a file holds; of one that is replaced meanwhile, all of the old or of the new.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    if is_remote(path):
        with reaching(path, FileNotFoundError):
            content: bytes = path.fs.cat_file(path.path)  # one request; `open` makes several
            return content
    return path.read_bytes()


def read_text(path: Place) -> str:
    """Do as ``read_bytes``, for UTF-8."""
    return read_bytes(path).decode("utf-8")


def write_text(path: Place, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds the old or the new whole, never a part."""
    with replacing(path) as file:
        file.write(text.encode())


def append_text(path: Place, text: str) -> None:
    """Append ``text`` (UTF-8), making file and folder if need be; at a URI all is written anew."""
    if is_remote(path):
        before = read_text(path) if exists(path) else ""
        write_text(path, before + text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def remove_folder(folder: Place, marker: str) -> None:
    """Remove a folder so that no half of it is ever taken for a whole."""
    if is_remote(folder):
        remove(folder / marker)
        with reaching(folder):
            folder.fs.rm(folder.path, recursive=True)
        return
    hidden = folder.with_name(
        f"{partial_name(folder.name)}-old"
    )  # what a kill leaves, the next removes
    folder.rename(hidden)
    shutil.rmtree(hidden)


def rename_folder(folder: Place, name: str, marker: str) -> None:
    """Give a folder another name; a kill leaves it whole under one of the two, or under both."""
    if not is_remote(folder):
        folder.rename(folder.with_name(name))
        return
    with reaching(folder):
        folder.fs.copy(folder.path, folder.with_name(name).path, recursive=True)
        remove_folder(folder, marker)


def remove_partial(folder: Place, name: str = "*") -> None:
    """Remove what a killed process left of files and folders that never became whole.

    At a URI there is nothing: what lacks its marker is overwritten when it is written again.

    Args:
        folder: where they would lie.
        name: theirs; by default all.
    """
    if is_remote(folder):
        return
    for path in folder.glob(f".{name}.partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
