"""A Ray that raymaml starts: its folder, its token, and what a kill leaves of it."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from machinery import fresh_shell

from raymaml.cluster import own_ray as module
from raymaml.cluster import runtime
from raymaml.cluster.own_ray import has_token, own_ray
from raymaml.common.errors import UserError

NICENESS, CLUSTERS = "RAY_worker_niceness", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_ours_alone_and_stays_after_an_error_until_the_next_start(base: Path) -> None:
    for ended_by in (None, KeyboardInterrupt(), SystemExit(), OSError("no")):
        with contextlib.suppress(KeyboardInterrupt, SystemExit, OSError), own_ray() as arguments:
            (folder,) = base.iterdir()
            assert arguments == {"address": "local", "_temp_dir": f"{folder}/r"}
            assert mode(folder) == 0o700
            (folder / "r").mkdir()
            if ended_by is not None:
                raise ended_by
        # the logs stay, for the error
        assert list(base.iterdir()) == ([folder] if isinstance(ended_by, OSError) else [])
    with own_ray():
        (other,) = base.iterdir()
        assert other != folder


def test_what_is_alive_or_not_ours_stays(base: Path, tmp_path: Path) -> None:
    with own_ray() as arguments:
        alive = Path(arguments["_temp_dir"])
        alive.mkdir()
        prefix = alive.parent.name[:-2]
        away = tmp_path / "away"
        away.mkdir()
        (away / "file").touch()
        (base / f"{prefix}link").symlink_to(away)
        (base / f"{prefix}file").touch()
        (base / f"{prefix}new").mkdir()  # about to be locked
        (base / "raymaml.000012" / "r").mkdir(parents=True)  # of another machine
        (base / "ray" / "session_1").mkdir(parents=True)  # of a Ray that raymaml did not start
        (base / f"{prefix}dead" / "r").mkdir(parents=True)
        before = set(base.iterdir())
        with own_ray():
            pass
        assert before - set(base.iterdir()) == {base / f"{prefix}dead"}
        assert alive.exists()
        assert (away / "file").exists()


def test_the_processes_of_a_dead_folder_are_ended_and_no_others(base: Path) -> None:
    with own_ray() as arguments:
        prefix = Path(arguments["_temp_dir"]).parent.name[:-2]
    dead = base / f"{prefix}dead"
    dead.mkdir()
    nap = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (dead / "log").open("wb") as log, (base / "log").open("wb") as other:
        theirs = subprocess.Popen(nap, stdout=log)
        stranger = subprocess.Popen(nap, stdout=other)
    with (dead / "log").open("rb") as log:  # `less`, `tail -f`
        reader = subprocess.Popen(nap, stdin=log)
    try:
        with (dead / "own").open("wb"), own_ray():  # as the log of an earlier driver in here
            assert theirs.wait(30) == -9
            assert stranger.poll() is None
            assert reader.poll() is None
            assert not dead.exists()
    finally:
        for process in (theirs, stranger, reader):
            process.kill()
            process.wait()


def test_processes_that_outlive_ray_leave_no_folder(base: Path) -> None:
    """Ray's dashboard goes on for a second, and makes files and folders meanwhile."""
    code = (
        "import itertools, os, sys\n"
        "for number in itertools.count():\n"
        "    name = f'{sys.argv[1]}/r/{number}'\n"
        "    os.makedirs(name, exist_ok=True)\n"
        "    open(f'{name}/file', 'w').close()\n"
        "    print(number, flush=True)\n"
    )
    for _ in range(10):
        with own_ray() as arguments:
            folder = Path(arguments["_temp_dir"]).parent
            with (folder / "log").open("wb") as log:
                command = [sys.executable, "-c", code, str(folder)]
                process = subprocess.Popen(command, stdout=log)
            while not (folder / "r").exists():
                assert process.poll() is None
        assert list(base.iterdir()) == []
        assert process.wait(30) == -9


def test_a_worker_that_starts_makes_no_folder_again(base: Path) -> None:
    """It has no file open yet, but its arguments name the folder; those of `tail` do as well."""
    code = (
        "import os, sys, time\n"
        "folder = sys.argv[1].removeprefix('--temp-dir=')\n"
        "while os.path.exists(folder):\n"
        "    time.sleep(0.001)\n"
        "os.makedirs(folder)\n"
    )
    with own_ray() as arguments:
        room = Path(arguments["_temp_dir"])
        room.mkdir()
        (room / "log").touch()
        starting = subprocess.Popen([sys.executable, "-c", code, f"--temp-dir={room}"])
        wait = [sys.executable, "-c", "import time; time.sleep(600)", str(room / "log")]
        reader = subprocess.Popen(wait)
    try:
        assert list(base.iterdir()) == []
        assert starting.wait(30) == -9
        assert reader.poll() is None
    finally:
        for process in (starting, reader):
            process.kill()
            process.wait()


def test_where_all_names_are_taken_the_next_base_is_used(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two hexadecimal digits are 256 names: longer ones would cost bytes of the sockets' paths."""
    for number in range(0x100):
        (base / f"{module._prefix()}{number:02x}").mkdir()
    free = base / f"{module._prefix()}a7"
    free.rmdir()
    with own_ray() as arguments:
        assert Path(arguments["_temp_dir"]).parent == free
    free.mkdir()
    monkeypatch.setattr(module, "_SHORT", base)
    with pytest.raises(UserError, match=r"\(all 256 names .* taken\); set RAY_TMPDIR to"):
        own_ray().__enter__()
    monkeypatch.setattr(module, "_SHORT", base / "s")
    monkeypatch.setattr(module, "LONGEST_BASE", len(str(base / "s")))
    with own_ray() as arguments:
        assert Path(arguments["_temp_dir"]).parent.parent == base / "s"


def test_a_folder_whose_sockets_would_have_too_long_paths_is_replaced(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_SHORT", base)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 20)))
    with own_ray() as arguments:
        assert Path(arguments["_temp_dir"]).parent.parent == base
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")  # cannot be made
    with own_ray() as arguments:
        assert Path(arguments["_temp_dir"]).parent.parent == base
    monkeypatch.setattr(module, "_SHORT", Path("/proc/none"))
    with pytest.raises(UserError, match=r"set RAY_TMPDIR to .* at most 19 bytes, or give --local"):
        own_ray().__enter__()


def test_a_token_is_the_users_alone(base: Path, tmp_path: Path) -> None:
    assert not has_token()
    token = tmp_path / ".ray" / "auth_token"
    with own_ray():
        assert has_token()
        assert (mode(token.parent), mode(token)) == (0o700, 0o600)
        assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
        written = token.read_text(encoding="ascii")
        assert len(bytes.fromhex(written)) == 32
    with own_ray():
        assert token.read_text(encoding="ascii") == written
    token.chmod(0o644)  # as Ray makes it
    assert has_token()
    assert mode(token) == 0o600


def test_the_token_of_a_user_without_a_home_and_of_one_who_wants_none(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with own_ray():
        assert not (tmp_path / ".ray").exists()
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", "/proc/none")
    with own_ray():
        token = os.environ["RAY_AUTH_TOKEN"]
        assert len(bytes.fromhex(token)) == 32
    with own_ray():  # Ray remembers it, for as long as the process lives
        assert os.environ["RAY_AUTH_TOKEN"] == token


@pytest.mark.parametrize(("release", "found"), [("2.58.1", None), ("2.59.0", "token")])
def test_a_cluster_is_joined_with_the_token_where_its_release_asks_for_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, found: str | None
) -> None:
    """Earlier releases ask where RAY_AUTH_MODE says so, and then here as well."""
    monkeypatch.setattr(runtime, "_require_answer", lambda _address: None)
    monkeypatch.setattr(runtime.ray, "__version__", release)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64, encoding="ascii")
    with runtime._joined("127.0.0.1:1"):
        assert os.environ.get("RAY_AUTH_MODE") == found


def test_the_environment_is_as_before_after_the_block(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the block workers are as nice as other processes, unless the user says otherwise."""
    from ray._private import ray_constants

    before = dict(os.environ)
    with own_ray():
        assert os.environ[NICENESS] == "0"
        assert os.environ[CLUSTERS] == "0"
        assert not ray_constants.ENABLE_RAY_CLUSTER
    assert os.environ == before
    monkeypatch.setenv(NICENESS, "7")
    monkeypatch.setenv(CLUSTERS, "1")
    with own_ray():
        assert os.environ[NICENESS] == "7"
        assert ray_constants.ENABLE_RAY_CLUSTER  # Ray chooses its address


NOTEBOOK = """
import logging, os, signal, time
import ray
from ray._private import worker
from raymaml.cluster.runtime import connected
from raymaml.config.schema import ClusterConfig

def state():
    names = ("ray", "ray.data", "ray.train", "ray.tune")
    levels = [logging.getLogger(name).level for name in names]
    mine = ("RAY_", "TUNE_", "MALLOC_")  # Ray itself sets PYTHONBREAKPOINT
    variables = {name: value for name, value in os.environ.items() if name.startswith(mine)}
    return variables, levels, worker.print_to_stdstream, signal.getsignal(signal.SIGTERM)

@ray.remote
def say(word):
    print(word)

before = state()
with connected(ClusterConfig()):
    assert all(now != then for now, then in zip(state()[:3], before[:3]))
    ray.get(say.remote("quietly"))
assert state() == before, (state(), before)

ray.init(address="local", num_cpus=1)
before = state()
with connected(ClusterConfig()):
    assert state()[1:] == before[1:]
assert state() == before, (state(), before)
ray.get(say.remote("aloud"))
time.sleep(3)  # Ray prints the lines of its workers every second
"""


@pytest.mark.ray
def test_a_notebook_is_not_silenced_beyond_the_call(base: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        env=fresh_shell(tmp_path, RAY_TMPDIR=str(base)),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert shown.returncode == 0, shown.stderr
    assert "aloud" in shown.stdout
    assert "quietly" not in shown.stdout


def test_a_start_that_takes_too_long_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a plain ``Exception`` after 30 s."""

    def too_slow(**_arguments: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(runtime.ray, "init", too_slow)
    problem = r"^Ray does not start on this machine \(The current node timed out during startup"
    with pytest.raises(UserError, match=problem):
        runtime._connect({"address": "local", "_temp_dir": "/tmp/ray"})
