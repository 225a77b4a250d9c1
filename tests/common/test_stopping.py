"""Ctrl-C and SIGTERM: the request, the exception, and the handlers of before afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from raymaml.common.stopping import Terminated, on_interrupt, stop_code, stopped, terminable

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    """Ctrl-C as in a terminal, which a job in the background does not have; all restored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_interrupts() -> None:
    asked: list[bool] = []
    with on_interrupt(lambda: asked.append(True), 60):
        signal.raise_signal(signal.SIGINT)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked == [True]
    assert stop_code() == 130
    assert type(stopped()) is KeyboardInterrupt


def test_sigterm_asks_once_however_often_it_comes() -> None:
    asked: list[bool] = []
    with on_interrupt(lambda: asked.append(True), 60):
        signal.raise_signal(signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        signal.raise_signal(signal.SIGTERM)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):  # somebody is in a hurry
            signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT)
    assert stop_code() == 143
    assert type(stopped()) is Terminated


def test_sigterm_ends_work_that_does_not_end() -> None:
    asked: list[bool] = []

    def endless() -> None:
        with on_interrupt(lambda: asked.append(True), 0.05):
            signal.raise_signal(signal.SIGTERM)
            threading.Event().wait(60)

    with pytest.raises(Terminated, match=r"within cluster\.grace_seconds, 0\.05 s, of the signal"):
        endless()
    assert asked == [True]


def test_a_later_block_knows_nothing_of_an_earlier_signal() -> None:
    with on_interrupt(lambda: None, 60):
        signal.raise_signal(signal.SIGTERM)
    assert stop_code() == 143
    with on_interrupt(lambda: None, 60):
        pass
    assert stop_code() == 130


def test_without_a_block_sigterm_raises() -> None:
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)


def test_in_another_thread_nothing_is_handled() -> None:
    seen: list[object] = []

    def run() -> None:
        with on_interrupt(lambda: None, 60):
            seen.extend(signal.getsignal(number) for number in ALL)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(number) for number in ALL]
