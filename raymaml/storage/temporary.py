"""Folders on disk that a process makes for a while, and that are removed even if it is killed.

Its maker holds a lock of the operating system on the folder. A killed process holds none, so the
next one that makes a folder of the same name removes what the dead have left. On a disk that
machines share (NFS), a lock may hold on its own machine alone. So the name holds the machine, and
each machine removes only its own folders. Folders of versions that named no machine stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from raymaml.storage.place import Place, is_remote

_LONGEST = 200
"""Bytes of a name; file systems take 255."""


def this_machine() -> str:
    """Return eight hexadecimal digits that stand for this machine: of a hash of its name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def own_name(name: str) -> str:
    """Return ``<name>-<machine><random>``; ``remove_dead`` looks for this machine's."""
    return f"{name}-{this_machine()}{secrets.token_hex(4)}"


@contextlib.contextmanager
def own_folder(parent: Path, name: str, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new folder, ``own_name(name)`` in ``parent``.

    After the block it is removed, if it still has its name.

    Args:
        parent: is made if it is missing.
        name: how the name begins.
        mode: rights of the folder, less those that the umask takes.

    Raises:
        OSError: it cannot be made.
    """
    remove_dead(parent, escape(name))
    folder = parent / own_name(name)
    handle = _made(folder, mode)
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
    """Return an ``own_folder`` where this machine keeps temporary files, for its user alone."""
    return own_folder(Path(tempfile.gettempdir()), "raymaml-temporary", mode=0o700)


def remove_dead(parent: Path, pattern: str) -> None:
    """Remove the folders in ``parent`` whose makers on this machine have ended.

    Args:
        parent: where they lie.
        pattern: of the names that ``own_name`` was given.
    """
    with contextlib.suppress(OSError):  # somebody else's
        for path in parent.glob(f"{pattern}-{this_machine()}{'[0-9a-f]' * 8}"):
            with contextlib.suppress(OSError), left_by_the_dead(path):
                shutil.rmtree(path, ignore_errors=True)


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


def _made(folder: Path, mode: int) -> int:
    """Make a folder and return its locked descriptor.

    Before it is locked, another process may take it for a dead one's; then it is made again.
    """
    while True:
        folder.mkdir(mode, parents=True)
        with contextlib.suppress(FileNotFoundError):
            handle = _locked(folder)
            if folder.is_dir():
                return handle
            os.close(handle)


@contextlib.contextmanager
def left_by_the_dead(folder: Path) -> Iterator[int]:
    """Hold, and yield, the descriptor of a folder that no living process holds.

    Raises:
        OSError: one does, or there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    finally:
        os.close(handle)
