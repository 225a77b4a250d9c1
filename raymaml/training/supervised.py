"""A run that somebody may end at any validation: a trial of a sweep."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from raymaml.common.untrusted import checked, json_text
from raymaml.storage.files import read_text, write_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import read_card
from raymaml.training.data import MetaBatches
from raymaml.training.session import Session
from raymaml.training.state import Validation

Ask = Callable[[Validation], bool]
"""Takes a validation whose checkpoint is in place, and tells whether the run goes on."""


class EndedEarly(Exception):  # noqa: N818  (not an error: the run was told to end)
    """The run ends before its last outer step; its checkpoint is in place."""


class SupervisedSession:
    """A session that asks, at each validation, whether to go on.

    Args:
        session: does all else.
        ask: called by rank 0, once for every validation of this process; one that was kept in a
            checkpoint before is asked about again, since nobody knows whether it was heard.
        stop: asked at every outer step, as the session's own would be.
    """

    def __init__(self, session: Session, ask: Ask, stop: Callable[[], bool]) -> None:
        self.rank, self.world_size, self.device = session.rank, session.world_size, session.device
        self._session = session
        self._ask = ask
        self._stop = stop

    def meta_batches(self, first_step: int) -> MetaBatches:
        """Return those of the session."""
        return self._session.meta_batches(first_step)

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Gather by the session."""
        return self._session.gather(rows, counts)

    def mean(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Average by the session."""
        return self._session.mean(rows, counts)

    def from_rank_zero(self, value: int) -> int:
        """Broadcast by the session."""
        return self._session.from_rank_zero(value)

    def stop_requested(self) -> bool:
        """Ask ``stop``."""
        return self._stop()

    def report(self, metrics: dict[str, Any], checkpoint: Place) -> None:
        """Report by the session, then ask.

        Raises:
            EndedEarly: on all workers, if the answer is no.
        """
        self._session.report(metrics, checkpoint)
        if not self.from_rank_zero(self.rank != 0 or self._goes_on(checkpoint)):
            raise EndedEarly

    def _goes_on(self, checkpoint: Place) -> bool:
        card = read_card(checkpoint)
        if card.validation is None or card.validation.step != card.step:
            return True
        return self._ask(card.validation)


QUESTION, ANSWER = ".question.json", ".answer.json"
"""How a worker of Ray Train asks whoever started it: files in the run folder, which both have."""
_VALIDATION = TypeAdapter(Validation)
_PAUSE = 0.05  # seconds between two looks


def ask_by_file(folder: Place, validation: Validation) -> bool:
    """Ask by a file, and wait for the answer."""
    key = secrets.token_hex(8)
    write_text(
        folder / QUESTION, json_text({"key": key, "validation": asdict(validation)}, strings=True)
    )
    while (answer := _read(folder / ANSWER)) is None or answer["key"] != key:
        time.sleep(_PAUSE)
    return bool(answer["goes_on"])


def answer_by_file(folder: Place, ask: Ask, answered: str | None) -> str | None:
    """Answer a question that was not answered yet, if there is one, and return its key."""
    question = _read(folder / QUESTION)
    if question is None or question["key"] == answered:
        return answered
    goes_on = False
    try:
        goes_on = ask(checked(_VALIDATION, question["validation"]))
    finally:  # whatever ends this process, its workers end well
        write_text(folder / ANSWER, json_text({"key": question["key"], "goes_on": goes_on}))
    return str(question["key"])


def _read(path: Place) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    return content
