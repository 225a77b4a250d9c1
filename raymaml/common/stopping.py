"""Stopping on request: of a person (Ctrl-C), or of the system that runs the job (SIGTERM).

``kill``, ``ray job stop``, Slurm and Kubernetes send SIGTERM and, after a while, SIGKILL.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended, as in shells."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended."""

Handler = Callable[[int, FrameType | None], None]


class Terminated(BaseException):
    """The process received SIGTERM; the text, if any, says why the work did not end by itself."""


_came: list[int] = []
"""The signals that the latest ``on_interrupt`` block received, in order."""


def stop_code() -> int:
    """Return the exit code of a command that stopped on request."""
    return TERMINATED if signal.SIGTERM in _came else INTERRUPTED


def stopped() -> BaseException:
    """Return the exception to raise when work has stopped on request before its end."""
    return Terminated() if signal.SIGTERM in _came else KeyboardInterrupt()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` during the block, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    with _handling({signal.SIGTERM: terminate}):
        yield


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None], grace_seconds: float) -> Iterator[None]:
    """Call ``action``, which asks the block to end soon, at the first Ctrl-C or SIGTERM.

    A second Ctrl-C interrupts as usual. Launchers send several SIGTERMs: only the first counts.
    Python handles signals in the main thread: in another thread this does nothing.

    Raises:
        Terminated: the block has not ended ``grace_seconds`` after SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _came.clear()
    usual = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, usual)
        _came.append(number)
        action()

    def terminate(number: int, _frame: FrameType | None) -> None:
        if number not in _came:
            _came.append(number)
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
            action()

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise Terminated(
            "terminated: no step ended within cluster.grace_seconds, "
            f"{grace_seconds:g} s, of the signal"
        )

    with _handling({signal.SIGINT: interrupt, signal.SIGTERM: terminate, signal.SIGALRM: give_up}):
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _handling(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
