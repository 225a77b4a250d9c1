"""The right of one process to write a folder, on disk and at URIs.

On disk it is a lock of the operating system, which ends with the process. At a URI it is a lease.
Leases are numbered files in a folder, and the highest number is the lease that counts. Its holder
renews it every few seconds. A process that finds it released, or of a dead process, or without a
change for ``EXPIRED`` seconds by its own clock, creates the next number. A storage lets one process
alone create a file, so exactly one process gets the next number. The highest number is never
removed, so a late process cannot get a number that counts. A holder that was suspended or cut off
finds out by the check that ``hold`` yields.
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

from filelock import FileLock, Timeout
from upath import UPath

from raymaml.common.errors import UserError
from raymaml.storage.files import reaching, read_bytes, unreachable
from raymaml.storage.place import Place, is_remote

__all__ = ["Lease", "Timeout", "hold"]

RENEWED = 5.0
"""Seconds between two renewals of a lease."""
EXPIRED = 30.0
"""Seconds without a change after which a lease is free."""


@contextlib.contextmanager
def hold(path: Place, *, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold the lock ``path`` for the length of the block, and yield a check that it is held.

    Args:
        path: the lock's own file on disk; at a URI, the folder of its leases.
        timeout: seconds to wait for another holder to end. At a URI it takes up to ``EXPIRED``
            seconds to see whether a holder lives; this wait comes first in any case.

    Raises:
        Timeout: another process holds it.
        UserError: the URI cannot be reached; from the check: another process has taken it over.
    """
    if not is_remote(path):
        with FileLock(path, timeout=timeout):
            yield lambda: None
        return
    lease = Lease(path)
    try:
        lease.acquire(timeout)
    except Timeout:
        raise
    except Exception as error:
        raise unreachable(path, error) from None
    try:
        yield lease.require
    finally:
        lease.release()


class Lease:
    """The right to write, at a URI, of one process.

    Args:
        folder: of the numbered leases.
    """

    def __init__(self, folder: UPath) -> None:
        self._folder = folder
        self._owner = {"host": _host(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._number = 0
        self._renewals = 0
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, timeout: float) -> None:
        """Take the next number once the highest lease is free.

        Raises:
            Timeout: another process still holds it after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            highest = self._highest()
            if self._is_held(highest):
                if time.monotonic() >= deadline:
                    raise Timeout(str(self._folder))
            elif self._create(highest + 1):
                if self._highest() == highest + 1:
                    break
                self._file(highest + 1).unlink(missing_ok=True)  # it was used and removed before
        self._number = highest + 1
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
                " stops writing: leave the folder to the other one"
            )

    def release(self) -> None:
        """Mark the lease as free; its file stays, as the highest number."""
        self._ended.set()
        self._renewing.join()
        with contextlib.suppress(Exception):  # a lease that cannot be marked expires
            if self._is_mine():
                self._file(self._number).write_bytes(json.dumps({"released": True}).encode())

    def _create(self, number: int) -> bool:
        try:
            with self._file(number).open("xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _is_held(self, number: int) -> bool:
        """Watch a lease until it changes; it is free if released, dead or expired."""
        found = self._read(number)
        expires = time.monotonic() + EXPIRED
        while found is not None and time.monotonic() < expires and not _is_free(found):
            time.sleep(min(1, RENEWED))
            if self._read(number) != found:
                return True
        return False

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with contextlib.suppress(Exception):  # the storage may be away for a moment
                if not self._is_mine():
                    return
                self._file(self._number).write_bytes(self._content())

    def _is_mine(self) -> bool:
        return (
            _owner(self._read(self._number)).get("token") == self._owner["token"]
            and self._highest() == self._number
        )

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        """List the numbers of the leases; 0 stands for none."""
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


def _owner(content: bytes | None) -> dict[str, object]:
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _host() -> str:
    """Return a name of this machine, and of the container in it: where process numbers hold."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # on Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_free(content: bytes) -> bool:
    """Say whether a lease was released, or is of a process of this machine that has ended."""
    owner = _owner(content)
    pid = owner.get("pid")
    if owner.get("released") is True:
        return True
    if owner.get("host") != _host() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
