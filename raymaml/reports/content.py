"""The text of a report: the numbers of ``summary.json`` in tables and words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raymaml.evaluation.paired import FEWEST_EPISODES
from raymaml.evaluation.results import ArmResult
from raymaml.reports.document import bullets, code, heading, paragraph, strong, table
from raymaml.reports.summary import PLUS_MINUS, Numbers, margin, percent
from raymaml.statistics.intervals import FIRST_EPISODES, span

_INTERVALS = {
    "over episodes": "Clopper and Pearson's interval at the effective number of trials (Korn and"
    " Graubard 1998), as wide as Student's t far from 0 and 100%; after the mean stands the larger"
    " of the distances to its ends. The episodes are resampled from the same test classes and"
    " images, so it says how well this many episodes pin down the accuracy on these classes; it is"
    " not an interval for new classes.",
    "at any look": "confidence sequence (Waudby-Smith and Ramdas 2024): as over episodes, and valid"
    " also where the number of episodes was decided while judging, as evaluation.target_half_width"
    " does.",
    "for new classes": "class-cluster bootstrap: how far the accuracy would move with other test"
    " classes drawn from where these come from. More episodes do not make it narrower; more classes"
    " do.",
    "image-disjoint tasks": "as over episodes, over those that share no image with one another"
    " (sampling without replacement; Lafargue et al. 2024): for other images of these classes.",
}
_STOPPING = (
    "The number of episodes was decided while judging. So the intervals of accuracies over episodes"
    " are those at any look, and so are those of a study's verdicts on differences. A study's"
    " claims of other kinds stay undecided. The table of compared arms, and its p-values, are not"
    " corrected."
)
_TRANSDUCTIVE = (
    "A norm is transductive: the query batch is normalised by its own moments, so the accuracy"
    " depends on the number of queries per episode and on how they spread over the classes. It"
    " compares only with results on as many queries."
)
_TRAININGS = (
    "The trainings of an arm differ in their seed (weights, order of the episodes, dropout,"
    " augmentation) and are judged on the same test episodes. Student's t interval over them covers"
    " other trainings of the method. The interval over episodes says how well the episodes pin down"
    " the accuracy of one trained model."
)
_ALIKE = "Where all trainings of an arm came out alike, the distance of another one is unknown."
_COMPARISONS = (
    "Mean difference with its 95% intervals, over episodes and for new classes; two-sided sign test"
    " and Wilcoxon signed-rank test, both over episodes; the last column adjusts Wilcoxon's p for"
    f" all rows (Holm 1979). Fewer than {FEWEST_EPISODES} episodes are too few to call arms"
    " different."
)

_WORST_CLASSES, _MOST_STEPS = 10, 7
"""Rows of a table, and its columns after the first step: more would not fit on a page."""


def content(arms: Sequence[ArmResult], summary: Numbers, pictures: Iterable[str]) -> Iterator[str]:
    """Yield the blocks of a report.

    Args:
        arms: the results.
        summary: the content of ``summary.json``.
        pictures: blocks that show them; the first one opens the report.
    """
    numbers = summary["arms"]
    first, *others = [*pictures] or [""]
    yield from _opening(arms, summary, first)
    yield from _results(arms, numbers)
    yield from _trainings(summary["trainings"])
    yield from _comparisons(summary["comparisons"])
    yield from _classes(summary["classes"], arms[0].name)
    if others:
        yield heading("Pictures")
        yield from others
    yield from audits(summary["audits"])
    yield from _details(numbers)
    if identity := [*_identity(numbers, summary["circumstances"])]:
        yield heading("Identity")
        yield table([{"key": key, "value": code(value)} for key, value in identity], left=2)


def _opening(arms: Sequence[ArmResult], summary: Numbers, picture: str) -> Iterator[str]:
    """Yield the headline or the verdicts, the protocols, the picture, and the cautions."""
    if summary["verdicts"]:
        yield heading("Verdicts")
        yield table(
            [
                {
                    "claim": each["claim"],
                    "verdict": strong(f"{each['outcome']} ({each['scope']})"),
                    "numbers": each["numbers"],
                }
                for each in summary["verdicts"]
            ],
            left=3,
        )
    else:
        yield paragraph(strong(summary["headline"]))
    lines = {arm.name: code(str(arm.protocol)) for arm in arms}
    yield bullets(lines.items()) if len({*lines.values()}) > 1 else paragraph(lines[arms[0].name])
    yield picture
    for arm in arms:
        if arm.protocol.caution:
            yield paragraph(strong(f"{arm.name}: {arm.protocol.caution}."))
    steps = [numbers["accuracy_by_step"] for numbers in summary["arms"].values()]
    if arms[0].protocol.starts_equal and all(len(each) > 1 for each in steps):
        yield paragraph(
            "The head starts with equal rows, which give all classes equal logits. Without"
            f" adaptation the accuracy is {steps[0][0]['mean']:.2%} by construction, and no arm"
            " shows it."
        )


def _results(arms: Sequence[ArmResult], numbers: Mapping[str, Numbers]) -> Iterator[str]:
    """Yield the tables of accuracies, with the meaning of their intervals."""
    yield heading("Results")
    yield _accuracies(numbers)
    yield bullets((arm.name, arm.description) for arm in arms)
    yield heading("Four intervals of the mean accuracy")
    over_episodes, any_look, new_classes, disjoint_tasks = _INTERVALS
    yield table(
        [
            {
                "arm": name,
                over_episodes: percent(found),
                any_look: percent(found["any_look"]),
                new_classes: percent(found["new_classes"]),
                "classes": f"{found['new_classes']['num_classes']:,}",
                disjoint_tasks: percent(found["image_disjoint_tasks"]),
                "tasks": f"{found['image_disjoint_tasks']['num_episodes']:,}",
            }
            for name, found in ((name, each["accuracy"]) for name, each in numbers.items())
        ]
    )
    yield bullets(_INTERVALS.items())
    ends = {name: each["stopping"]["text"] for name, each in numbers.items() if each["stopping"]}
    if ends:
        yield paragraph(_STOPPING)
        yield bullets(ends.items())
    if any(arm.protocol.is_transductive for arm in arms):
        yield paragraph(_TRANSDUCTIVE)
    yield heading("Spread and calibration")
    yield table(
        [
            {
                "arm": name,
                "skew": _number(each["accuracy"]["skew"], "+.2f"),
                "worst 1%": _number(each["accuracy"]["worst_1%"], ".1%"),
                "calibration error": _number(each["calibration"]["error"], ".2%"),
                "Brier score": _number(each["brier"]["mean"], ".4f"),
            }
            for name, each in numbers.items()
        ]
    )


def _accuracies(numbers: Mapping[str, Numbers]) -> str:
    rows: list[dict[str, str]] = []
    for name, each in numbers.items():
        accuracy, first = each["accuracy"], each["accuracy"]["first_600"]
        quantiles = [(p, _number(value, ".1%")) for p, value in accuracy["quantiles"].items()]
        row = {
            "arm": name,
            "episodes": f"{each['num_episodes']:,}",
            "accuracy": percent(accuracy),
            "first 600": percent(first) if first["num_episodes"] == FIRST_EPISODES else "fewer",
            f"quantile {quantiles[0][0]}": quantiles[0][1],
            **dict(quantiles[1:]),
            "loss": _loss(each["loss"]),
        }
        if not rows:  # the model stands out
            row |= {key: strong(row[key]) for key in ("arm", "accuracy")}
        rows.append(row)
    return table(rows)


def _trainings(found: Mapping[str, Numbers]) -> Iterator[str]:
    """Yield the spread over trainings of the models that were trained more than once."""
    if not found:
        return
    yield heading("Over trainings")
    yield table(
        [
            {
                "arm": name,
                "trainings": f"{each['accuracy']['num_trainings']:,}",
                "mean accuracy": percent(each["accuracy"]) + _ends(each["accuracy"]),
                "standard deviation over trainings": _number(each["accuracy"]["std"], ".2%"),
                f"over episodes, one training ({PLUS_MINUS})": _number(
                    each["ci95_over_episodes"], ".2%"
                ),
            }
            for name, each in found.items()
        ]
    )
    yield paragraph(_TRAININGS)
    if not all(math.isfinite(each["accuracy"]["ci95"]) for each in found.values()):
        yield paragraph(_ALIKE)


def _comparisons(found: Sequence[Numbers]) -> Iterator[str]:
    """Yield the paired differences of the arms."""
    if not found:
        return
    yield heading("Compared on the same episodes")
    if rows := [_comparison(each) for each in found if "refusal" not in each]:
        yield table(rows)
        yield paragraph(_COMPARISONS)
    if refused := [each for each in found if "refusal" in each]:
        yield bullets((f"{each['arm']} minus {each['minus']}", each["refusal"]) for each in refused)


def _comparison(each: Numbers) -> dict[str, str]:
    mean = each["difference"]
    return {
        "difference": f"{each['arm']} minus {each['minus']}",
        "episodes": f"{mean['num_episodes']:,}",
        "mean": f"{100 * mean['mean']:+.2f}% ({span(*mean['interval95'])})",
        "for new classes": span(*each["new_classes"]["interval95"]),
        "better / equal / worse": f"{each['wins']:,} / {each['ties']:,} / {each['losses']:,}",
        **{
            f"p ({test})": f"{each[f'{test.lower()}_p']:.2g}"
            if each["allows_a_verdict"]
            else "too few"
            for test in ("sign", "Wilcoxon", "Holm")
        },
    }


def _classes(found: Sequence[Numbers], arm: str) -> Iterator[str]:
    """Yield the worst classes of an arm, and the classes that their queries were taken for."""
    if not found:
        return
    yield heading("Accuracy by class")
    yield table(
        [
            {
                "class": each["name"],
                "taken for": _others(each["taken_for"]),
                "accuracy": percent(each["accuracy"]),
                "episodes": f"{each['accuracy']['num_episodes']:,}",
            }
            for each in found[:_WORST_CLASSES]
        ],
        left=2,
    )
    yield paragraph(
        f"The worst of {len(found):,} classes in the episodes of {arm}; summary.json holds all of"
        " them. Behind another class stands the number of queries that were taken for it, of those"
        " in episodes with both classes."
    )


def _others(found: Sequence[Numbers] | None) -> str:
    if found is None:
        return "not recorded by an earlier raymaml"
    return ", ".join(f"{each['name']} ({each['queries']:,} of {each['of']:,})" for each in found)


def audits(found: Sequence[Numbers]) -> Iterator[str]:
    """Yield the outcomes of audits, each the fields of an ``AuditResult``."""
    for audit in found:
        yield heading(f"Audit: {audit['title']}")
        yield paragraph(strong(audit["outcome"]))
        yield paragraph(audit["sentence"])
        if audit["rows"]:
            yield table([{key: _cell(each) for key, each in row.items()} for row in audit["rows"]])


def _details(numbers: Mapping[str, Numbers]) -> Iterator[str]:
    """Yield accuracy by step, and cost."""
    yield heading("Accuracy by inner step")
    steps = {arm: [*map(percent, each["accuracy_by_step"])] for arm, each in numbers.items()}
    last = max(map(len, steps.values())) - 1
    shown = sorted({round(at * last / _MOST_STEPS) for at in range(_MOST_STEPS + 1)})
    yield table(
        [
            {"arm": name} | {f"step {at}": each[at] if at < len(each) else "" for at in shown}
            for name, each in steps.items()
        ]
    )
    yield heading("Cost")
    yield table(
        [
            {
                "arm": name,
                "episodes": f"{each['num_episodes']:,}",
                "median seconds per episode": f"{each['seconds']['median']:.4f}",
                "seconds in all": f"{each['seconds']['total']:,.1f}",
            }
            for name, each in numbers.items()
        ]
    )


def _identity(
    numbers: Mapping[str, Numbers], circumstances: Mapping[str, Sequence[Mapping[str, str]]]
) -> Iterator[tuple[str, str]]:
    """Yield the identity of the model, then how other arms differ, then hardware and such."""
    main, *_ = numbers
    identity = numbers[main]["identity"]
    for name, arm in numbers.items():
        for key, value in arm["identity"].items():
            if name == main or identity.get(key) != value:
                text = value if isinstance(value, str) else json.dumps(value)
                yield key if name == main else f"{name}: {key}", text
    yield from sorted(
        {
            (key if key == "hardware" else f"{name}: {key}", value)
            for name, chunks in circumstances.items()
            for chunk in chunks
            for key, value in chunk.items()
        }
    )


def _ends(interval: Numbers) -> str:
    """Write the ends of an accuracy where they are known."""
    low, high = interval["interval95"]
    return f" ({low:.2%} to {high:.2%})" if math.isfinite(interval["ci95"]) else ""


def _loss(loss: Numbers) -> str:
    if loss["num_nonfinite"]:
        return f"not finite in {loss['num_nonfinite']:,} episodes"
    return f"{loss['mean']:.4f} {PLUS_MINUS} {margin(loss, '.4f')}"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "undefined"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
