"""The page of a report, as Markdown that GitHub shows well."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raymaml.evaluation.plots import PLUS_MINUS
from raymaml.evaluation.statistics import PROBABILITIES, ArmSummary, Interval, Summary

_INTERVAL_NOTE = (
    f"{PLUS_MINUS} is the half-width of a 95% Student t interval over episodes. The episodes are"
    " resampled from the same test classes and images, so it says how well this many episodes pin"
    " down the accuracy on these classes; it is not an interval for new classes."
)
_TRANSDUCTIVE_NOTE = (
    "The norm is transductive: the query batch is normalised by its own moments, so the accuracy"
    " depends on the number of queries an episode and on how they spread over the classes, and"
    " compares only with results on as many."
)


def report_page(
    title: str,
    arms: Sequence[ArmSummary],
    protocol: str,
    identity: Mapping[str, Any],
    pictures: Mapping[str, str],
) -> str:
    """Lay out the report; ``pictures`` says what each file beside the page shows.

    ``identity`` holds what JSON knows, ``protocol`` is a ``report.protocol_line``.
    """
    main = arms[0].accuracy.overall
    notes = [_INTERVAL_NOTE]
    if any(part.startswith("transductive") for part in protocol.split(" | ")):
        notes.append(_TRANSDUCTIVE_NOTE)
    parts = [
        f"# {_escaped(title)}",
        f"**{_percent(main)}** accuracy on {main.count:,} test episodes",
        f"`{protocol}`",
        "## Results",
        _results_table(arms),
        "\n".join(f"- **{_escaped(arm.name)}**: {_escaped(arm.description)}" for arm in arms),
        *notes,
        "## Pictures",
        *(f"![{_escaped(text)}]({name})" for name, text in pictures.items()),
        "## Accuracy by inner step",
        _steps_table(arms),
        "## Identity",
        _table(["what", "value"], [[_escaped(k), _code(v)] for k, v in identity.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _results_table(arms: Sequence[ArmSummary]) -> str:
    first = min(arm.accuracy.first.count for arm in arms)
    header = ["arm", "episodes", "accuracy", f"first {first:,}"]
    header += [f"{'quantile ' * (p == PROBABILITIES[0])}{p:.0%}" for p in PROBABILITIES] + ["loss"]
    rows = [
        [
            _escaped(arm.name),
            f"{arm.accuracy.overall.count:,}",
            _percent(arm.accuracy.overall),
            _percent(arm.accuracy.first),
            *(f"{arm.accuracy.quantiles[p]:.1%}" for p in PROBABILITIES),
            _loss(arm.loss),
        ]
        for arm in arms
    ]
    for column in (0, 2):  # the name and the accuracy of the model
        rows[0][column] = f"**{rows[0][column]}**"
    return _table(header, rows)


def _steps_table(arms: Sequence[ArmSummary]) -> str:
    num_rows = max(len(arm.by_step) for arm in arms)
    rows = [
        [
            str(step),
            *(_percent(arm.by_step[step]) if step < len(arm.by_step) else "" for arm in arms),
        ]
        for step in range(num_rows)
    ]
    return _table(["inner steps", *(_escaped(arm.name) for arm in arms)], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells as Markdown: the first column to the left, numbers to the right."""
    align = [":--", *("--:" if len(header) > 2 else ":--" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def _percent(interval: Interval) -> str:
    if not math.isfinite(interval.mean):
        return "undefined"
    return f"{interval.mean:.2%}" + _margin(f"{interval.half_width:.2%}", interval)


def _loss(summary: Summary) -> str:
    overall = summary.overall
    if summary.num_nonfinite:
        return f"not finite in {summary.num_nonfinite:,} episodes"
    return f"{overall.mean:.4f}" + _margin(f"{overall.half_width:.4f}", overall)


def _margin(text: str, interval: Interval) -> str:
    return f" {PLUS_MINUS} {text}" if math.isfinite(interval.half_width) else ""


def _escaped(text: str) -> str:
    """Return ``text`` on one line, so that Markdown shows it as it is, in a table too."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _code(value: Any) -> str:
    """Return a value of the identity as code on one line of a table."""
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    fence = "`` {} ``" if "`" in text else "`{}`"
    # GitHub splits table cells at | before it looks for code.
    return fence.format(" ".join(text.split()) or " ").replace("|", "\\|")
