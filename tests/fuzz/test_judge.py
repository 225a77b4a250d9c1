"""The judge of ``helpers_fuzz`` sees what it is there to see."""

from __future__ import annotations

import mmap
import os
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers_fuzz import Fuzz, TooLongError, _silence
from hypothesis import strategies as st

from raymaml.common.errors import UserError


def raises(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


CRIMES: dict[str, tuple[Callable[[], object], type[BaseException]]] = {
    "another exception": (raises(KeyError("x")), KeyError),
    "a message without a file": (raises(UserError("something is wrong")), AssertionError),
    "a warning": (lambda: warnings.warn("careful", stacklevel=1), AssertionError),
    "print": (lambda: print("x", flush=True, file=sys.__stdout__), AssertionError),
    "print in C": (lambda: os.write(2, b"x"), AssertionError),
    "a file elsewhere": (lambda: Path("outside/new").write_text("x"), AssertionError),
    "a changed file": (lambda: os.truncate("outside/secret", 1), AssertionError),
    "a command": (lambda: os.system("true"), AssertionError),
    "code": (lambda: exec("1"), AssertionError),
    "an import": (lambda: __import__("this_is_no_module_at_all"), ModuleNotFoundError),
    "memory": (lambda: fill(unused() + (500 << 20)), AssertionError),
}


def fill(size: int) -> None:
    """Touch so many bytes of new memory: the heap may have as many that were freed."""
    with mmap.mmap(-1, size) as fresh:
        for place in range(0, size, mmap.PAGESIZE):
            fresh[place] = 1


def unused() -> int:
    """How far the process is below the most memory that it has held, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return max(0, most - psutil.Process().memory_info().rss)


@pytest.mark.parametrize("crime", CRIMES)
def test_it_sees(fuzz: Fuzz, crime: str) -> None:
    call, error = CRIMES[crime]
    with _silence(fuzz.root) as fuzz._output, pytest.raises(error):
        fuzz.judge(call, "place")


def test_it_lets_a_reader_read_write_in_its_folder_and_refuse(fuzz: Fuzz) -> None:
    def read(number: int) -> None:
        (fuzz.place / "bank").write_text("x")
        if number % 2:
            raise UserError(f"{fuzz.place / 'bank'}: is damaged")

    fuzz(st.integers(), lambda _: None, read)
    assert fuzz.outcomes["read"] > 0
    assert fuzz.outcomes["refused"] > 0


def test_it_ends_what_hangs(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers_fuzz.SECONDS", 0.2)
    with _silence(fuzz.root) as fuzz._output, pytest.raises(TooLongError):
        fuzz.judge((fuzz.root / "outside" / "pipe").read_text, "place")
