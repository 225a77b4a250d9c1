"""A thread that computes items ahead of its consumer, and ends before the process does."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()  # after the last item


def prefetch(
    items: Iterator[T], depth: int = 2, timeout: float | None = None
) -> Generator[T, None, None]:
    """Yield ``items``, computed up to ``depth`` ahead in a thread.

    An exception of ``items`` reaches the consumer after the items before it. The thread starts when
    the first item is asked for. Closing the generator, which garbage collection does too, waits for
    the current item, at most ``timeout`` seconds, and ends the thread. A process that exits waits
    for the current item without a limit. So if the thread hangs, the process does not end by
    itself, also after a ``TimeoutError``, and has to be killed.

    Raises:
        TimeoutError: the next item takes more than ``timeout`` seconds.
    """
    executor = ThreadPoolExecutor(1, "prefetch")
    ahead: deque[Future[Any]] = deque()
    patience = timeout
    try:
        while True:
            while len(ahead) <= depth:
                ahead.append(executor.submit(next, items, _END))
            if not wait([ahead[0]], timeout).done:
                patience = 0
                raise TimeoutError(f"the thread that reads ahead gave nothing for {timeout} s")
            item = ahead.popleft().result()
            if item is _END:
                return
            yield item
    finally:
        at_work = [future for future in ahead if not future.cancel()]
        hangs = patience is not None and bool(wait(at_work, patience).not_done)
        with suppress(RuntimeError):  # garbage collection may run in that very thread
            executor.shutdown(wait=not hangs)
