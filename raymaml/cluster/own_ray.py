"""A Ray that raymaml starts on this machine: its folder, its token, its processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raymaml.common.errors import UserError
from raymaml.doctor.machine import LONGEST_BASE, ray_folder
from raymaml.storage.temporary import left_by_the_dead, this_machine

_LOG = logging.getLogger(__name__)
_NAMES = 0x100
"""Folders of Ray that a machine may have in one place: two hexadecimal digits tell them apart."""
_SHORT = Path("/tmp")
"""Holds Ray's folder where the path of the usual temporary folder is too long for sockets."""


@contextlib.contextmanager
def own_ray(num_cpus: int | None) -> Iterator[dict[str, Any]]:
    """Yield the arguments of ``ray.init`` that start a Ray for the block.

    Ray has a folder to itself, ``raymaml.*`` in the usual temporary folder, which is removed after
    the block. Where the block ends with an error, or the process is killed, the folder stays, with
    Ray's logs, until a Ray is started there again.

    Args:
        num_cpus: logical CPUs of Ray; None: as many as there are cores.

    Raises:
        UserError: no folder can be made.
    """
    _stay_on_loopback()
    # Ray's default, 15, leaves workers half the time that another process beside them gets.
    os.environ.setdefault("RAY_worker_niceness", "0")
    folder, lock = _make_folder()
    try:
        _require_token()
        yield {"address": "local", "num_cpus": num_cpus, "_temp_dir": str(folder / "r")}
    except Exception:
        _LOG.info("the logs of Ray are under %s", folder)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@contextlib.contextmanager
def own_sessions() -> Iterator[None]:
    """Give each process of Ray that this one starts in the block a session of its own.

    A signal to the process group of the driver, such as that of ``timeout`` or of a scheduler, then
    reaches the driver alone, which stops Ray itself. The kernel still ends them with the driver.
    """
    from ray._private import services

    usual = services.ConsolePopen
    services.ConsolePopen = functools.partial(usual, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = usual


def _stay_on_loopback() -> None:
    """Make 127.0.0.1 the address of a Ray that starts here, unless the environment forbids it.

    Then nobody else can reach its job server, dashboard, agents, object store or workers. So Ray
    does it by itself on macOS and Windows; elsewhere only the dashboard is so by default. Ray reads
    the variable when it is imported, which may have been before.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    os.environ.setdefault(name, "0")
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(name, False)


def _make_folder() -> tuple[Path, int]:
    """Make a folder for Ray and lock it; return it and the file descriptor that holds the lock."""
    usual = ray_folder()
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
        f"Ray cannot have a folder in {usual} ({problem}); set RAY_TMPDIR to a folder that this"
        f" user can write and whose path has at most {LONGEST_BASE} bytes, or give --local to run"
        " without Ray"
    )


def _lock_new_folder(base: Path) -> tuple[Path, int]:
    """Make and lock a folder; its name is short, for each byte of it is one of sockets' paths.

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
    """Remove the folders in ``base`` whose drivers are dead, and kill what is left of their Rays.

    A folder is this user's own, and nobody else can write into it. Its driver holds a lock on it
    for as long as it lives. An empty folder may be one that is about to be locked.
    """
    for folder in base.resolve().glob(f"{_prefix()}*"):
        # another process has just removed it, or may alone
        with contextlib.suppress(OSError), left_by_the_dead(folder) as handle:
            if os.fstat(handle).st_uid == os.getuid() and any(folder.iterdir()):
                _kill_users(folder)
                shutil.rmtree(folder, ignore_errors=True)


def _kill_users(folder: Path) -> None:
    """Kill this user's other processes that write into the folder, as all of Ray's write logs.

    Processes that only read there, such as ``tail -f``, are somebody else's. Linux alone shows
    which files processes have open.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if process.stat().st_uid != os.getuid() or int(process.name) == os.getpid():
                continue
            if any(_writes(file, folder) for file in (process / "fd").iterdir()):
                os.kill(int(process.name), signal.SIGKILL)


def _writes(file: Path, folder: Path) -> bool:
    """Tell whether a file descriptor ``/proc/PID/fd/FD`` is of a file below ``folder``, to write.

    See proc_pid_fdinfo(5): "flags" are those of open(2), in octal digits.
    """
    with contextlib.suppress(OSError):  # it has just been closed
        if str(file.readlink()).startswith(f"{folder}/"):
            lines = (file.parents[1] / "fdinfo" / file.name).read_text("ascii").splitlines()
            (flags,) = (line.split()[1] for line in lines if line.startswith("flags:"))
            return bool(int(flags, 8) & (os.O_WRONLY | os.O_RDWR))
    return False


def has_token() -> bool:
    """Tell whether the user has a token for Ray clusters, and let no other user read its file.

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
