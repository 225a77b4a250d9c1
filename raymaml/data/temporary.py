"""Folders on disk that a process makes for a while, and that are removed even if it is killed.

Its maker holds a lock of the operating system on the folder. A killed process holds none, so the
next one that makes a folder of the same name removes what the dead have left. Where folders cannot
be locked for it (NFS), what a kill leaves stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from raymaml.places import Place, is_remote

_LONGEST = 200
"""Bytes of a name; file systems take 255."""


@contextlib.contextmanager
def own_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder ``<parent>/<name>-<random>``; if it still has its name, it is removed.

    Raises:
        OSError: it cannot be made.
    """
    remove_dead(parent, f"{escape(name)}-*")
    folder = parent / f"{name}-{secrets.token_hex(4)}"
    handle = _made(folder)
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def partial_name(name: str) -> str:
    """Return the hidden name, without its ending, of what is called ``name`` once it is whole.

    A long one is shortened, for the ending must fit behind it.
    """
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{name[:40]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.partial"


def temporary_folder() -> contextlib.AbstractContextManager[Path]:
    """Return an ``own_folder`` where this machine keeps temporary files."""
    return own_folder(Path(tempfile.gettempdir()), "raymaml-temporary")


def remove_dead(parent: Path, pattern: str) -> None:
    """Remove the folders in ``parent`` whose makers have ended, of names that fit a pattern."""
    with contextlib.suppress(OSError):  # somebody else's
        for path in parent.glob(pattern):
            _remove_if_dead(path)


@contextlib.contextmanager
def held(folder: Place) -> Iterator[None]:
    """Keep ``remove_dead`` from removing a folder on disk for the length of the block."""
    if is_remote(folder):
        yield
        return
    handle = _locked(folder)
    try:
        yield
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _made(folder: Path) -> int:
    """Make a folder and return its locked descriptor."""
    while True:
        folder.mkdir(parents=True)
        handle = _locked(folder)
        if folder.is_dir():  # nobody took it for a dead one's before it was locked
            return handle
        os.close(handle)


def _remove_if_dead(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
