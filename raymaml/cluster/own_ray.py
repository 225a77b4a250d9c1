"""A Ray that raymaml starts on this machine: its folder, its token, its processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from raymaml.cluster.internals import on_loopback, token_mode
from raymaml.common.errors import UserError
from raymaml.storage.temporary import left_by_the_dead, this_machine

_LOG = logging.getLogger(__name__)
_SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes that the path of a socket may have..."""
_LONGEST = (
    "/raymaml.123456/r/session_2026-01-01_00-00-00_000000_1234567/sockets/dash_TaskEventsHead"
)
"""...and the longest path below the temporary folder of a Ray that raymaml starts."""
LONGEST_BASE = _SOCKET_PATH - len(_LONGEST)
"""Bytes that the path of this temporary folder may have."""
_NAMES = 0x100
"""Folders of Ray that a machine may have in one place: two hexadecimal digits tell them apart."""
_SHORT = Path("/tmp")
"""Holds Ray's folder where the path of the usual temporary folder is too long for sockets."""
_TRIES, _PAUSE = 20, 0.1
"""How often a folder is removed whose processes are being killed, and seconds between two tries."""
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Variable that lets Ray listen beyond this machine, whatever the operating system."""


@contextlib.contextmanager
def set_where_unset(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block, except those that the user has set."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def own_ray() -> Iterator[dict[str, Any]]:
    """Yield the arguments of ``ray.init`` that start a Ray for the block.

    Ray has a folder to itself, ``raymaml.*`` in the usual temporary folder, which is removed after
    the block. Where the block ends with an error, or the process is killed, the folder stays, with
    Ray's logs, until a Ray is started there again.

    Nobody outside this machine reaches its job server, dashboard, agents, object store or workers:
    127.0.0.1 is its address, unless the user lets Ray listen elsewhere. It asks for a token.

    Raises:
        UserError: no folder can be made.
    """
    folder, lock = _make_folder()
    variables = {
        _CLUSTERS: "0",
        # Ray's default, 15, leaves workers half the time that another process beside them gets.
        "RAY_worker_niceness": "0",
    }
    keep = False
    try:
        with set_where_unset(variables), token_mode(), _address():
            _require_token()
            yield {"address": "local", "_temp_dir": str(folder / "r")}
    except Exception:
        keep = True
        _LOG.info("the logs of Ray are under %s", folder)
        raise
    finally:
        if not keep:
            _remove(folder)
        os.close(lock)


def _address() -> contextlib.AbstractContextManager[None]:
    allowed = os.environ[_CLUSTERS].lower() in ("1", "true")
    return contextlib.nullcontext() if allowed else on_loopback()


def _make_folder() -> tuple[Path, int]:
    """Make a folder for Ray and lock it; return it and the file descriptor that holds the lock."""
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    problem = f"its path has more than {LONGEST_BASE} bytes, too many for sockets"
    for base in (usual, _SHORT):
        if len(os.fsencode(base.resolve())) > LONGEST_BASE:
            continue
        try:
            base.mkdir(parents=True, exist_ok=True)
            _clear(base)
            made = _lock_new_folder(base)
        except OSError as error:
            problem = error.strerror or str(error)
            continue
        if base is not usual:
            _LOG.info("Ray's folder is under %s, not %s: %s", base, usual, problem)
        return made
    raise UserError(
        f"Ray cannot have a folder in {usual} ({problem})",
        remedy="set RAY_TMPDIR to a folder that this user can write and whose path has at most"
        f" {LONGEST_BASE} bytes, or give --local to run without Ray",
    )


def _lock_new_folder(base: Path) -> tuple[Path, int]:
    """Make and lock a folder; its name is short, because the path of each socket contains it and
    has a limit.

    Raises:
        OSError: it cannot be made, or all names are taken.
    """
    for number in secrets.SystemRandom().sample(range(_NAMES), _NAMES):
        folder = base.resolve() / f"{_prefix()}{number:02x}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return folder, lock
    raise OSError(errno.EEXIST, f"all {_NAMES} names of Ray's folders in it are taken")


def _prefix() -> str:
    """Return how the names of this machine's folders begin: other machines may share the disk."""
    return f"raymaml.{this_machine()[:4]}"


def _clear(base: Path) -> None:
    """Remove the folders in ``base`` whose drivers are dead, and kill the rest of their Rays.

    A folder is this user's own, and nobody else can write into it. Its driver holds a lock on it
    for as long as it lives. An empty folder may be one that is about to be locked.
    """
    for folder in base.resolve().glob(f"{_prefix()}*"):
        # A living process holds the folder, another process has just removed it, or only another
        # user may open it.
        with contextlib.suppress(OSError), left_by_the_dead(folder) as handle:
            if os.fstat(handle).st_uid == os.getuid() and any(folder.iterdir()):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder of Ray, after this user's other processes that write into it.

    Those of the dashboard outlive ``ray.shutdown`` by a second, and a worker that starts makes its
    folders again: a file that one of them makes meanwhile would keep the folder.
    """
    for _ in range(_TRIES):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
                if process.pid != os.getpid() and _writes(process, folder):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_PAUSE)  # a killed process ends its last call


def _writes(process: psutil.Process, folder: Path) -> bool:
    """Return whether a process has a file below the folder open to write, or will have.

    Every process of Ray writes a log there; before it does, its arguments name the folder, as in
    ``--temp-dir=``. Processes that only read there, such as ``tail -f``, are somebody else's.
    """
    if any(f"={folder}/" in argument for argument in process.cmdline()):
        return True
    written = [file.path for file in process.open_files() if file.mode != "r"]
    return any(path.startswith(f"{folder}/") for path in written)


def has_token() -> bool:
    """Return whether the user has a token for Ray clusters, and let no other user read its file.

    Ray itself makes that file readable by all.
    """
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return True
    path = _token_file()
    with contextlib.suppress(OSError):  # there is none, or it is another user's
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    return path.is_file()


def _token_file() -> Path:
    return Path(os.environ.get("HOME") or os.devnull) / ".ray" / "auth_token"


def _require_token() -> None:
    """Make a token where Ray would make one: in the home, or in the environment if it cannot be."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or has_token():
        return
    path, token = _token_file(), secrets.token_hex(32)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii") as file:
            file.write(token)
            file.flush()
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(file.name, path)
    except OSError as error:
        _LOG.info("no token is kept for the next Ray: %s", error)
        os.environ["RAY_AUTH_TOKEN"] = token
