"""Folders that appear whole or not at all, and the checksum of a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raymaml.errors import storage_error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden empty folder beside ``folder``; rename it to ``folder`` when the block ends.

    Files and folder are on disk before the rename. When the block raises, nothing remains.

    Raises:
        FileExistsError: ``folder`` exists; it is left as it is.
        StorageError: the storage refuses; the message says how much room there is.
    """
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        with storing(folder, partial):
            partial.mkdir(parents=True)
            yield partial
            for path in partial.iterdir():
                _fsync(path)
            _fsync(partial)
            if folder.exists():  # os.rename would replace an empty folder
                raise FileExistsError(folder)
            partial.rename(folder)
            _fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file beside ``path`` that takes its place, whole, when the block ends.

    A reader sees the old file or the new one, never a part; an error leaves the old one. The
    folder is made when it is missing.

    Raises:
        StorageError: the storage refuses; the message says how much room there is.
    """
    hidden = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
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
def storing(path: Path, partial: Path) -> Iterator[None]:
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


def _space(path: Path, partial: Path) -> str:
    """Say how much room is left beside what ``partial`` holds by now, which was not enough."""
    try:
        there = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(there).free
        files = partial.iterdir() if partial.is_dir() else [partial]
        written = sum(file.stat().st_size for file in files if file.exists())
    except OSError:
        return ""
    return f"{free:,} bytes are free in {there} and more than {written + free:,} are needed"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds the old or the new whole, never a part."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left of files and folders that never became whole."""
    for path in folder.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
