"""What a report says, section by section."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raymaml.evaluation.page import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Strong,
    Table,
)
from raymaml.evaluation.paired import FEWEST_EPISODES, Paired
from raymaml.evaluation.plots import PLUS_MINUS
from raymaml.evaluation.statistics import FIRST_EPISODES, PROBABILITIES, Interval, Summary, bounds
from raymaml.evaluation.summary import ArmSummary, Comparison, Replicated
from raymaml.evaluation.verdict import AuditResult, Verdict

_INTERVALS = (
    (
        "over episodes",
        "Clopper and Pearson's interval at the effective number of trials (Korn and Graubard"
        " 1998), as wide as Student's t far from 0 and 100%; after the mean stands the larger of"
        " the distances to its ends. The episodes are resampled from the same test classes and"
        " images, so it says how well this many episodes pin down the accuracy on these classes; it"
        " is not an interval for new classes.",
    ),
    (
        "at any look",
        "confidence sequence (Waudby-Smith and Ramdas 2024): as over episodes, and valid also where"
        " their number was decided by what was seen, as evaluation.target_half_width does.",
    ),
    (
        "for new classes",
        "class-cluster bootstrap: how far the accuracy would move with other test classes drawn"
        " from where these come from. More episodes do not make it narrower; more classes do.",
    ),
    (
        "image-disjoint tasks",
        "as over episodes, over those that share no image with one another (sampling without"
        " replacement; Lafargue et al. 2024): for other images of these classes.",
    ),
)
_ANY_LOOK_NOTE = (
    "The number of episodes was decided while judging. So the intervals of accuracies over episodes"
    " are those at any look, and so are those of a study's verdicts on differences. A study's"
    " claims of other kinds stay undecided. The table of compared arms, and its p-values, are not"
    " corrected."
)
_TRANSDUCTIVE_NOTE = (
    "A norm is transductive: the query batch is normalised by its own moments, so the accuracy"
    " depends on the number of queries an episode and on how they spread over the classes, and"
    " compares only with results on as many."
)


def headline(arms: Sequence[ArmSummary]) -> str:
    """Say the accuracy of the first arm with its 95% interval, and over how many episodes."""
    main = arms[0].accuracy.overall
    text = f"{_percent(main)} accuracy on {main.count:,} test episodes"
    if (stopping := arms[0].stopping) is None:
        return text
    return f"{text}; {stopping.sentence(main.count)}, and the interval holds at any look"


def head(arms: Sequence[ArmSummary], verdicts: Sequence[Verdict]) -> Iterator[Block]:
    """The number, the protocol and the verdicts."""
    protocols = {arm.protocol for arm in arms}
    if verdicts:
        rows = [
            [each.claim, Strong(f"{each.outcome} ({each.scope})"), each.numbers]
            for each in verdicts
        ]
        yield Heading("Verdicts")
        yield Table(["claim", "verdict", "numbers"], rows, left=3)
    else:
        yield Paragraph(Strong(headline(arms)))
    if len(protocols) == 1:
        yield Paragraph(Code(arms[0].protocol))
    else:
        yield Bullets([(arm.name, Code(arm.protocol)) for arm in arms])
    for arm in arms:
        for text in (part for part in arm.protocol.split(" | ") if part.startswith("caution")):
            yield Paragraph(Strong(f"{arm.name}: {text}."))
    if _starts_equal(arms[0].protocol) and all(len(arm.by_step) > 1 for arm in arms):
        yield Paragraph(
            "The head starts with equal rows, which give all classes equal logits. Without"
            f" adaptation the accuracy is {arms[0].by_step[0].mean:.2%} by construction, and no arm"
            " shows it."
        )


def results(arms: Sequence[ArmSummary]) -> Iterator[Block]:
    """The tables of accuracies, and what their intervals mean."""
    yield Heading("Results")
    yield _results_table(arms)
    yield Bullets([(arm.name, arm.description) for arm in arms])
    yield Heading("Four intervals of the mean accuracy")
    yield Table(
        ["arm", *(name for name, _ in _INTERVALS[:3]), "classes", _INTERVALS[3][0], "tasks"],
        [
            [
                arm.name,
                _percent(arm.accuracy.overall),
                _percent(arm.any_look),
                _percent(arm.new_classes),
                f"{arm.new_classes.count:,}",
                _percent(arm.disjoint_tasks),
                f"{arm.disjoint_tasks.count:,}",
            ]
            for arm in arms
        ],
    )
    yield Bullets(_INTERVALS)
    ends = [
        (arm.name, arm.stopping.sentence(arm.accuracy.overall.count))
        for arm in arms
        if arm.stopping
    ]
    if ends:
        yield Paragraph(_ANY_LOOK_NOTE)
        yield Bullets(ends)
    if any(_is_transductive(arm.protocol) for arm in arms):
        yield Paragraph(_TRANSDUCTIVE_NOTE)
    yield Heading("Spread and calibration")
    yield Table(
        ["arm", "skew", "worst 1%", "calibration error", "Brier score"],
        [
            [
                arm.name,
                _number(arm.skew, "+.2f"),
                _number(arm.worst, ".1%"),
                _number(arm.calibration.error, ".2%"),
                _number(arm.brier.overall.mean, ".4f"),
            ]
            for arm in arms
        ],
    )


def trainings(found: Mapping[str, Replicated]) -> Iterator[Block]:
    """What the trainings of a model have in common, where it was trained more than once."""
    if not found:
        return
    yield Heading("Over trainings")
    rows = [
        [
            name,
            f"{each.accuracy.count:,}",
            _percent(each.accuracy) + _between(each.accuracy),
            _number(each.accuracy.std, ".2%"),
            _number(each.over_episodes, ".2%"),
        ]
        for name, each in found.items()
    ]
    header = ["arm", "trainings", "mean accuracy", "standard deviation over trainings"]
    yield Table([*header, f"over episodes, one training ({PLUS_MINUS})"], rows)
    yield Paragraph(
        "The trainings of an arm differ in their seed (weights, order of the episodes, dropout,"
        " augmentation) and are judged on the same test episodes. Student's t interval over them"
        " covers other trainings of the method. The interval over episodes says how well the"
        " episodes pin down the accuracy of one trained model."
    )
    if not all(math.isfinite(each.accuracy.half_width) for each in found.values()):
        yield Paragraph(
            "Where all trainings of an arm came out alike, how far another one would be from them"
            " is unknown."
        )


def comparisons(found: Sequence[Comparison]) -> Iterator[Block]:
    """Paired differences."""
    if not found:
        return
    yield Heading("Compared on the same episodes")
    rows = [_comparison_row(each, each.result) for each in found if each.result is not None]
    if rows:
        header = ["difference", "episodes", "mean", "for new classes", "better / equal / worse"]
        yield Table([*header, "p (sign)", "p (Wilcoxon)", "p (Holm)"], rows)
        yield Paragraph(
            "Mean difference with its 95% intervals, over episodes and for new classes;"
            " two-sided sign test and Wilcoxon signed-rank test, both over episodes; the last"
            " column adjusts Wilcoxon's p for all rows (Holm 1979). Fewer than"
            f" {FEWEST_EPISODES} episodes are too few to call arms different."
        )
    refused = [each for each in found if each.result is None]
    if refused:
        yield Bullets([(f"{each.arm} minus {each.minus}", each.refusal) for each in refused])


def pictures(shown: Sequence[Picture]) -> Iterator[Block]:
    """The pictures."""
    yield Heading("Pictures")
    yield from shown


def audits(found: Sequence[AuditResult]) -> Iterator[Block]:
    """What audits found."""
    for audit in found:
        yield Heading(f"Audit: {audit.title}")
        yield Paragraph(Strong(audit.outcome))
        yield Paragraph(audit.sentence)
        if audit.rows:
            header = list(audit.rows[0])
            yield Table(header, [[_cell(row[key]) for key in header] for row in audit.rows])


def tail(
    arms: Sequence[ArmSummary],
    identities: Sequence[Mapping[str, Any]],
    circumstances: Sequence[tuple[str, str]],
) -> Iterator[Block]:
    """Steps, cost and identity."""
    yield Heading("Accuracy by inner step")
    yield _steps_table(arms)
    yield Heading("Cost")
    yield Table(
        ["arm", "episodes", "median seconds an episode", "seconds in all"],
        [
            [
                arm.name,
                f"{arm.accuracy.overall.count:,}",
                f"{arm.seconds:.4f}",
                f"{arm.total_seconds:,.1f}",
            ]
            for arm in arms
        ],
    )
    yield Heading("Identity")
    rows = [[key, Code(_plain(value))] for key, value in identities[0].items()]
    for arm, identity in zip(arms[1:], identities[1:], strict=True):
        rows += [
            [f"{arm.name}: {key}", Code(_plain(value))]
            for key, value in identity.items()
            if identities[0].get(key) != value
        ]
    rows += [[key, Code(value)] for key, value in circumstances]
    yield Table(["what", "value"], rows, left=2)


def _is_transductive(protocol: str) -> bool:
    return any(part.startswith("transductive") for part in protocol.split(" | "))


def _starts_equal(protocol: str) -> bool:
    return not {"head zero", "head shared"}.isdisjoint(protocol.split(" | "))


def _results_table(arms: Sequence[ArmSummary]) -> Table:
    header = ["arm", "episodes", "accuracy", f"first {FIRST_EPISODES}"]
    header += [f"{'quantile ' * (p == PROBABILITIES[0])}{p:.0%}" for p in PROBABILITIES] + ["loss"]
    rows: list[list[str]] = [
        [
            arm.name,
            f"{arm.accuracy.overall.count:,}",
            _percent(arm.accuracy.overall),
            _percent(arm.accuracy.first) if arm.accuracy.first.count == FIRST_EPISODES else "fewer",
            *(_number(arm.accuracy.quantiles[p], ".1%") for p in PROBABILITIES),
            _loss(arm.loss),
        ]
        for arm in arms
    ]
    for column in (0, 2):  # the name and the accuracy of the first arm
        rows[0][column] = Strong(rows[0][column])
    return Table(header, rows)


def _comparison_row(comparison: Comparison, result: Paired) -> list[str]:
    difference = result.difference
    return [
        f"{comparison.arm} minus {comparison.minus}",
        f"{difference.count:,}",
        f"{100 * difference.mean:+.2f}% ({bounds(difference)})",
        bounds(result.new_classes),
        f"{result.wins:,} / {result.ties:,} / {result.losses:,}",
        *(
            f"{p:.2g}" if result.allows_a_verdict else "too few"
            for p in (result.sign_p, result.wilcoxon_p, comparison.adjusted_p)
        ),
    ]


def _steps_table(arms: Sequence[ArmSummary]) -> Table:
    num_rows = max(len(arm.by_step) for arm in arms)
    rows = [
        [
            str(step),
            *(_percent(arm.by_step[step]) if step < len(arm.by_step) else "" for arm in arms),
        ]
        for step in range(num_rows)
    ]
    return Table(["inner steps", *(arm.name for arm in arms)], rows)


def _percent(interval: Interval) -> str:
    if not math.isfinite(interval.mean):
        return "undefined"
    return f"{interval.mean:.2%}" + _margin(f"{interval.half_width:.2%}", interval)


def _between(interval: Interval) -> str:
    """Write the ends of an accuracy; nothing where they are unknown."""
    if not math.isfinite(interval.half_width):
        return ""
    return f" ({interval.low:.2%} to {interval.high:.2%})"


def _loss(summary: Summary) -> str:
    overall = summary.overall
    if summary.num_nonfinite:
        return f"not finite in {summary.num_nonfinite:,} episodes"
    return f"{overall.mean:.4f}" + _margin(f"{overall.half_width:.4f}", overall)


def _margin(text: str, interval: Interval) -> str:
    return f" {PLUS_MINUS} {text if math.isfinite(interval.half_width) else 'unknown'}"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "undefined"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
