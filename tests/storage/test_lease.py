"""One process at a time may write a folder, on disk and at a URI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.storage import lease as module
from raymaml.storage.lease import Lease, Timeout, hold
from raymaml.storage.place import Place, is_remote


@pytest.fixture(params=["disk", "s3"])
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return tmp_path / ".lock"
    found: Place = request.getfixturevalue("s3")
    return found / ".lock"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases whose signs of life come, and are missed, sooner."""
    monkeypatch.setattr(module, "RENEWED", 0.2)
    monkeypatch.setattr(module, "EXPIRED", 2.0)


def foreign(count: int = 1) -> bytes:
    """A lease of another machine."""
    return json.dumps({"host": "elsewhere", "pid": 1, "token": "t", "count": count}).encode()


def dead() -> bytes:
    """A lease of a process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return json.dumps({"host": module._host(), "pid": process.pid, "token": "t"}).encode()


def put(lock: Place, content: bytes, number: int = 1) -> Place:
    """Leave a lease in the folder of a lock."""
    path = lock / f"{number:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


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
    first = put(s3 / ".lock", foreign())
    with hold(s3 / ".lock", timeout=0) as require_held:
        owner = json.loads((s3 / ".lock" / "00000002").read_bytes())
        assert owner["pid"] == os.getpid()
        assert not first.exists()
        require_held()


def test_a_lease_that_is_renewed_is_not(s3: Place) -> None:
    """Another machine's holder writes its lease anew, a count further each time."""
    lease, done = put(s3 / ".lock", foreign()), threading.Event()

    def live() -> None:
        count = 1
        while not done.wait(0.2):
            count += 1
            lease.write_bytes(foreign(count))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(Timeout), hold(s3 / ".lock", timeout=0):
            pass
    finally:
        done.set()
        thread.join()
    assert json.loads(lease.read_bytes())["host"] == "elsewhere"


def test_nothing_waits_for_a_dead_process_of_this_machine(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3 / ".lock", dead())
    monkeypatch.setattr(module, "EXPIRED", float("inf"))  # a wait would never end
    with hold(s3 / ".lock", timeout=0):
        pass


def test_nothing_waits_for_a_lease_that_was_released(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPIRED", float("inf"))  # a wait would never end
    for number in range(1, 4):
        with hold(s3 / ".lock", timeout=0):
            names = [path.name for path in (s3 / ".lock").iterdir()]
            assert names == [f"{number:08d}"]  # earlier ones are gone


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_expires_too(s3: Place, content: bytes) -> None:
    put(s3 / ".lock", content)
    with hold(s3 / ".lock", timeout=0):
        pass


def test_a_holder_finds_out_that_another_took_over(lock: Place) -> None:
    with hold(lock, timeout=0) as require_held:
        require_held()
        if not is_remote(lock):  # there the operating system holds it, whatever the file says
            lock.write_bytes(foreign())
            require_held()
            return
        other = put(lock, foreign(), 2)
        with pytest.raises(UserError, match="another process has taken over"):
            require_held()
    assert other.read_bytes() == foreign()  # and leaves it to the other


class Paused(Lease):
    """A taker that stops between its last look at a dead lease and the takeover."""

    def __init__(self, path: Place) -> None:
        assert is_remote(path)
        super().__init__(path)
        self.looked, self.go_on = threading.Event(), threading.Event()

    def _create(self, number: int) -> bool:
        self.looked.set()
        assert self.go_on.wait(60)
        return super()._create(number)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_takers_of_one_dead_lease_exactly_one_wins(s3: Place, first: int) -> None:
    """Both see it dead before either takes it; then one after the other does, in either order."""
    put(s3 / ".lock", dead())
    takers = [Paused(s3 / ".lock") for _ in range(2)]
    refused = []

    def take(taker: Paused) -> None:
        try:
            taker.acquire(timeout=0)
        except Timeout:
            refused.append(taker)

    threads = [threading.Thread(target=take, args=[taker]) for taker in takers]
    for thread, taker in zip(threads, takers, strict=True):
        thread.start()
        assert taker.looked.wait(60)
    for turn in (first, 1 - first):
        takers[turn].go_on.set()
        threads[turn].join()
    assert refused == [takers[1 - first]]
    takers[first].require()
    takers[first].release()


@pytest.mark.usefixtures("quick")
def test_a_taker_that_comes_much_too_late_does_not_win(s3: Place) -> None:
    """It saw lease 1 dead; meanwhile 2 was taken and released, and 3 is held: 2 is free again."""
    put(s3 / ".lock", dead())
    late = Paused(s3 / ".lock")
    refused = []

    def take() -> None:
        try:
            late.acquire(timeout=0)
        except Timeout as error:
            refused.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    assert late.looked.wait(60)
    with hold(s3 / ".lock", timeout=0):
        pass
    with hold(s3 / ".lock", timeout=0) as require_held:
        assert [path.name for path in (s3 / ".lock").iterdir()] == ["00000003"]
        late.go_on.set()
        thread.join()
        assert len(refused) == 1
        require_held()


@pytest.mark.usefixtures("quick")
def test_a_holder_that_was_suspended_does_not_take_the_lease_back(s3: Place) -> None:
    """It renews its lease after another was taken: the other still holds."""
    with hold(s3 / ".lock", timeout=0) as require_held:
        put(s3 / ".lock", foreign(), 2)
        put(s3 / ".lock", json.dumps({"token": "late"}).encode(), 1)
        with pytest.raises(UserError, match="another process has taken over"):
            require_held()
        with pytest.raises(UserError, match="another process has taken over"):
            require_held()
