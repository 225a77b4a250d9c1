"""The report: its numbers, its page and its pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
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
from raymaml.evaluation.examination import Examination
from raymaml.evaluation.plots import bar_edges, round_ticks, spread_labels
from raymaml.evaluation.records import read_records, write_chunk
from raymaml.evaluation.report import ArmResult, protocol_line, write_report
from raymaml.evaluation.sequences import any_look_interval
from raymaml.evaluation.summary import Stopping
from raymaml.evaluation.verdict import AuditResult, Verdict

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
SPEC = EpisodesConfig(num_episodes=4)
EXAMINED = Examination(
    episodes=3, finite=True, rounding=0, chance=0, support_order=0, query_order=0, company=0
)
PROTOCOL = protocol_line(SPEC, ModelConfig(head="zero"), 1, EXAMINED)
CURVE: list[dict[str, Any]] = [
    {"step": 0, "val_accuracy": 0.2, "val_ci95": 0.01},
    {"step": 500, "val_accuracy": 0.8},
    {"step": 1000, "val_accuracy": 0.7, "val_ci95": None},
]


def arm(
    folder: Path,
    name: str,
    by_step: Sequence[Sequence[float]],
    loss: Sequence[float] | None = None,
    *,
    description: str = "As trained.",
    protocol: str = PROTOCOL,
) -> ArmResult:
    losses = [1.0] * len(by_step) if loss is None else loss
    records = [
        record(index, accuracy_by_step=tuple(steps), loss_by_step=(losses[index],) * len(steps))
        for index, steps in enumerate(by_step)
    ]
    path = folder / "records" / f"{len(list(folder.rglob('*.parquet')))}.parquet"
    write_chunk(path, records, {})
    return ArmResult(
        name=name,
        description=description,
        protocol=protocol,
        records=read_records([path]),
        identity={"weights": name},
        circumstances=[{"hardware": "an abacus"}],
    )


def two_arms(folder: Path) -> list[ArmResult]:
    return [
        arm(folder, "model", [[0.2, 0.6], [0.2, 0.8], [0.4, 0.8], [0.2, 1.0]], [4, 3, 2, 1]),
        arm(folder, "no-adaptation", [[0.2], [0.2], [0.4], [0.2]]),
    ]


def report(folder: Path, arms: Sequence[ArmResult], **options: Any) -> tuple[dict[str, Any], str]:
    options = {"identity": {}} | options
    path = write_report(folder / "report", arms, **options)
    assert path == folder / "report" / "summary.json"
    summary = json.loads(path.read_text(), parse_constant=pytest.fail)
    return summary, (folder / "report" / "report.md").read_text(encoding="utf-8")


def tables(page: str) -> list[list[list[str]]]:
    """Cells of each Markdown table of ``page``."""
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        for lines in blocks
    ]


@pytest.mark.parametrize(
    ("spec", "model", "num_steps", "expected"),
    [
        (
            EpisodesConfig(num_episodes=1),
            ModelConfig(head="zero"),
            1,
            "5-way 1-shot 15-query | transductive | 1 step | head zero | single model",
        ),
        (
            EpisodesConfig(num_ways=20, num_shots=5, num_queries=1, num_episodes=1),
            ModelConfig(norm="context"),
            10,
            "20-way 5-shot 1-query | inductive (context) | 10 steps | head learned | single model",
        ),
        (
            EpisodesConfig(num_episodes=1),
            ModelConfig(norm={"encoder.conv1": "transductive", "*": "layer"}, head="shared"),
            0,
            "5-way 1-shot 15-query | transductive (encoder.conv1: transductive, *: layer) | 0 steps"
            " | head shared | single model",
        ),
    ],
)
def test_protocol_line(
    spec: EpisodesConfig, model: ModelConfig, num_steps: int, expected: str
) -> None:
    assert protocol_line(spec, model, num_steps, EXAMINED) == expected


def test_summary_holds_the_numbers(tmp_path: Path) -> None:
    summary, _ = report(tmp_path, two_arms(tmp_path), identity={"checkpoint": "c0ffee"})
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
    assert summary["loss"]["mean"] == 2.5
    assert summary["num_episodes"] == 4
    assert summary["protocol"] == PROTOCOL
    assert summary["identity"] == {"checkpoint": "c0ffee", "weights": "model"}
    assert [point["step"] for point in summary["accuracy_by_step"]] == [0, 1]
    assert summary["accuracy_by_step"][0]["mean"] == pytest.approx(0.25)  # 1.0 / 4
    assert summary["accuracy_by_step"][1]["mean"] == accuracy["mean"]
    assert list(summary["arms"]) == ["model", "no-adaptation"]
    assert {key: summary[key] for key in summary["arms"]["model"]} == summary["arms"]["model"]
    assert summary["arms"]["no-adaptation"]["accuracy"]["mean"] == pytest.approx(0.25)


def test_four_intervals_stand_side_by_side(tmp_path: Path) -> None:
    # All episodes of the helper have the same classes and images: nothing is known of others.
    summary, page = report(tmp_path, two_arms(tmp_path))
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


def test_where_judging_may_stop_early_the_headline_holds_at_any_look(tmp_path: Path) -> None:
    right = np.random.default_rng(1).binomial(15, 0.6, 200) / 15
    by_step = [[0.2, value] for value in right]
    for most, text in (
        (
            1000,
            "judging stopped early, at look 2 of at most 10, by evaluation.target_half_width=0.1",
        ),
        (200, "judging did not stop early: it ended at look 2 of at most 2"),
    ):
        stopping = Stopping(target_half_width=0.1, most_episodes=most)
        main = replace(arm(tmp_path, "model", by_step), stopping=stopping)
        summary, page = report(tmp_path, [main])
        found = any_look_interval(right)
        assert summary["accuracy"]["mean"] == pytest.approx(right.mean())
        assert summary["accuracy"]["ci95"] == found.half_width
        assert summary["accuracy"]["interval95"] == [found.low, found.high]
        assert summary["accuracy_by_step"][1]["ci95"] == found.half_width
        assert summary["stopping"]["text"] == text
        shown = f"{right.mean():.2%} {PLUS_MINUS} {found.half_width:.2%} accuracy on 200 test"
        assert summary["headline"].startswith(f"{shown} episodes; {text}")
        assert shown in page
        assert "evaluation.target\\_half\\_width=0.1" in page or most == 200
    fixed, page = report(tmp_path, [replace(main, stopping=None)])
    assert fixed["stopping"] is None
    assert fixed["accuracy"]["ci95"] < found.half_width
    assert "stop early" not in page


def test_arms_are_compared_on_the_same_episodes(tmp_path: Path) -> None:
    arms = two_arms(tmp_path)
    summary, page = report(tmp_path, arms)
    (found,) = summary["comparisons"]
    # 0.2 - 0.6, 0.2 - 0.8, 0.4 - 0.8, 0.2 - 1.0
    assert found["difference"]["mean"] == pytest.approx((-0.4 - 0.6 - 0.4 - 0.8) / 4)
    assert (found["wins"], found["ties"], found["losses"]) == (0, 0, 4)
    assert found["sign_p"] == pytest.approx(2 * 0.5**4)
    (row,) = tables(page)[3][2:]
    assert row[:2] == ["no-adaptation minus model", "4"]
    assert row[2].startswith("-55.00% (-81.")
    assert row[3:5] == ["unknown", "0 / 0 / 4"]  # all have the same classes
    assert found["new_classes"]["num_classes"] == 5


def test_other_episodes_are_not_compared(tmp_path: Path) -> None:
    other = arm(tmp_path, "other", [[0.2], [0.4]])
    rows = pa.array([[1] * 5] * 2, pa.list_(pa.int64(), 5))
    index = other.records.schema.get_field_index("support_rows")
    other = replace(other, records=other.records.set_column(index, "support_rows", rows))
    summary, page = report(tmp_path, [two_arms(tmp_path)[0], other])
    assert summary["comparisons"][0]["refusal"] in page
    assert "other and model: episode 0 has other support images" in page


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
    tmp_path: Path, means: Sequence[float], shown: str, known: bool
) -> None:
    arms = [arm(tmp_path, f"a-{seed}", [[0.2, mean]] * 2) for seed, mean in enumerate(means)]
    trainings = {"a": {seed: each.name for seed, each in enumerate(arms)}}
    content, page = report(tmp_path, arms, trainings=trainings)
    (row,) = (row for table in tables(page) for row in table if row[:2] == ["a", "3"])
    assert row[2] == shown
    assert row[3] == ("1.00%" if known else "0.00%")
    assert (content["trainings"]["a"]["accuracy"]["ci95"] is not None) == known
    assert ("came out alike" in page) != known


def test_verdicts_and_audits_are_told(tmp_path: Path) -> None:
    verdict = Verdict(
        claim="a > b", outcome="undecided at this size", scope="3 trainings", numbers="1", p=0.5
    )
    audit = AuditResult(
        name="x", title="A look", outcome="flagged", sentence="Seen.", rows=[{"a": 1, "b": 0.5}]
    )
    arms = two_arms(tmp_path)
    summary, page = report(tmp_path, arms, verdicts=[verdict], audits=[audit])
    assert summary["verdicts"][0]["outcome"] == "undecided at this size"
    assert tables(page)[0][2] == ["a \\> b", "**undecided at this size (3 trainings)**", "1"]
    assert ["1", "0.5"] in [row for table in tables(page) for row in table]
    assert "## Audit: A look\n\n**flagged**\n\nSeen." in page


def test_the_worst_episodes_are_drawn(tmp_path: Path, tiny_bank: ImageBank) -> None:
    records = [
        record(
            index,
            accuracy_by_step=(accuracy,),
            class_ids=(17, 18),
            support_rows=(140, 148),
            query_rows=(141, 149),
        )
        for index, accuracy in enumerate([0.5, 0.0, 1.0, 0.25])
    ]
    write_chunk(tmp_path / "a.parquet", records, {})
    table = read_records([tmp_path / "a.parquet"])
    result = ArmResult(name="m", description="", protocol=PROTOCOL, records=table, identity={})
    _, page = report(tmp_path, [result], bank=tiny_bank)
    found = re.findall(r"!\[([^\]]+)\]\((worst_\d.png)\)", page)
    assert found == [
        ("Episode 1, the worst: 0.0%", "worst_1.png"),
        ("Episode 3, the second worst: 25.0%", "worst_2.png"),
        ("Episode 0, the third worst: 50.0%", "worst_3.png"),
    ]
    assert all((tmp_path / "report" / name).is_file() for _, name in found)


def test_the_html_page_is_whole_and_escaped(tmp_path: Path) -> None:
    odd = '<script>alert("x")</script>'
    arms = [arm(tmp_path, odd, [[0.2, 0.4]] * 3, description=odd)]
    report(tmp_path, arms, title=odd, curve=CURVE)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == page.count("<img ") == 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_first_600_are_the_first_600(tmp_path: Path) -> None:
    main = arm(tmp_path, "model", [[0.5]] * 600 + [[1.0]] * 400)
    summary, page = report(tmp_path, [main, arm(tmp_path, "few", [[0.5]] * 100)])
    assert summary["accuracy"]["first_600"]["mean"] == 0.5
    assert summary["accuracy"]["mean"] == 0.7  # (300 + 400) / 1,000
    header, _, row, few = tables(page)[0]
    # what is not 50% has a share of at most 1 - 0.025^(1/600) = 0.613%, and may be 0% or 100%
    assert row[header.index("first 600")] == f"50.00% {PLUS_MINUS} 0.31%"
    assert few[header.index("first 600")] == "fewer"


def test_page_says_what_was_judged_and_how(tmp_path: Path) -> None:
    _, page = report(
        tmp_path,
        two_arms(tmp_path),
        identity={"checkpoint": "c0ffee", "seed": 7, "versions": {"torch": "2.14"}},
        curve=CURVE,
        title="Glyphs",
    )
    assert page.startswith("# Glyphs\n")
    assert f"`{PROTOCOL}`" in page
    results, _intervals, _spread, _compared, steps, cost, identity = tables(page)
    header, _, model, baseline = results
    assert model[header.index("accuracy")] == f"**80.00% {PLUS_MINUS} 59.93%**"
    # 1, 2, 3, 4: 3.182446 * sqrt(5/3) / 2 = 2.0543.
    assert model[header.index("loss")] == f"2.5000 {PLUS_MINUS} 2.0543"
    # 0.6 + 0.15 * 0.2 (position 0.15 of the sorted values), 0.8, and 0.8 + 0.85 * 0.2.
    shown = ["63.0%", "75.0%", "80.0%", "85.0%", "97.0%"]
    assert model[header.index("quantile 5%") : header.index("loss")] == shown
    assert baseline[0] == "no-adaptation"
    assert [row[0] for row in steps[2:]] == ["0", "1"]
    assert steps[3][2] == ""  # no-adaptation takes no step
    assert identity[2:] == [
        ["checkpoint", "`c0ffee`"],
        ["seed", "`7`"],
        ["versions", '`{"torch": "2.14"}`'],
        ["weights", "`model`"],
        ["no-adaptation: weights", "`no-adaptation`"],
        ["hardware", "`an abacus`"],
    ]
    assert cost[2] == ["model", "4", "0.5000", "2.0"]
    assert "not an interval for new classes" in page
    assert "depends on the number of queries" in page


def test_the_transductive_note_is_only_for_transductive_norms(tmp_path: Path) -> None:
    protocol = protocol_line(SPEC, ModelConfig(norm="context"), 1, EXAMINED)
    main = arm(tmp_path, "model", [[0.2, 0.6]] * 4, protocol=protocol)
    _, page = report(tmp_path, [main])
    assert "not an interval for new classes" in page
    assert "number of queries" not in page


def test_every_table_has_rows_of_one_length_whatever_the_names(tmp_path: Path) -> None:
    odd = "a|b `c`\n*d* <e> $\\no$ [f]\\"
    arms = [*two_arms(tmp_path), arm(tmp_path, odd, [[0.2, 0.4]] * 4, description=odd)]
    identity = {odd: odd, "nothing": None, "empty": "", "pipe": ["|"]}
    summary, page = report(tmp_path, arms, identity=identity, title=odd)
    assert summary["identity"] == {**identity, "weights": "model"}
    found = tables(page)
    assert len(found) == 7
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}


def test_every_picture_is_shown_and_drawn_on_white(tmp_path: Path) -> None:
    _, page = report(tmp_path, two_arms(tmp_path), curve=CURVE)
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert names == [
        "arms.png",
        "accuracy_distribution.png",
        "running_mean.png",
        "accuracy_by_step.png",
        "calibration.png",
        "learning_curve.png",
    ]
    for name in names:
        with Image.open(tmp_path / "report" / name) as image:
            assert image.size == (1152, 648)
            pixels = np.asarray(image.convert("RGB"))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert 0.4 < np.mean(pixels == 255) < 0.99
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {*names, "report.md", "report.html", "summary.json"}


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    arms = two_arms(tmp_path)
    first = write_report(tmp_path / "a", arms, identity={}, curve=CURVE)
    second = write_report(tmp_path / "b", arms, identity={}, curve=CURVE)
    files = sorted(path.name for path in first.parent.iterdir())
    assert len(files) == 9
    for name in files:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


@pytest.mark.parametrize("curve", [(), [{"step": 0, "val_accuracy": None}], [{"step": 0}]])
def test_without_history_there_is_no_learning_curve(tmp_path: Path, curve: Any) -> None:
    _, page = report(tmp_path, two_arms(tmp_path), curve=curve)
    assert "learning_curve" not in page
    assert not (tmp_path / "report" / "learning_curve.png").exists()


def test_one_episode_has_a_mean_and_an_interval_that_says_little(tmp_path: Path) -> None:
    summary, page = report(tmp_path, [arm(tmp_path, "model", [[0.8]])], curve=CURVE[:1])
    assert summary["accuracy"]["mean"] == 0.8
    # what other episodes give has a share of up to 97.5%, and may be 0% or 100%
    assert summary["accuracy"]["ci95"] == pytest.approx(0.975 * 0.8)
    assert summary["accuracy"]["interval95"] == pytest.approx([0.02, 0.02 + 0.975])
    assert summary["accuracy"]["std"] is None
    assert tables(page)[0][2][2] == f"**80.00% {PLUS_MINUS} 78.00%**"


@pytest.mark.fault("NaN: evaluation")
def test_losses_that_are_not_finite_are_counted_not_averaged(tmp_path: Path) -> None:
    losses = [1.0, math.nan, math.inf, 1.0]
    main = arm(tmp_path, "model", [[0.2], [0.4], [0.2], [0.4]], losses)
    summary, page = report(tmp_path, [main])
    assert summary["loss"]["mean"] is None
    assert set(summary["loss"]["quantiles"].values()) == {None}
    assert summary["loss"]["num_nonfinite"] == 2
    assert summary["accuracy"]["num_nonfinite"] == 0
    assert tables(page)[0][2][-1] == "not finite in 2 episodes"


def test_arms_need_names_of_their_own(tmp_path: Path) -> None:
    main = arm(tmp_path, "model", [[0.8]])
    for arms in ([], [main, main]):
        with pytest.raises(ValueError, match="different names"):
            write_report(tmp_path / "report", arms, identity={})
    assert not (tmp_path / "report").exists()


def test_plain_leaves_only_what_json_knows() -> None:
    value = {
        1: (np.float64(0.5), np.int64(2), np.bool_(True)),
        "not finite": [math.nan, -math.inf, np.float32("nan")],
        "array": np.array([[1.0, math.inf]]),
        "path": Path("runs") / "a",
        "none": None,
    }
    expected = {
        "1": [0.5, 2, True],
        "not finite": [None, None, None],
        "array": [[1.0, None]],
        "path": str(Path("runs/a")),
        "none": None,
    }
    assert json_ready(value) == expected
    assert json.loads(json.dumps(json_ready(value), allow_nan=False)) == expected


@pytest.mark.parametrize("num_images", [1, 3, 5, 75, 100, 375, 2000])
def test_bars_hold_every_episode_and_equally_many_values(num_images: int) -> None:
    counts = np.arange(num_images // 3, num_images + 1)
    accuracy = np.repeat(counts, 2) / num_images
    edges = bar_edges(accuracy)
    held = np.histogram(accuracy, edges)[0]
    assert held.sum() == len(accuracy)
    assert len(held) <= 81
    # Every possible value is there twice: a comb would show as bars of different height. Only
    # the lowest bar may reach below the data.
    assert set(held[1:]) <= {held[-1]}
    assert held[0] <= held[-1]


@pytest.mark.parametrize("accuracy", [0.0, 0.2, 1.0])
def test_bars_of_one_value(accuracy: float) -> None:
    edges = bar_edges(np.full(5, accuracy))
    assert len(edges) == 2
    assert edges[0] < accuracy < edges[1]


def test_labels_are_spread_by_moving_them_as_little_as_possible() -> None:
    assert spread_labels([0.2, 0.9], 0.1, 0, 1) == pytest.approx([0.2, 0.9])
    # Two at one height part evenly; the third is far enough off.
    assert spread_labels([0.5, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.45, 0.55, 0.9])
    # In the order given, and inside: 1.0 and 0.98 become 1.0 and 0.9.
    assert spread_labels([1.0, 0.98], 0.1, 0, 1) == pytest.approx([1.0, 0.9])
    assert spread_labels([0.0, 0.01], 0.1, 0, 1) == pytest.approx([0.0, 0.1])


def test_ticks_are_round_and_inside() -> None:
    assert round_ticks(0.527, 1.0) == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    assert round_ticks(0, 1, integer=True) == [0, 1]
    assert round_ticks(0, 5, integer=True) == [0, 1, 2, 3, 4, 5]
    assert round_ticks(0, 0, integer=True) == [0]  # arms without inner steps
