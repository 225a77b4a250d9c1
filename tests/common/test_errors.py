"""Mistakes of a user: a problem and its remedy each, and all that are found at once."""

from __future__ import annotations

import pickle

import pytest

from raymaml.common.errors import Mistake, StorageError, UserError, gathered


def test_a_mistake_is_printed_as_its_problem_and_its_remedy() -> None:
    error = UserError("seed: is -1, must be at least 0", remedy="give another")
    assert str(error) == "seed: is -1, must be at least 0; give another"
    assert error.mistakes == (Mistake("seed: is -1, must be at least 0", "give another"),)
    assert str(UserError("a", "b", "a")) == "a\nb"  # each once
    assert pickle.loads(pickle.dumps(error)).mistakes == error.mistakes


def test_all_that_is_found_is_raised_together() -> None:
    def check() -> None:
        with gathered() as mistakes:
            mistakes.add("a", "mend a")
            with mistakes.kept("here"):
                raise UserError("b", "c", remedy="mend it")
            mistakes += ["d"]
            raise UserError("e")

    with pytest.raises(UserError) as caught:
        check()
    assert caught.value.problems == ("a; mend a", "here: b; mend it", "here: c; mend it", "d", "e")


def test_an_error_that_is_alone_keeps_its_type() -> None:
    with gathered():
        pass
    with pytest.raises(StorageError), gathered():
        raise StorageError("full")
    with pytest.raises(ValueError, match="other"), gathered():
        raise ValueError("other")
