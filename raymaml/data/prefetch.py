"""A thread that works ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar, cast

T = TypeVar("T")
_END = object()


def prefetch(
    items: Iterator[T], depth: int = 2, timeout: float | None = None
) -> Generator[T, None, None]:
    """Yield ``items``, computed up to ``depth`` ahead in a daemon thread.

    A ``TimeoutError`` ends a wait of more than ``timeout`` seconds for the next item.

    An exception of ``items`` reaches the consumer after the items before it. The thread starts
    with the first item asked for and stops, after the item it is at, when the generator closes.
    """
    ahead: queue.Queue[object] = queue.Queue(maxsize=depth)
    closed = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for item in items:
                ahead.put(item)
                if closed.is_set():
                    return
        except BaseException as error:  # whatever it is, the consumer must see it
            failures.append(error)
        ahead.put(_END)

    threading.Thread(target=run, name="prefetch", daemon=True).start()
    try:
        while (item := _next(ahead, timeout)) is not _END:
            yield cast("T", item)
        if failures:
            raise failures[0]
    finally:
        closed.set()
        _drain(ahead)


def _next(ahead: queue.Queue[object], timeout: float | None) -> object:
    try:
        return ahead.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"nothing came for {timeout:g} s from whoever reads ahead") from None


def _drain(ahead: queue.Queue[object]) -> None:
    """Make room, so that a thread that waits in ``put`` goes on and sees that it may stop."""
    while True:
        try:
            ahead.get_nowait()
        except queue.Empty:
            return
