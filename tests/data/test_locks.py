"""One process at a time may write a folder, on disk and at a URI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raymaml.data import locks
from raymaml.data.locks import Timeout, hold
from raymaml.errors import UserError
from raymaml.places import Place, is_remote


@pytest.fixture(params=["disk", "s3"])
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return tmp_path / ".lock"
    found: Place = request.getfixturevalue("s3")
    return found / ".lock"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases whose signs of life come, and are missed, sooner."""
    monkeypatch.setattr(locks, "RENEWED", 0.2)
    monkeypatch.setattr(locks, "EXPIRED", 2.0)


def foreign(count: int = 1) -> bytes:
    """A lease of another machine."""
    return json.dumps({"host": "elsewhere", "pid": 1, "token": "t", "count": count}).encode()


@pytest.mark.usefixtures("quick")
def test_a_second_holder_is_refused_while_the_first_lives(lock: Place) -> None:
    with hold(lock, timeout=0), pytest.raises(Timeout), hold(lock, timeout=0):
        pass
    with hold(lock, timeout=0):
        pass  # released, it is free


@pytest.mark.usefixtures("quick")
def test_waiting_for_a_holder_that_ends(lock: Place) -> None:
    held, let_go = threading.Event(), threading.Event()

    def other() -> None:
        with hold(lock, timeout=0):
            held.set()
            let_go.wait()

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    threading.Timer(0.5, let_go.set).start()
    with hold(lock, timeout=60):
        assert let_go.is_set()
    thread.join()


@pytest.mark.usefixtures("quick")
def test_a_lease_without_signs_of_life_is_taken_over(s3: Place) -> None:
    (s3 / ".lock").write_bytes(foreign())
    with hold(s3 / ".lock", timeout=0):
        owner = json.loads((s3 / ".lock").read_bytes())
        assert owner["pid"] == os.getpid()
    assert not (s3 / ".lock").exists()


def test_a_lease_that_is_renewed_is_not(s3: Place) -> None:
    """Another machine's holder writes its lease anew, a count further each time."""
    lease, done = s3 / ".lock", threading.Event()
    lease.write_bytes(foreign())

    def live() -> None:
        count = 1
        while not done.wait(0.2):
            count += 1
            lease.write_bytes(foreign(count))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(Timeout), hold(lease, timeout=0):
            pass
    finally:
        done.set()
        thread.join()
    assert json.loads(lease.read_bytes())["host"] == "elsewhere"


def test_of_a_dead_process_of_this_machine_nothing_is_awaited(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"host": locks._host(), "pid": dead.pid, "token": "t", "count": 1}
    (s3 / ".lock").write_bytes(json.dumps(owner).encode())
    monkeypatch.setattr(locks, "EXPIRED", float("inf"))  # a wait would never end
    with hold(s3 / ".lock", timeout=0):
        pass


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_expires_too(s3: Place, content: bytes) -> None:
    (s3 / ".lock").write_bytes(content)
    with hold(s3 / ".lock", timeout=0):
        pass


def test_a_holder_finds_out_that_another_took_over(lock: Place) -> None:
    with hold(lock, timeout=0) as require_held:
        require_held()
        lock.write_bytes(foreign())
        if not is_remote(lock):  # there the operating system holds it, whatever the file says
            require_held()
            return
        with pytest.raises(UserError, match="another process has taken over, since this one gave"):
            require_held()
    assert lock.read_bytes() == foreign()  # and leaves it to the other
