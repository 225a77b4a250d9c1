"""The thread that works ahead. Every wait has a partner that ends it; none is a matter of time."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from raymaml.data.prefetch import prefetch

PATIENCE = 30  # seconds until a test that hangs fails


def worker() -> threading.Thread | None:
    return next((t for t in threading.enumerate() if t.name.startswith("prefetch")), None)


def assert_worker_has_ended() -> None:
    assert worker() is None


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_their_order(depth: int) -> None:
    assert list(prefetch(iter(range(20)), depth)) == list(range(20))
    assert_worker_has_ended()


def test_nothing_comes_of_nothing() -> None:
    assert list(prefetch(iter(()))) == []


def test_none_is_an_item() -> None:
    assert list(prefetch(iter([None, 1, None]))) == [None, 1, None]


def test_it_works_ahead_but_not_too_far() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                second.set()
            yield number

    ahead = prefetch(items(), depth=2)
    assert next(ahead) == 0
    # 0 is delivered, 1 and 2 are made
    assert second.wait(PATIENCE)
    assert made == [0, 1, 2]
    ahead.close()
    assert_worker_has_ended()
    assert made == [0, 1, 2]


def test_an_exception_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk on fire")

    received: list[int] = []
    with pytest.raises(OSError, match="disk on fire"):
        received.extend(iter_into(received, prefetch(items(), depth=5)))
    assert received == [1, 2]
    assert_worker_has_ended()


def iter_into(received: list[int], items: Iterator[int]) -> list[int]:
    for item in items:
        received.append(item)
    return []


def test_work_starts_with_the_first_item_asked_for() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        asked.append(1)
        yield 1

    ahead = prefetch(items())
    assert asked == []
    assert worker() is None
    ahead.close()


def test_closing_ends_a_thread_that_waits_for_room() -> None:
    ahead = prefetch(iter(range(1000)), depth=1)
    next(ahead)
    ahead.close()
    assert_worker_has_ended()


def test_closing_waits_for_the_item_at_work() -> None:
    at_work, closing, made = threading.Event(), threading.Event(), list[int]()

    def items() -> Iterator[int]:
        yield 0
        at_work.set()
        assert closing.wait(PATIENCE)
        made.append(1)
        yield 1
        made.append(2)
        yield 2

    ahead = prefetch(items(), depth=2)
    assert next(ahead) == 0
    assert at_work.wait(PATIENCE)
    closing.set()
    ahead.close()
    assert_worker_has_ended()
    assert made[:1] == [1]  # and 2, where the thread was faster than the closing


def test_garbage_collection_ends_the_thread() -> None:
    ahead = prefetch(iter(range(1000)))
    next(ahead)
    del ahead
    assert_worker_has_ended()

    ring: list[object] = [prefetch(iter(range(1000)))]
    next(ring[0])  # type: ignore[call-overload]
    ring.append(ring)
    del ring
    gc.collect()
    assert_worker_has_ended()


def test_what_hangs_is_waited_for_once() -> None:
    go_on = threading.Event()

    def items() -> Iterator[int]:
        assert go_on.wait(PATIENCE)
        yield 1

    with pytest.raises(TimeoutError, match=r"gave nothing for 0\.01 s"):
        next(prefetch(items(), timeout=0.01))
    thread = worker()
    assert thread is not None  # it hangs: nobody can end it
    go_on.set()
    thread.join(PATIENCE)
    assert_worker_has_ended()


def test_closing_waits_no_longer_than_the_timeout() -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        at_work.set()
        assert go_on.wait(PATIENCE)

    ahead = prefetch(items(), timeout=1)
    assert next(ahead) == 0
    assert at_work.wait(PATIENCE)
    ahead.close()
    thread = worker()
    assert thread is not None  # it is still at the item, which waits for what comes below
    go_on.set()
    thread.join(PATIENCE)
    assert_worker_has_ended()


PROCESS = """
import atexit, os, sys, threading
from raymaml.data.prefetch import prefetch

def watch():  # Python calls it after it has waited for threads, and before it ends the others
    if threading.active_count() > 1:
        os._exit(77)

atexit.register(watch)
at_work, exiting = threading.Event(), threading.Event()

def items():
    yield 0
    at_work.set()
    exiting.wait()
    yield from range(1000)

ahead = prefetch(items())
next(ahead)
threading._register_atexit(exiting.set)  # called before Python waits for threads
at_work.wait()
"""
WAYS_OUT = {
    "pass": 0,
    "sys.exit(5)": 5,
    "raise KeyError('defect')": 1,
    "raise KeyboardInterrupt": -signal.SIGINT,
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_thread_ends_before_the_process(way: str) -> None:
    """The generator is neither closed nor garbage, and an item is at work."""
    done = subprocess.run([sys.executable, "-c", PROCESS + way], check=False, timeout=PATIENCE)
    assert done.returncode == WAYS_OUT[way]


def test_an_error_of_the_consumer_ends_the_thread() -> None:
    def consume() -> None:
        for item in prefetch(iter(range(1000)), depth=1):
            if item == 3:
                raise KeyError(item)

    with pytest.raises(KeyError):
        consume()
    assert_worker_has_ended()
