"""The right of one process to write a folder, on disk and at URIs.

On disk it is a lock of the operating system, which ends with the process. At a URI it is a lease.
Leases are numbered files in a folder, and the highest number is the lease that counts. Its holder
renews it every few seconds. A lease is free if it was released, if its holder is a dead process of
this machine, or if it does not change for ``EXPIRED`` seconds by the clock of the process that
looks. A process takes a free lease by creating the next number. A storage lets one process alone
create a file, so exactly one process gets the next number. The highest number is never removed, so
a late process cannot get a number that counts. A holder that was suspended or cut off learns from
the check that ``hold`` yields that another process has taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from upath import UPath

from raymaml.common.errors import UserError
from raymaml.storage.files import reaching, read_bytes
from raymaml.storage.place import Place, is_remote

RENEWED = 5.0
"""Seconds between two renewals of a lease."""
EXPIRED = 30.0
"""Seconds without a change after which a lease is free."""
_LOOK_EVERY = 1.0
"""Seconds between two looks at the lease of another process."""


@contextlib.contextmanager
def hold(path: Place, *, taken: UserError, timeout: float = 0) -> Iterator[Callable[[], None]]:
    """Hold the lock ``path`` for the length of the block, and yield a check that it is held.

    Args:
        path: the lock's own file on disk; at a URI, the folder of its leases.
        taken: the error to raise if another process holds the lock.
        timeout: seconds to wait for another holder to end. At a URI it takes up to ``EXPIRED``
            seconds to see whether a holder lives; this wait comes first in any case.

    Raises:
        UserError: ``taken``, or the URI cannot be reached; from the check: another process has
            taken over.
    """
    lock = Lease(path) if is_remote(path) else FileLock(path)
    try:
        with reaching(path, Timeout):
            lock.acquire(timeout)
    except Timeout:
        raise taken from None
    try:
        yield lock.require if isinstance(lock, Lease) else lambda: None
    finally:
        lock.release()


class Lease:
    """The right of one process to write at a URI.

    Args:
        folder: the folder of the numbered leases.
    """

    def __init__(self, folder: UPath) -> None:
        self._folder = folder
        self._owner = {"host": _host(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._number = 0
        self._renewals = 0
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, timeout: float = 0) -> None:
        """Take the next number once the highest lease is free.

        Raises:
            Timeout: another process still holds it after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self._take():
            if time.monotonic() >= deadline:
                raise Timeout(str(self._folder))
        for number in self._numbers():
            if number < self._number:
                self._file(number).unlink(missing_ok=True)
        self._renewing.start()

    def require(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            UserError: another process has taken over, or the URI cannot be reached.
        """
        with reaching(self._folder):
            mine = self._is_mine()
        if not mine:
            raise UserError(
                f"{self._folder}: another process has taken over, since this one gave no sign of"
                f" life for {EXPIRED:g} s (suspended, or cut off from the storage); this process"
                " stops writing",
                remedy="leave the folder to the other one",
            )

    def release(self) -> None:
        """Mark the lease as free; its file stays, as the highest number."""
        self._ended.set()
        self._renewing.join()
        with contextlib.suppress(Exception):  # a lease that cannot be marked expires
            if self._is_mine():
                self._file(self._number).write_bytes(json.dumps({"released": True}).encode())

    def _take(self) -> bool:
        """Create the next number if the highest lease is free; return whether it counts."""
        highest = self._highest()
        if self._is_held(highest) or not self._create(highest + 1):
            return False
        if self._highest() > highest + 1:  # others have used and removed this number before
            self._file(highest + 1).unlink(missing_ok=True)
            return False
        self._number = highest + 1
        return True

    def _is_held(self, number: int) -> bool:
        """Watch a lease. Return True once its holder changes it, and False once it is free or has
        expired."""
        found = self._read(number)
        expires = time.monotonic() + EXPIRED
        while not _is_free(found) and time.monotonic() < expires:
            time.sleep(_LOOK_EVERY)
            if self._read(number) != found:
                return True
        return False

    def _create(self, number: int) -> bool:
        try:
            with self._file(number).open("xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with contextlib.suppress(Exception):  # the storage may be away for a moment
                if not self._is_mine():
                    return
                self._file(self._number).write_bytes(self._content())

    def _is_mine(self) -> bool:
        owner = _owner(self._read(self._number))
        return owner.get("token") == self._owner["token"] and self._highest() == self._number

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            paths = self._folder.fs.ls(self._folder.path, detail=False, refresh=True)
            names = [path.rstrip("/").rpartition("/")[2] for path in paths]
            return [int(name) for name in names if name.isdecimal()]
        return []

    def _file(self, number: int) -> UPath:
        return self._folder / f"{number:08d}"

    def _read(self, number: int) -> bytes | None:
        try:
            return read_bytes(self._file(number))
        except FileNotFoundError:
            return None

    def _content(self) -> bytes:
        self._renewals += 1
        return json.dumps({**self._owner, "renewals": self._renewals}).encode()


def _is_free(lease: bytes | None) -> bool:
    """Return whether a lease is absent, released, or of a dead process of this machine."""
    owner = _owner(lease)
    if lease is None or owner.get("released") is True:
        return True
    if owner.get("host") != _host() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or no number of a process
        return False
    return False


def _owner(lease: bytes | None) -> dict[str, Any]:
    try:
        owner = json.loads(lease or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _host() -> str:
    """Return a name for the machine and the container. Process numbers are unique within both."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # on Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
