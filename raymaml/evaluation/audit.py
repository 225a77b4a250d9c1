"""Audits: how far does an accuracy depend on the queries, the labels and the support set?

Each audit takes any model as an ``external.Predict`` and returns an ``AuditResult``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from raymaml.data.bank import ImageBank
from raymaml.data.sampling import EpisodeRows
from raymaml.seeding import bit_stream, draw_without_replacement
from raymaml.statistics.intervals import bounded_interval
from raymaml.training.data import EpisodeSet
from raymaml.training.features import Predict
from raymaml.types import Episode

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest difference of logits by rounding alone, in units of the largest logit, or of 1."""

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """The outcome of one audit."""

    name: str
    title: str
    outcome: Literal["passed", "flagged", "measured"]
    sentence: str
    """The method and the finding."""
    rows: list[dict[str, str | bool | Integer | float | None]]
    """A table: dicts of equal keys."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and the episodes that it is audited on."""

    predict: Predict
    episodes: EpisodeSet
    bank: ImageBank
    seed: int = 0
    """Of the draws of an audit."""

    def at_most(self, count: int) -> int:
        """Return ``count``, or how many episodes there are."""
        return min(count, self.episodes.shards.count)

    def read(self, count: int) -> Iterator[tuple[EpisodeRows, Episode]]:
        """Yield the first ``count`` episodes with their rows."""
        for index in range(count):
            (rows,) = self.episodes.shards.rows([index])
            yield rows, self.episodes.load(range(index, index + 1))[0]

    def logits(self, episode: Episode) -> Tensor:
        """Return the logits of the query images ``[B, N]``."""
        return self.predict(episode.support_x, episode.support_y, episode.query_x)


def audit_transduction(subject: Subject, *, inductive: bool, count: int = 10) -> AuditResult:
    """Predict all queries at once, one at a time, and one class at a time: is it the same?

    An inductive model predicts each query from the support set and the query alone. A model that is
    labelled ``inductive`` and does not is flagged.
    """
    count = subject.at_most(count)
    accuracies: dict[str, list[float]] = {"all at once": []}
    differences = {"one at a time": 0.0, "one class at a time": 0.0}
    tolerance = 0.0
    for _, episode in subject.read(count):
        together = subject.logits(episode)
        tolerance = TOLERANCE.get(together.dtype, 1e-2)
        scale = max(1.0, float(together.nan_to_num().abs().max()))
        accuracies["all at once"].append(_accuracy(together, episode.query_y))
        places = torch.arange(len(episode.query_y), device=episode.query_y.device)
        classes = [places[episode.query_y == way] for way in episode.query_y.unique()]
        for name, parts in (("one at a time", places.split(1)), ("one class at a time", classes)):
            apart = torch.empty_like(together)
            for part in parts:
                apart[part] = subject.logits(_of_queries(episode, part))
            accuracies.setdefault(name, []).append(_accuracy(apart, episode.query_y))
            # what is not a number at once and apart is no evidence that they are equal
            apart_by = (apart - together).abs().nan_to_num(nan=math.inf)
            differences[name] = max(differences[name], float(apart_by.max()) / scale)
    looks = max(differences.values()) > tolerance
    outcome: Literal["passed", "flagged", "measured"] = "measured"
    if inductive:
        outcome = "flagged" if looks else "passed"
    return AuditResult(
        name="transduction",
        title="Does a prediction depend on the other queries?",
        outcome=outcome,
        sentence=f"Labelled {'inductive' if inductive else 'transductive'}. Over {count} episodes"
        f" the predictions {'depend' if looks else 'do not depend'} on which queries come together"
        f" (rounding may make {tolerance:g} of the largest logit).",
        rows=[
            {
                "queries": name,
                "accuracy": _percent(values),
                "largest difference of logits": differences.get(name, 0.0),
            }
            for name, values in accuracies.items()
        ],
    )


def audit_labels(subject: Subject, *, count: int = 20, permutations: int = 20) -> AuditResult:
    """Number the classes of an episode in another order: how much does that alone change?

    A head that starts at meta-learned weights has a row of its own for each label. A head that
    starts at zero, or at one row for all, is symmetric, and its spread is rounding.
    """
    count = subject.at_most(count)
    table = np.empty((count, permutations))
    for row, (_, episode) in enumerate(subject.read(count)):
        ways = int(episode.support_y.max()) + 1
        for column in range(permutations):
            bits = bit_stream(subject.seed, "audit-labels", row, column)
            drawn = draw_without_replacement(bits, ways, ways) if column else np.arange(ways)
            order = torch.from_numpy(drawn).to(episode.support_y.device)
            named = replace(
                episode, support_y=order[episode.support_y], query_y=order[episode.query_y]
            )
            table[row, column] = _accuracy(subject.logits(named), named.query_y)
    spread = float(np.sqrt(table.var(1, ddof=1).mean()))
    between = float(table.mean(1).std(ddof=1)) if count > 1 else math.nan
    return AuditResult(
        name="labels",
        title="Does it matter which class is called 0?",
        outcome="measured",
        sentence=f"{permutations} namings of the classes of each of {count} episodes: the accuracy"
        f" of one episode has a standard deviation of {spread:.2%} over namings; between episodes"
        f" it is {between:.2%}.",
        rows=[
            {"naming": "as sampled", "accuracy": _percent(table[:, 0])},
            {"naming": "as a mean over namings", "accuracy": _percent(table.mean(1))},
            {"naming": "the best for each episode", "accuracy": _percent(table.max(1))},
            {"naming": "the worst for each episode", "accuracy": _percent(table.min(1))},
        ],
    )


def audit_support(subject: Subject, *, count: int = 5, tries: int = 8) -> AuditResult:
    """Search the best and the worst support set for the classes and queries of an episode.

    Greedy: for each support image in turn, ``tries`` images of its class that are no queries take
    its place; the best (worst) stays. One round, so ``tries * N * K`` evaluations a direction.
    """
    count = subject.at_most(count)
    found: dict[str, list[float]] = {"worst": [], "as drawn": [], "best": []}
    for rows, _ in subject.read(count):
        drawn = _score(subject, rows)
        found["as drawn"].append(drawn[0])
        for name, sign in (("worst", -1.0), ("best", 1.0)):
            found[name].append(_search(subject, rows, drawn, sign, tries)[0])
    reach = np.mean(found["best"]) - np.mean(found["worst"])
    return AuditResult(
        name="support",
        title="How much hangs on the support set?",
        outcome="measured",
        sentence=f"Greedy search over the support images of {count} episodes, queries unchanged,"
        f" {tries} tries an image: {reach:.1%} lie between the worst and the best that were found.",
        rows=[{"support set": name, "accuracy": _percent(v)} for name, v in found.items()],
    )


def audit_queries(subject: Subject, *, count: int = 100) -> AuditResult:
    """Judge the same episodes with fewer queries a class, and with unbalanced ones."""
    count = subject.at_most(count)
    measured: dict[tuple[str, str], list[float]] = {}
    for _, episode in subject.read(count):
        for key, places in _query_sets(episode.query_y):
            some = _of_queries(episode, places)
            accuracy = _accuracy(subject.logits(some), some.query_y)
            measured.setdefault(key, []).append(accuracy)
    means = [float(np.mean(values)) for values in measured.values()]
    return AuditResult(
        name="queries",
        title="Does it matter how many queries there are, and of which classes?",
        outcome="measured",
        sentence=f"The first {count} episodes with other query sets, taken from their own: mean"
        f" accuracies from {min(means):.1%} to {max(means):.1%}.",
        rows=[
            {"query set": name, "queries": queries, "accuracy": _percent(values)}
            for (name, queries), values in measured.items()
        ],
    )


def _query_sets(labels: Tensor) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield ((name, number of queries), places) of query sets, from labels ``[N*Q]``."""
    ways = int(labels.max()) + 1
    by_class = [torch.where(labels == way)[0] for way in range(ways)]
    each = min(len(places) for places in by_class)
    for number in sorted({1, 2, 5, 10, each}):
        if number <= each:
            places = torch.cat([of_class[:number] for of_class in by_class])
            yield (f"{number} a class", str(len(places))), places
    for factor in (1, 2, 4):
        shares = np.array([1 / factor**way for way in range(ways)])
        counts = _apportion(shares / shares.sum(), each)
        places = torch.cat([of[:n] for of, n in zip(by_class, counts, strict=True)])
        name = "balanced" if factor == 1 else f"each class {factor} times as often as the next"
        yield (f"{name}, {each} in all", str(each)), places
    yield (f"all {each} of one class", str(each)), by_class[0][:each]


def _apportion(shares: NDArray[np.float64], total: int) -> list[int]:
    """Share out ``total`` by largest remainders (Hamilton's method)."""
    exact = shares * total
    counts = np.floor(exact + 1e-9).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[place] += 1
    found: list[int] = counts.tolist()
    return found


def _search(
    subject: Subject, rows: EpisodeRows, start: tuple[float, float], sign: float, tries: int
) -> tuple[float, float]:
    """Return (accuracy, minus loss) of the best (sign 1) or worst (-1) support set found."""
    best, support = start, rows.support.copy()
    for place, label in enumerate(rows.support_labels):
        class_id = int(rows.classes[label])
        first, size = subject.bank.first_row[class_id], subject.bank.classes[class_id].count
        free = np.setdiff1d(np.arange(first, first + size), np.concatenate([rows.query, support]))
        bits = bit_stream(subject.seed, "audit-support", rows.index, place)
        for number in draw_without_replacement(bits, len(free), min(tries, len(free))):
            tried = support.copy()
            tried[place] = free[number]
            score = _score(subject, replace(rows, support=tried))
            if sign * score[0] > sign * best[0] or (
                score[0] == best[0] and sign * score[1] > sign * best[1]
            ):
                best, support = score, tried
    return best


def _score(subject: Subject, rows: EpisodeRows) -> tuple[float, float]:
    index = range(rows.index, rows.index + 1)
    episode = subject.episodes.loader.load([rows], index)[0]
    logits = subject.logits(episode)
    loss = F.cross_entropy(logits.double(), episode.query_y)
    return _accuracy(logits, episode.query_y), -float(loss)


def _of_queries(episode: Episode, places: Tensor) -> Episode:
    return replace(episode, query_x=episode.query_x[places], query_y=episode.query_y[places])


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _percent(values: Sequence[float] | NDArray[np.float64]) -> str:
    found = bounded_interval(np.asarray(values, dtype=np.float64))
    return f"{found.mean:.2%} +- {found.half_width:.2%}"


Audit = Callable[[Subject], AuditResult]


def all_audits(*, inductive: bool) -> dict[str, Audit]:
    """Return the audits by name, with their usual numbers of episodes."""
    return {
        "transduction": partial(audit_transduction, inductive=inductive),
        "queries": audit_queries,
        "labels": audit_labels,
        "support": audit_support,
    }
