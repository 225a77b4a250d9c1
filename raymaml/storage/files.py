"""Folders and files that appear whole or not at all, on disk and at URIs.

On disk an unfinished file or folder has a hidden name, and is renamed at the end. At a URI nothing
can be renamed, but a file appears whole. So a folder there has a marker, a file that names all the
others: it is written last, and a folder without its marker does not count.

Each function raises ``StorageError`` where a URI cannot be reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raymaml.common.errors import StorageError, UserError, reason_of, storage_error
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import own_folder, partial_name, temporary_folder

PIECE = 8 << 20
"""Bytes of a file that are in memory while it is copied."""


@contextlib.contextmanager
def new_folder(folder: Place, marker: str) -> Iterator[Path]:
    """Yield an empty folder on disk that becomes ``folder``, whole, when the block ends.

    On disk it is a hidden folder beside ``folder``, and is renamed once its files are on disk. To
    a URI the files are copied, ``marker`` last. An error in the block leaves nothing. If a process
    is killed, the next process that makes ``folder`` removes the remains.

    Raises:
        FileExistsError: ``folder`` exists; it is left as it is.
        UserError: ``folder`` is a link to a missing place.
        StorageError: the storage fails; the message says how much room there is.
    """
    if is_remote(folder):
        with temporary_folder() as temporary:
            yield temporary
            if exists(folder / marker):
                raise FileExistsError(folder)
            upload(temporary, folder, last=marker)
        return
    with contextlib.ExitStack() as stack:
        with storing(folder, folder):
            if folder.is_symlink() and not folder.exists():  # fails too where the name is too long
                raise UserError(
                    f"{folder}: is a link to {folder.readlink()}, which does not exist",
                    remedy="make that, remove the link, or give another path",
                )
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
                shutil.copyfileobj(file, copy, PIECE)


@contextlib.contextmanager
def reaching(place: Place, *expected: type[Exception]) -> Iterator[None]:
    """Turn errors of a block that reads or writes a URI into ``StorageError``; errors on disk pass
    unchanged.

    Raises:
        StorageError: in place of any other error than those ``expected``.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(place) or isinstance(error, (*expected, UserError)):
            raise
        raise StorageError(
            f"{place}: cannot be reached ({reason_of(error)})",
            remedy="check the address, the network and the credentials (for s3://:"
            " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)",
        ) from error


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
    """Open a file that replaces ``path`` when the block ends.

    A reader sees the whole old file or the whole new one. An error leaves the old one. A missing
    folder is made.

    Raises:
        StorageError: the storage fails; the message says how much room there is.
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
    """Explain an error of the storage in the block, which writes ``path`` through ``partial``.

    Raises:
        StorageError: with the path, the reason, the room that is left, and the remedy.
    """
    try:
        yield
    except OSError as error:
        if (problem := storage_error(error, path, _space(path, partial))) is None:
            raise
        raise problem from error


def _space(path: Place, partial: Place) -> str:
    """Return a message: the bytes that are free, and the least number needed (these plus the bytes
    already in ``partial``)."""
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
    """Make a folder on disk; check that a URI can be reached.

    Raises:
        UserError: this fails; ``key`` is the option that names the folder.
    """
    try:
        if is_remote(folder):
            exists(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{key}: {folder} cannot be made a folder ({error.strerror})",
            remedy=f"give another {key}",
        ) from None


def exists(place: Place) -> bool:
    """Return whether the file or folder exists."""
    with reaching(place):
        return bool(place.exists())


def remove(path: Place) -> None:
    """Remove a file if it exists."""
    with reaching(path):
        path.unlink(missing_ok=True)


def read_bytes(path: Place) -> bytes:
    """Return the content of a file: if another process replaces it, the whole old or new one.

    Raises:
        OSError: it does not exist, or cannot be read.
    """
    if is_remote(path):
        with reaching(path, FileNotFoundError):
            content: bytes = path.fs.cat_file(path.path)  # one request; `open` makes several
            return content
    return path.read_bytes()


def read_text(path: Place) -> str:
    """Return the content of a file as text (UTF-8), as ``read_bytes`` does."""
    return read_bytes(path).decode("utf-8")


def write_text(path: Place, text: str) -> None:
    """Write ``text`` (UTF-8) as a whole file, as ``replacing`` does."""
    with replacing(path) as file:
        file.write(text.encode())


def append_text(path: Place, text: str) -> None:
    """Append ``text`` (UTF-8). A missing file or folder is made. At a URI the whole file is written
    again."""
    if is_remote(path):
        before = read_text(path) if exists(path) else ""
        write_text(path, before + text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def remove_folder(folder: Place, marker: str) -> None:
    """Remove a folder; a kill leaves no half of it that looks whole."""
    if is_remote(folder):
        remove(folder / marker)
        with reaching(folder):
            folder.fs.rm(folder.path, recursive=True)
        return
    hidden = folder.with_name(f"{partial_name(folder.name)}-old")  # ``remove_partial`` finds it
    folder.rename(hidden)
    shutil.rmtree(hidden)


def rename_folder(folder: Place, name: str, marker: str) -> None:
    """Rename a folder; after a kill it is whole under one of the names, or under both."""
    if not is_remote(folder):
        folder.rename(folder.with_name(name))
        return
    with reaching(folder):
        folder.fs.copy(folder.path, folder.with_name(name).path, recursive=True)
        remove_folder(folder, marker)
