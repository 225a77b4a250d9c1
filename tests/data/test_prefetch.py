"""The thread that works ahead. Every wait has a partner that ends it; none is a matter of time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from raymaml.data.prefetch import prefetch

PATIENCE = 30  # seconds until a test that hangs fails


def worker() -> threading.Thread | None:
    return next((t for t in threading.enumerate() if t.name == "prefetch"), None)


def assert_worker_ends() -> None:
    thread = worker()
    if thread is not None:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_their_order(depth: int) -> None:
    assert list(prefetch(iter(range(20)), depth)) == list(range(20))
    assert_worker_ends()


def test_nothing_comes_of_nothing() -> None:
    assert list(prefetch(iter(()))) == []


def test_none_is_an_item() -> None:
    assert list(prefetch(iter([None, 1, None]))) == [None, 1, None]


def test_it_works_ahead_but_not_too_far() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 3:
                third.set()
            yield number

    ahead = prefetch(items(), depth=2)
    assert next(ahead) == 0
    # 0 is delivered, 1 and 2 wait in the queue, 3 is made and waits for a place
    assert third.wait(PATIENCE)
    assert made == [0, 1, 2, 3]
    ahead.close()
    assert_worker_ends()
    assert made == [0, 1, 2, 3]


def test_an_exception_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk on fire")

    received: list[int] = []
    with pytest.raises(OSError, match="disk on fire"):
        received.extend(iter_into(received, prefetch(items(), depth=5)))
    assert received == [1, 2]
    assert_worker_ends()


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
    assert_worker_ends()


def test_closing_ends_a_thread_that_is_at_work() -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        at_work.set()
        assert go_on.wait(PATIENCE)
        yield from range(1000)

    ahead = prefetch(items(), depth=1)
    next(ahead)
    assert at_work.wait(PATIENCE)
    ahead.close()
    go_on.set()
    assert_worker_ends()


def test_an_error_of_the_consumer_ends_the_thread() -> None:
    def consume() -> None:
        for item in prefetch(iter(range(1000)), depth=1):
            if item == 3:
                raise KeyError(item)

    with pytest.raises(KeyError):
        consume()
    assert_worker_ends()
