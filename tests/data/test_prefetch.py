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


@pytest.mark.parametrize("items", [[], [None, 1, None], list(range(20))])
@pytest.mark.parametrize("depth", [1, 50])
def test_items_come_in_their_order(items: list[int | None], depth: int) -> None:
    assert list(prefetch(iter(items), depth)) == items
    assert_worker_has_ended()


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

    ahead = prefetch(items(), depth=5)
    assert worker() is None  # work starts with the first item that is asked for
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(ahead)
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


@pytest.mark.parametrize("closed", [False, True])
def test_what_hangs_is_waited_for_once(closed: bool) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        at_work.set()
        assert go_on.wait(PATIENCE)
        yield 1

    ahead = prefetch(items(), timeout=0.5)
    assert next(ahead) == 0
    assert at_work.wait(PATIENCE)
    if closed:
        ahead.close()
    else:
        with pytest.raises(TimeoutError, match=r"gave nothing for 0\.5 s"):
            next(ahead)
    thread = worker()
    assert thread is not None  # it hangs: only its item can end it
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
