"""Unfinished and temporary folders on disk, which are removed even if their maker is killed.

The process that makes such a folder holds a lock of the operating system on it. A killed process
holds none, so the next process that makes a folder of the same name removes the remains. On a disk
that machines share (NFS), a lock may hold on its own machine alone. So the name of a folder holds
its machine, and each machine removes its own folders only. Older versions put no machine in the
name; their folders stay.
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
"""Maximum number of bytes of a name; file systems take 255."""


def this_machine() -> str:
    """Return eight hexadecimal digits that stand for this machine, from a hash of its name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def own_name(name: str) -> str:
    """Return ``<name>-<machine><random>``, which ``remove_dead`` finds on this machine."""
    return f"{name}-{this_machine()}{secrets.token_hex(4)}"


@contextlib.contextmanager
def own_folder(parent: Path, name: str, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new folder, ``own_name(name)`` in ``parent``.

    After the block it is removed, unless it was renamed.

    Args:
        parent: the folder that holds it; a missing one is made.
        name: the beginning of the name.
        mode: permissions of the folder; the umask removes some.

    Raises:
        OSError: it cannot be made.
    """
    remove_dead(parent, escape(name))
    folder = parent / own_name(name)
    with contextlib.ExitStack() as stack:
        while True:
            folder.mkdir(mode, parents=True)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(held(folder))
            if folder.is_dir():  # else another process took it for a dead one before it was held
                break
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def partial_name(name: str) -> str:
    """Return the beginning of the hidden name that an unfinished ``name`` has.

    A long name is shortened: the ending must fit behind it.
    """
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{name[:40]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.partial"


def temporary_folder() -> contextlib.AbstractContextManager[Path]:
    """Return an ``own_folder`` among this machine's temporary files, for this user alone."""
    return own_folder(Path(tempfile.gettempdir()), "raymaml-temporary", mode=0o700)


def remove_dead(parent: Path, pattern: str) -> None:
    """Remove the folders in ``parent`` that ended processes of this machine have left.

    Args:
        parent: the folder that holds them.
        pattern: a pattern (glob) for the names that were given to ``own_name``.
    """
    with contextlib.suppress(OSError):  # another user's
        for path in parent.glob(f"{pattern}-{this_machine()}{'[0-9a-f]' * 8}"):
            with contextlib.suppress(OSError), left_by_the_dead(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Place) -> Iterator[None]:
    """Keep ``remove_dead`` from removing a folder on disk during the block."""
    if is_remote(folder):
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def left_by_the_dead(folder: Path) -> Iterator[int]:
    """Lock a folder that no living process holds, and yield its descriptor.

    Raises:
        OSError: a living process holds it, or it does not exist.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    finally:
        os.close(handle)


def remove_partial(folder: Place) -> None:
    """Remove the unfinished files and folders that killed processes left in ``folder``.

    At a URI there are none: a folder without its marker is overwritten.
    """
    if is_remote(folder):
        return
    for path in folder.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
