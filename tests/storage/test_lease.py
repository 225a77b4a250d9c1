"""One process at a time may write a folder, on disk and at a URI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.storage import lease as module
from raymaml.storage.files import read_bytes
from raymaml.storage.lease import EXPIRED, Lease, Timeout, hold
from raymaml.storage.place import Place, is_remote

TAKEN = UserError("lock: is taken")


class Clock:
    """Time that passes only where a taker of a lease sleeps; ``meanwhile`` happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def lock(s3: Place) -> Place:
    return s3 / ".lock"


def lease(**owner: object) -> bytes:
    """A lease of another machine, or of another ``owner``."""
    return json.dumps({"host": "elsewhere", "pid": 1, "token": "t", **owner}).encode()


def dead() -> bytes:
    """A lease of a process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return lease(host=module._host(), pid=process.pid)


def put(lock: Place, content: bytes, number: int = 1) -> Place:
    """Leave a lease in the folder of a lock."""
    path = lock / f"{number:08d}"
    path.write_bytes(content)
    return path


def numbers(lock: Place) -> list[int]:
    return sorted(int(path.name) for path in lock.iterdir())


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_a_second_holder_is_refused_while_the_first_lives(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, clock: Clock
) -> None:
    """On S3 the first renews its lease while the second looks on."""
    lock = tmp_path / ".lock" if kind == "disk" else request.getfixturevalue("lock")
    with hold(lock, taken=TAKEN) as require_held:
        if is_remote(lock):
            held = json.loads((lock / "00000001").read_bytes())
            clock.meanwhile = lambda: put(lock, json.dumps({**held, "renewals": 2}).encode())
        with pytest.raises(UserError, match="is taken"), hold(lock, taken=TAKEN):
            pass
        require_held()
    with hold(lock, taken=TAKEN):
        pass  # released, it is free


def test_a_taker_waits_for_a_holder_that_ends(lock: Place, clock: Clock) -> None:
    first = put(lock, lease())
    clock.meanwhile = lambda: first.write_bytes(lease(released=True))
    with hold(lock, taken=TAKEN, timeout=60):
        assert numbers(lock) == [2]
    assert 0 < clock.now < EXPIRED


def test_a_holder_renews_its_lease(lock: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWED", 0.01)
    renewed, content = threading.Event(), Lease._content

    def next_content(self: Lease) -> bytes:
        if self._renewals == 2:
            renewed.set()  # the lease was taken and renewed once, and is being renewed again
        return content(self)

    monkeypatch.setattr(Lease, "_content", next_content)
    with hold(lock, taken=TAKEN):
        assert renewed.wait(60)
        assert json.loads(read_bytes(lock / "00000001"))["renewals"] >= 2


@pytest.mark.parametrize("content", [lease(), b"", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_lease_without_signs_of_life_is_taken_over(
    lock: Place, clock: Clock, content: bytes
) -> None:
    """One that cannot be read as well."""
    put(lock, content)
    with hold(lock, taken=TAKEN) as require_held:
        assert clock.now == EXPIRED
        assert numbers(lock) == [2]
        assert json.loads((lock / "00000002").read_bytes())["pid"] == os.getpid()
        require_held()


def test_nothing_waits_for_a_lease_that_is_released_or_of_the_dead(
    lock: Place, clock: Clock
) -> None:
    put(lock, dead())
    for number in (2, 3, 4):
        with hold(lock, taken=TAKEN):
            assert numbers(lock) == [number]  # earlier ones are gone
    assert clock.now == 0


def test_a_holder_learns_that_another_took_over_and_leaves_it_the_folder(lock: Place) -> None:
    """The first was suspended, and renews its own lease late: the second still holds."""
    with hold(lock, taken=TAKEN) as require_held:
        require_held()
        mine = (lock / "00000001").read_bytes()
        other = put(lock, lease(), 2)
        put(lock, mine, 1)
        for _ in range(2):
            with pytest.raises(UserError, match="another process has taken over"):
                require_held()
    assert other.read_bytes() == lease()


class Paused(Lease):
    """A taker that stops between its look at a dead lease and the takeover."""

    def __init__(self, lock: Place) -> None:
        assert is_remote(lock)
        super().__init__(lock)
        self.looked, self.go_on, self.refused = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.looked.wait(60)

    def _run(self) -> None:
        try:
            self.acquire()
        except Timeout:
            self.refused = True

    def _create(self, number: int) -> bool:
        self.looked.set()
        assert self.go_on.wait(60)
        return super()._create(number)

    def finish(self) -> None:
        self.go_on.set()
        self._thread.join()


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_takers_of_one_dead_lease_exactly_one_wins(lock: Place, first: int) -> None:
    """Both see it dead before either takes it; then one after the other does, in either order."""
    put(lock, dead())
    takers = [Paused(lock), Paused(lock)]
    winner, loser = takers[first], takers[1 - first]
    winner.finish()
    loser.finish()
    assert (winner.refused, loser.refused) == (False, True)
    winner.require()
    winner.release()


def test_a_taker_that_comes_much_too_late_does_not_win(lock: Place) -> None:
    """It saw lease 1 dead; meanwhile 2 was taken and released, and 3 is held: 2 is free again."""
    put(lock, dead())
    late = Paused(lock)
    with hold(lock, taken=TAKEN):
        pass
    with hold(lock, taken=TAKEN) as require_held:
        assert numbers(lock) == [3]
        late.finish()
        assert late.refused
        assert numbers(lock) == [3]
        require_held()
