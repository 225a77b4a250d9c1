"""The report: its numbers, its words and its pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers_evaluation import record
from PIL import Image
from scipy import stats

from raymaml.common.untrusted import json_ready
from raymaml.config.model import ModelConfig
from raymaml.config.schema import EpisodesConfig
from raymaml.data.bank import ImageBank
from raymaml.evaluation.audit import AuditResult
from raymaml.evaluation.examination import Examination
from raymaml.evaluation.records import record_arrays, records_table
from raymaml.evaluation.results import ArmResult, Protocol
from raymaml.reports.content import _classes, content
from raymaml.reports.summary import by_class, summarize_arms
from raymaml.reports.write import write_report
from raymaml.statistics.confidence_sequence import Stopping, any_look_interval

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
SPEC = EpisodesConfig(num_episodes=4)
EXAMINED = Examination(
    episodes=3, finite=True, rounding=0, chance=0, support_order=0, query_order=0, company=0
)
PROTOCOL = Protocol(spec=SPEC, model=ModelConfig(head="zero"), num_steps=1, examination=EXAMINED)
CURVE: list[dict[str, Any]] = [
    {"step": 0, "val_accuracy": 0.2, "val_ci95": 0.01},
    {"step": 500, "val_accuracy": 0.8},
    {"step": 1000, "val_accuracy": 0.7, "val_ci95": None},
]


def arm(
    name: str, by_step: Sequence[Sequence[float]], loss: Sequence[float] | None = None
) -> ArmResult:
    losses = [1.0] * len(by_step) if loss is None else loss
    records = [
        record(index, accuracy_by_step=tuple(steps), loss_by_step=(losses[index],) * len(steps))
        for index, steps in enumerate(by_step)
    ]
    return ArmResult(
        name=name,
        description="As trained.",
        protocol=PROTOCOL,
        records=records_table(records),
        identity={"weights": name},
        circumstances=[{"hardware": "an abacus"}],
    )


MODEL = arm("model", [[0.2, 0.6], [0.2, 0.8], [0.4, 0.8], [0.2, 1.0]], [4, 3, 2, 1])
BASELINE = arm("no-adaptation", [[0.2], [0.2], [0.4], [0.2]])
ARMS = [MODEL, BASELINE]


def words(
    *arms: ArmResult,
    trainings: Mapping[str, Mapping[int, str]] | None = None,
    verdicts: Sequence[Mapping[str, Any]] = (),
    audits: Sequence[AuditResult] = (),
) -> tuple[dict[str, Any], str]:
    """Return the numbers of a report as JSON has them, and its text without pictures."""
    records = {each.name: record_arrays(each.records) for each in arms}
    summary = {
        **summarize_arms(arms, records, trainings or {}),
        "verdicts": verdicts,
        "audits": [asdict(audit) for audit in audits],
    }
    return json_ready(summary), "\n\n".join(content(arms, summary, []))


def tables(page: str) -> list[list[list[str]]]:
    """Cells of each Markdown table of ``page``."""
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        for lines in blocks
    ]


@pytest.mark.parametrize(
    ("shape", "model", "num_steps", "expected"),
    [
        (
            {},
            ModelConfig(head="zero"),
            1,
            "5-way 1-shot 15-query | transductive | 1 step | head zero | single model",
        ),
        (
            {"num_ways": 20, "num_shots": 5, "num_queries": 1},
            ModelConfig(norm="context"),
            10,
            "20-way 5-shot 1-query | inductive (context) | 10 steps | head learned | single model",
        ),
        (
            {},
            ModelConfig(norm={"encoder.conv1": "transductive", "*": "layer"}, head="shared"),
            0,
            "5-way 1-shot 15-query | transductive (encoder.conv1: transductive, *: layer) | 0 steps"
            " | head shared | single model",
        ),
    ],
)
def test_protocol_line(
    shape: dict[str, int], model: ModelConfig, num_steps: int, expected: str
) -> None:
    spec = EpisodesConfig(num_episodes=1, **shape)
    protocol = Protocol(spec=spec, model=model, num_steps=num_steps, examination=EXAMINED)
    assert str(protocol) == expected


def test_summary_holds_the_numbers() -> None:
    summary, _ = words(MODEL, BASELINE)
    # 0.6, 0.8, 0.8, 1.0: mean 0.8, s^2 = (0.04 + 0.04) / 3, standard error 0.0816497. Excess
    # kurtosis (3/2) (5 (0.0008/0.02^2 - 3) + 6) = 1.5, so 1.5 * 4 / (1.5 + 2) = 12/7 degrees
    trials = 0.16 / 0.0816497**2 * (1.959964 / stats.t.ppf(0.975, 12 / 7)) ** 2
    low = stats.beta.ppf(0.025, 0.8 * trials, 0.2 * trials + 1)
    high = stats.beta.ppf(0.975, 0.8 * trials + 1, 0.2 * trials)
    accuracy = summary["accuracy"]
    assert accuracy["mean"] == pytest.approx(0.8, rel=1e-12)
    assert accuracy["ci95"] == pytest.approx(0.8 - low, rel=1e-5)  # the larger distance
    assert accuracy["interval95"] == pytest.approx([low, high], rel=1e-5)
    assert accuracy["std"] == pytest.approx(math.sqrt(0.08 / 3), rel=1e-12)
    assert accuracy["first_600"]["num_episodes"] == 4
    assert accuracy["quantiles"]["50%"] == pytest.approx(0.8)
    assert list(accuracy["quantiles"]) == ["5%", "25%", "50%", "75%", "95%"]
    assert accuracy["worst_1%"] == 0.6  # one episode
    assert accuracy["skew"] == pytest.approx(0.0, abs=1e-9)  # 0.6 and 1.0 around 0.8
    assert summary["calibration"]["error"] == pytest.approx(1 - 14.5 / 15)  # all are right
    assert summary["loss"]["mean"] == 2.5
    assert summary["num_episodes"] == 4
    assert summary["protocol"] == str(PROTOCOL)
    assert [point["step"] for point in summary["accuracy_by_step"]] == [0, 1]
    assert summary["accuracy_by_step"][0]["mean"] == pytest.approx(0.25)  # 1.0 / 4
    assert summary["accuracy_by_step"][1]["mean"] == accuracy["mean"]
    assert list(summary["arms"]) == ["model", "no-adaptation"]
    assert {key: summary[key] for key in summary["arms"]["model"]} == summary["arms"]["model"]
    assert summary["arms"]["no-adaptation"]["accuracy"]["mean"] == pytest.approx(0.25)


def test_four_intervals_stand_side_by_side() -> None:
    # All episodes of the helper have the same classes and images: nothing is known of others.
    summary, page = words(MODEL, BASELINE)
    accuracy = summary["accuracy"]
    assert accuracy["new_classes"]["ci95"] is None
    assert accuracy["new_classes"]["num_classes"] == 5
    assert accuracy["image_disjoint_tasks"]["num_episodes"] == 1
    header, _, model, _baseline = tables(page)[1]
    assert model == [
        "model",
        f"80.00% {PLUS_MINUS} 59.93%",
        # (log 40 + psi) / 2 is more than 1: of 4 episodes nothing is known at any look
        f"80.00% {PLUS_MINUS} 80.00%",
        f"80.00% {PLUS_MINUS} unknown",
        "5",
        f"60.00% {PLUS_MINUS} 58.50%",  # of the first episode alone: 0.975 * 0.6
        "1",
    ]
    assert header[1:4] == ["over episodes", "at any look", "for new classes"]


def test_where_judging_may_stop_early_the_headline_holds_at_any_look() -> None:
    right = np.random.default_rng(1).binomial(15, 0.6, 200) / 15
    fixed = arm("model", [[0.2, value] for value in right])
    found = any_look_interval(right)
    for most, text in (
        (
            1000,
            "judging stopped early, at look 2 of at most 10, by evaluation.target_half_width=0.1",
        ),
        (200, "judging did not stop early: it ended at look 2 of at most 2"),
    ):
        stopping = Stopping(target_half_width=0.1, most_episodes=most)
        summary, page = words(replace(fixed, stopping=stopping))
        assert summary["accuracy"]["mean"] == pytest.approx(right.mean())
        assert summary["accuracy"]["ci95"] == found.half_width
        assert summary["accuracy"]["interval95"] == [found.low, found.high]
        assert summary["accuracy_by_step"][1]["ci95"] == found.half_width
        assert summary["stopping"]["text"] == text
        assert summary["stopping"]["stopped_early"] == (most == 1000)
        shown = f"{right.mean():.2%} {PLUS_MINUS} {found.half_width:.2%} accuracy on 200 test"
        assert summary["headline"].startswith(f"{shown} episodes; {text}")
        assert shown in page
        assert text.replace("_", "\\_") in page
    summary, page = words(fixed)
    assert summary["stopping"] is None
    assert summary["accuracy"]["ci95"] < found.half_width
    assert "stop early" not in page


def test_arms_are_compared_on_the_same_episodes() -> None:
    summary, page = words(MODEL, BASELINE)
    (found,) = summary["comparisons"]
    # 0.2 - 0.6, 0.2 - 0.8, 0.4 - 0.8, 0.2 - 1.0
    assert found["difference"]["mean"] == pytest.approx((-0.4 - 0.6 - 0.4 - 0.8) / 4)
    assert (found["wins"], found["ties"], found["losses"]) == (0, 0, 4)
    assert found["sign_p"] == pytest.approx(2 * 0.5**4)
    assert found["holm_p"] == found["wilcoxon_p"]  # of one comparison
    (row,) = tables(page)[3][2:]
    assert row[:2] == ["no-adaptation minus model", "4"]
    assert row[2].startswith("-55.00% (-81.")
    assert row[3:] == ["unknown", "0 / 0 / 4", *["too few"] * 3]  # all have the same classes
    assert found["new_classes"]["num_classes"] == 5


def test_other_episodes_are_not_compared() -> None:
    rows = pa.array([[1] * 5] * 4, pa.list_(pa.int64(), 5))
    index = BASELINE.records.schema.get_field_index("support_rows")
    other = replace(BASELINE, records=BASELINE.records.set_column(index, "support_rows", rows))
    summary, page = words(MODEL, other)
    refusal = "no-adaptation and model: episode 0 has other support images"
    assert summary["comparisons"][0]["refusal"].startswith(refusal)
    assert refusal in page


@pytest.mark.parametrize(
    ("means", "shown", "known"),
    [
        # t(0.975; 2) = 4.302653, s 1%: 4.302653 * 1% / sqrt(3) = 2.48%
        ((0.4, 0.41, 0.42), f"41.00% {PLUS_MINUS} 2.48% (38.52% to 43.48%)", True),
        ((1.0, 1.0, 1.0), f"100.00% {PLUS_MINUS} unknown", False),
        ((0.1 + 0.2, 0.3, 0.3), f"30.00% {PLUS_MINUS} unknown", False),  # alike up to rounding
    ],
)
def test_the_spread_of_trainings_is_shown_where_it_is_known(
    means: Sequence[float], shown: str, known: bool
) -> None:
    arms = [arm(f"a-{seed}", [[0.2, mean]] * 2) for seed, mean in enumerate(means)]
    trainings = {"a": {seed: each.name for seed, each in enumerate(arms)}}
    summary, page = words(*arms, trainings=trainings)
    (row,) = (row for table in tables(page) for row in table if row[:2] == ["a", "3"])
    assert row[2] == shown
    assert row[3] == ("1.00%" if known else "0.00%")
    assert (summary["trainings"]["a"]["accuracy"]["ci95"] is not None) == known
    assert ("came out alike" in page) != known


def test_verdicts_and_audits_are_shown() -> None:
    verdict = {"claim": "a > b", "outcome": "undecided", "scope": "3 trainings", "numbers": "1"}
    audit = AuditResult(
        name="x", title="A look", outcome="flagged", sentence="Seen.", rows=[{"a": 1, "b": 0.5}]
    )
    _, page = words(MODEL, BASELINE, verdicts=[verdict], audits=[audit])
    assert tables(page)[0][2] == ["a \\> b", "**undecided (3 trainings)**", "1"]
    assert ["1", "0.5"] in [row for table in tables(page) for row in table]
    assert "## Audit: A look\n\n**flagged**\n\nSeen." in page


def test_first_600_are_the_first_600() -> None:
    summary, page = words(arm("model", [[0.5]] * 600 + [[1.0]] * 400), arm("few", [[0.5]] * 100))
    assert summary["accuracy"]["first_600"]["mean"] == 0.5
    assert summary["accuracy"]["mean"] == 0.7  # (300 + 400) / 1,000
    header, _, row, few = tables(page)[0]
    # what is not 50% has a share of at most 1 - 0.025^(1/600) = 0.613%, and may be 0% or 100%
    assert row[header.index("first 600")] == f"50.00% {PLUS_MINUS} 0.31%"
    assert few[header.index("first 600")] == "fewer"


def test_the_page_says_what_was_judged_and_how() -> None:
    identity = {"checkpoint": "c0ffee", "seed": 7, "versions": {"torch": "2.14"}}
    _, page = words(*(replace(each, identity=identity | each.identity) for each in ARMS))
    assert f"`{PROTOCOL}`" in page
    results, _intervals, _spread, _compared, steps, cost, identities = tables(page)
    header, _, model, baseline = results
    assert model[header.index("accuracy")] == f"**80.00% {PLUS_MINUS} 59.93%**"
    # 1, 2, 3, 4: 3.182446 * sqrt(5/3) / 2 = 2.0543.
    assert model[header.index("loss")] == f"2.5000 {PLUS_MINUS} 2.0543"
    # 0.6 + 0.15 * 0.2 (position 0.15 of the sorted values), 0.8, and 0.8 + 0.85 * 0.2.
    shown = ["63.0%", "75.0%", "80.0%", "85.0%", "97.0%"]
    assert model[header.index("quantile 5%") : header.index("loss")] == shown
    assert baseline[0] == "no-adaptation"
    assert steps[0] == ["arm", "step 0", "step 1"]
    assert steps[3][2] == ""  # no-adaptation takes no step
    assert identities[2:] == [
        ["checkpoint", "`c0ffee`"],
        ["seed", "`7`"],
        ["versions", '`{"torch": "2.14"}`'],
        ["weights", "`model`"],
        ["no-adaptation: weights", "`no-adaptation`"],
        ["hardware", "`an abacus`"],
    ]
    assert cost[2] == ["model", "4", "0.5000", "2.0"]


def test_the_page_says_what_the_protocol_means() -> None:
    both = [replace(MODEL, name=name) for name in ("a", "b")]
    _, page = words(*both)
    assert "not an interval for new classes" in page
    assert "depends on the number of queries" in page
    assert "the accuracy is 25.00% by construction" in page
    assert "caution" not in page
    other = replace(PROTOCOL, model=ModelConfig(norm="context"), examination=None)
    _, page = words(*(replace(each, protocol=other) for each in both))
    caution = "caution: not examined whether its logits follow their images"
    assert f"**a: {caution}.**\n\n**b: {caution}.**" in page
    assert "not an interval for new classes" in page
    assert "number of queries" not in page
    assert "by construction" not in page


@pytest.mark.fault("NaN: evaluation")
def test_losses_that_are_not_finite_are_counted_not_averaged() -> None:
    losses = [1.0, math.nan, math.inf, 1.0]
    summary, page = words(arm("model", [[0.2], [0.4], [0.2], [0.4]], losses))
    assert summary["loss"]["mean"] is None
    assert set(summary["loss"]["quantiles"].values()) == {None}
    assert summary["loss"]["num_nonfinite"] == 2
    assert summary["accuracy"]["num_nonfinite"] == 0
    assert tables(page)[0][2][-1] == "not finite in 2 episodes"


def test_equal_results_give_equal_files_and_pictures_on_white(tmp_path: Path) -> None:
    first, second = (
        write_report(tmp_path / name, ARMS, title="Glyphs", identity={"seed": 7}, curve=CURVE)
        for name in ("a", "b")
    )
    assert first == tmp_path / "a" / "summary.json"
    summary = json.loads(first.read_text(), parse_constant=pytest.fail)
    assert summary["identity"] == {"seed": 7, "weights": "model"}
    page = (first.parent / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# Glyphs\n")
    assert page.index("(arms.png)") < page.index("## Results")  # it opens with its picture
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert names == [
        "arms.png",
        "accuracy_distribution.png",
        "running_mean.png",
        "accuracy_by_step.png",
        "calibration.png",
        "learning_curve.png",
    ]
    html = (first.parent / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == html.count("<img ") == 6
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)  # it needs no other file
    written = sorted(path.name for path in first.parent.iterdir())
    assert written == sorted([*names, "report.md", "report.html", "summary.json"])
    for name in written:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    for name in names:
        with Image.open(first.parent / name) as image:
            assert image.size == (1152, 648)
            pixels = np.asarray(image.convert("RGB"))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert 0.4 < np.mean(pixels == 255) < 0.99


def test_the_worst_episodes_are_drawn_and_no_curve_without_history(
    tmp_path: Path, tiny_bank: ImageBank
) -> None:
    images = {"class_ids": (17, 18), "support_rows": (140, 148), "query_rows": (141, 149)}
    records = [
        record(index, accuracy_by_step=(accuracy,), class_accuracy=(accuracy,) * 2, **images)
        for index, accuracy in enumerate([0.5, 0.0, 1.0, 0.25])
    ]
    result = replace(MODEL, records=records_table(records))
    curve = [{"step": 0, "val_accuracy": None}, {"step": 0}, {"step": 1, "val_accuracy": math.nan}]
    path = write_report(tmp_path, [result], bank=tiny_bank, curve=curve)
    page = (path.parent / "report.md").read_text(encoding="utf-8")
    found = re.findall(r"!\[([^\]]+)\]\((worst_\d.png)\)", page)
    assert found == [
        ("Episode 1, the worst: 0.0%", "worst_1.png"),
        ("Episode 3, the second worst: 25.0%", "worst_2.png"),
        ("Episode 0, the third worst: 50.0%", "worst_3.png"),
    ]
    assert all((path.parent / name).is_file() for _, name in found)
    assert "learning_curve" not in page
    assert not (path.parent / "learning_curve.png").exists()


def test_the_worst_classes_are_named_with_the_classes_they_are_taken_for() -> None:
    # 3 queries of labels 0..4 each; in episode 0 all of label 2 are taken for 0, one of 1 for 4
    labels = [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    taken = [0] * 3 + [4, 1, 1] + [0] * 3 + [3] * 3 + [4] * 3
    shares = (1.0, 2 / 3, 0.0, 1.0, 1.0)
    records = [
        record(0, query_predictions=tuple(taken), class_accuracy=shares),
        record(1, class_accuracy=(1.0,) * 5),  # all are right
        record(2, query_predictions=(-1,) * 15, class_ids=(0, 1, 2, 3, 5)),  # not recorded
    ]
    found = by_class(record_arrays(records_table(records)), [*"abcdef"])
    assert labels == list(record(0)["query_labels"])
    # c: 0, 1, 0.8 (the helper's accuracy); b: 2/3, 1, 0.8; f: 0.8
    assert [each["name"] for each in found] == ["c", "f", "b", "a", "d", "e"]
    assert found[0]["accuracy"]["mean"] == pytest.approx(1.8 / 3)
    assert found[0]["taken_for"] == [{"name": "a", "queries": 3, "of": 6}]
    assert found[1]["taken_for"] is None
    assert found[2]["taken_for"] == [{"name": "e", "queries": 1, "of": 6}]
    assert found[3]["taken_for"] == []
    page = "\n".join(_classes(found, "model"))
    assert "| c | a (3 of 6) | 60.00%" in page
    assert "| f | not recorded by an earlier raymaml | 80.00%" in page
    assert "The worst of 6 classes" in page


def test_arms_need_names_of_their_own(tmp_path: Path) -> None:
    for arms in ([], [MODEL, MODEL]):
        with pytest.raises(ValueError, match="different names"):
            write_report(tmp_path / "report", arms)
    assert not (tmp_path / "report").exists()
