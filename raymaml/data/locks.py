"""The right of one process to write a folder, on disk and at URIs.

On disk it is a lock of the operating system, which ends with the process. At a URI it is a lease: a
file that one process alone could create, and that its holder writes anew every few seconds. Whoever
finds it waits until it has not changed for a while, by his own clock, and takes it over then; of a
process of the same machine he can see that it has ended, and need not wait. A holder that was
suspended, or cut off, for so long finds that out by the check that ``hold`` gives it.
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

from raymaml.data.files import reaching, read_bytes, unreachable
from raymaml.errors import UserError
from raymaml.places import Place, is_remote

__all__ = ["Timeout", "hold"]

RENEWED = 5.0
"""Seconds after which the holder of a lease writes it anew."""
EXPIRED = 30.0
"""Seconds without a change after which a lease is nobody's."""


@contextlib.contextmanager
def hold(path: Place, *, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold the lock ``path`` for the length of the block, and yield what checks that it is held.

    Args:
        path: of the lock's own file.
        timeout: seconds to wait for another holder's end. At a URI whether a holder lives takes up
            to ``EXPIRED`` seconds to see; these are waited in any case.

    Raises:
        Timeout: another process holds it.
        UserError: the URI cannot be reached; from the check: another process has taken it over.
    """
    if not is_remote(path):
        with FileLock(path, timeout=timeout):
            yield lambda: None
        return
    lease = _Lease(path)
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


class _Lease:
    def __init__(self, path: UPath) -> None:
        self._path = path
        token = secrets.token_hex(8)
        self._owner = {"host": _host(), "pid": os.getpid(), "token": token}
        self._count = 0
        self._released = threading.Event()

    def acquire(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._create():
            found = self._read()
            if found is None:  # released in between
                continue
            if self._lives(found):
                if time.monotonic() >= deadline:
                    raise Timeout(str(self._path))
                continue
            self._path.unlink(missing_ok=True)
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        with contextlib.suppress(Exception):  # what cannot be removed is nobody's after a while
            if self._is_mine():
                self._path.unlink(missing_ok=True)

    def require(self) -> None:
        with reaching(self._path):
            mine = self._is_mine()
        if not mine:
            raise UserError(
                f"{self._path}: another process has taken over, since this one gave no sign of life"
                f" for {EXPIRED:g} s (suspended, or cut off from the storage); this one writes no"
                " more: leave it to the other"
            )

    def _create(self) -> bool:
        try:
            with self._path.open("xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _lives(self, found: bytes) -> bool:
        """Watch a lease until it changes, is a dead process's, or has shown no sign for long."""
        expires = time.monotonic() + EXPIRED
        while time.monotonic() < expires and not _is_dead(found):
            time.sleep(min(1, RENEWED))
            if self._read() != found:
                return True
        return False

    def _renew(self) -> None:
        while not self._released.wait(RENEWED):
            with contextlib.suppress(Exception):  # the storage may be away for a moment
                if not self._is_mine():  # taken over by one who saw no sign of life of this process
                    return
                self._path.write_bytes(self._content())

    def _read(self) -> bytes | None:
        try:
            return read_bytes(self._path)
        except FileNotFoundError:
            return None

    def _is_mine(self) -> bool:
        return _owner(self._read()).get("token") == self._owner["token"]

    def _content(self) -> bytes:
        self._count += 1
        return json.dumps({**self._owner, "count": self._count}).encode()


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


def _is_dead(content: bytes) -> bool:
    """Tell whether the holder was a process of this machine that has ended."""
    owner = _owner(content)
    pid = owner.get("pid")
    if owner.get("host") != _host() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
