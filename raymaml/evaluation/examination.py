"""The examination of a model on a few episodes: do logits belong to their images?

It shows the images in another order, and one query at a time. That detects a model that looks at
the place of an image in its batch, or at the other queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import checked, parse_json
from raymaml.storage.files import exists, read_bytes, write_text
from raymaml.storage.place import Place
from raymaml.types import Episode, EpisodeBatch

EPISODES = 3
"""Number of episodes that are examined."""
EXAMINATION_FILE = "examination.json"
Found = TypeVar("Found")
Precision = Literal["float32", "tf32", "bf16"]
ByStep = Callable[[Episode | EpisodeBatch], Tensor]
"""An episode -> the query logits after each inner step, [T+1, N*Q, N]; of several, which are
computed at once where they can be, [E, T+1, N*Q, N]."""
Company = Callable[[Episode], Iterator[Tensor]]
"""An episode -> query logits of one adaptation: of all queries [N*Q, N], then of each [1, N]."""

_ORDER_TOLERANCE: dict[Precision, float] = {"float32": 0.01, "tf32": 0.1, "bf16": 0.3}
"""Parts of the spread of the logits over the queries. A place that moves the logits by less than 1%
of that spread decides next to no prediction."""
_ROUNDING: dict[Precision, float] = {"float32": 2.0**-20, "tf32": 2.0**-12, "bf16": 2.0**-9}
"""A few units in the last place: sums in another order differ by less, relatively."""
_COMPANY_TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "tf32": 0.01, "bf16": 0.05}
"""Largest accepted difference, as a part of the largest logit (of 1 if that is smaller). Inductive
norms stay below it."""


_UNCHECKED = "so it could not be checked whether they follow their images"


class Examination(BaseModel):
    """The measurements; each number is the largest over the episodes.

    Inner steps may enlarge rounding a millionfold. An inner step counts only if a rounding of the
    images hardly moves its logits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    episodes: int
    precision: Precision = "float32"
    """Of the model."""
    finite: bool
    """Whether all logits are finite numbers."""
    rounding: float
    """Difference by a rounding of the images, as a part of the spread of the logits."""
    chance: float
    """Difference between two seeds of PyTorch, as a part of that spread."""
    support_order: float
    """Difference by showing the support images in another order, as a part of that spread."""
    query_order: float
    """Difference by showing the query images in another order, as a part of that spread."""
    company: float
    """Difference by predicting one query at a time, as a part of the largest logit or of 1; it is
    infinite where the model cannot predict one query alone."""
    alone_error: str = ""
    """The error of a lone query; empty where there is none."""

    @property
    def is_inductive(self) -> bool | None:
        """Whether a query is predicted alone as it is among all others; None: not known."""
        if not self.finite or self.chance > self._tolerance:
            return None
        return self.company <= _COMPANY_TOLERANCE[self.precision]

    @property
    def caution(self) -> str:
        """A warning to readers of the accuracy; empty where nothing is wrong."""
        if not self.finite:
            return "caution: its logits are not finite numbers"
        if self.rounding > self._tolerance / 10:
            return f"caution: rounding alone moves its logits, {_UNCHECKED}"
        if self.chance > self._tolerance:
            return f"caution: its predictions are random at test, {_UNCHECKED}"
        if max(self.support_order, self.query_order) > self._tolerance:
            which = "support" if self.support_order > self.query_order else "query"
            return (
                "caution: its logits do not follow their images: they depend on the place of a"
                f" {which} image in its batch"
            )
        return "caution: it cannot predict one query alone" if self.alone_error else ""

    @property
    def _tolerance(self) -> float:
        return _ORDER_TOLERANCE[self.precision]


def one_by_one(by_step: Callable[[Episode], Tensor]) -> ByStep:
    """Return a function of one episode for several as well, one after the other."""

    def found(episode: Episode | EpisodeBatch) -> Tensor:
        if isinstance(episode, EpisodeBatch):
            return torch.stack([by_step(each) for each in episode])
        return by_step(episode)

    return found


def examine(
    by_step: ByStep, company: Company, episodes: Iterable[Episode], precision: Precision = "float32"
) -> Examination:
    """Examine a model on ``episodes``."""
    found, errors = [], []
    for number, episode in enumerate(episodes):
        differences = _differences(by_step, episode, precision, number)
        apart, error = _seeded(lambda each: _company_difference(company(each)), episode, 0)
        found.append(differences | {"company": apart})
        errors.append(error)
    finite = all(each.pop("finite") for each in found)
    largest = {name: max(each[name] for each in found) for name in found[0]}
    return Examination(
        episodes=len(found),
        precision=precision,
        finite=finite,
        alone_error=next(filter(None, errors), ""),
        **largest,
    )


def _differences(
    by_step: ByStep, episode: Episode, precision: Precision, number: int
) -> dict[str, float]:
    """Return the differences that ``Examination`` lists, for one episode; NaN counts as
    infinite."""
    base = _seeded(by_step, episode, 0)
    shown = slice(min(1, len(base) - 1), None)  # the support set shows from the first step on
    spread = (base - base.mean(1, keepdim=True)).abs().amax((1, 2))
    # Equal logits have no spread: the scale is at least 1e-5 of the largest logit.
    scale = torch.maximum(spread, 1e-5 * base.abs().amax((1, 2)))
    scale = scale.nan_to_num(posinf=1.0).clamp(min=torch.finfo(base.dtype).tiny)[shown]

    def apart(logits: Tensor) -> Tensor:  # [T]
        # NaN counts as an infinite difference: it is no evidence of equal logits
        differences = (logits - base).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        return differences.amax((1, 2))[shown] / scale

    rounding = apart(_seeded(by_step, _rounded(episode, _ROUNDING[precision]), 0))
    steady = rounding <= max(float(rounding.min()), _ORDER_TOLERANCE[precision] / 10)
    support, query = (_other_order(y, number) for y in (episode.support_y, episode.query_y))
    turned = replace(
        episode, support_x=episode.support_x[support], support_y=episode.support_y[support]
    )
    moved = replace(episode, query_x=episode.query_x[query], query_y=episode.query_y[query])
    found = {
        "chance": apart(_seeded(by_step, episode, 1)),
        "support_order": apart(_seeded(by_step, turned, 0)),
        "query_order": apart(_seeded(by_step, moved, 0)[:, query.argsort()]),
    }
    numbers = {name: float(values[steady].max()) for name, values in found.items()}
    finite = bool(base.isfinite().all())
    return numbers | {"rounding": float(rounding.min()), "finite": finite}


def _other_order(labels: Tensor, number: int) -> Tensor:
    """Return a permutation of places, not the identity, another one for each episode."""
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(len(labels), generator=generator)
    places = torch.arange(len(labels))
    return (places.roll(1) if torch.equal(order, places) else order).to(labels.device)


def one_query(episode: Episode, place: int) -> Episode:
    """Return an episode with one of its queries alone."""
    some = slice(place, place + 1)
    return replace(episode, query_x=episode.query_x[some], query_y=episode.query_y[some])


def _rounded(episode: Episode, share: float) -> Episode:
    """Change every pixel by up to this share of its value, always the same way."""
    generator = torch.Generator().manual_seed(0)

    def changed(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator).to(x)
        return x * (1 + share * (2 * noise - 1))

    return replace(episode, support_x=changed(episode.support_x), query_x=changed(episode.query_x))


def _company_difference(logits: Iterator[Tensor]) -> tuple[float, str]:
    """Return ``company`` and ``alone_error`` of what a ``Company`` yields."""
    together = next(logits)
    try:
        alone = torch.cat(list(logits))
    except Exception as error:  # of a user's module, which may refuse a batch of one
        return math.inf, reason_of(error)
    difference = (together - alone).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(difference.max()) / max(1.0, float(together.nan_to_num().abs().max())), ""


def _seeded(function: Callable[[Episode], Found], episode: Episode, seed: int) -> Found:
    devices = [episode.query_x.device] if episode.query_x.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return function(episode)


_FILE = TypeAdapter(Examination)


def write_examination(folder: Place, examination: Examination) -> None:
    """Write the examination beside the records of the same model."""
    write_text(folder / EXAMINATION_FILE, examination.model_dump_json(indent=2) + "\n")


def read_examination(folder: Place) -> Examination | None:
    """Return the examination of the model whose records lie in ``folder``; None: there is none.

    Raises:
        UserError: the file is damaged.
    """
    remedy = f"move {folder} away and run `raymaml test` again"
    return read_json(folder / EXAMINATION_FILE, _FILE, remedy)


def read_json(path: Place, kind: TypeAdapter[Found], remedy: str) -> Found | None:
    """Return the content of a JSON file of raymaml; None: there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not exists(path):
        return None
    try:
        return checked(kind, parse_json(read_bytes(path)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({reason_of(error)})", remedy=remedy) from None
