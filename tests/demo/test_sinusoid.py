"""`raymaml demo sinusoid`: the task by arithmetic, learning, the figure, wrong options."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from raymaml.cli import demo as cli
from raymaml.cli import main
from raymaml.demo import sinusoid
from raymaml.demo.sinusoid import Demo, Task, Waves, build, judge, train

OUT = Path("unused.png")


def test_a_wave_is_its_formula() -> None:
    """2 sin(0.5 x - pi / 2) is -2 at 0, 0 at pi, 2 at 2 pi."""
    wave = Waves(*(torch.tensor([[[value]]]) for value in (2.0, 0.5, math.pi / 2)))
    x = torch.tensor([[[0.0], [math.pi], [2 * math.pi]]])
    torch.testing.assert_close(wave(x), torch.tensor([[[-2.0], [0.0], [2.0]]]))
    (episode,) = wave.episodes(x[:, :1], x[:, 1:])
    assert episode.support_y.flatten().tolist() == [-2.0]
    torch.testing.assert_close(episode.query_y, torch.tensor([[0.0], [2.0]]))


@pytest.mark.parametrize(("name", "low", "high"), [("finn", 1.0, 1.0), ("li", 0.8, 1.2)])
def test_waves_and_points_fill_the_ranges_of_the_papers(name: str, low: float, high: float) -> None:
    """Of 4,000 uniform numbers in [a, b] the mean is within 5 standard errors, which are
    (b - a) / sqrt(12 * 4000), of the middle; the ends are nearer than (b - a) / 100."""
    task = Task(Demo(out=OUT, waves=name), 0)
    waves = task.waves(4000)
    found = [waves.amplitude, waves.frequency, waves.phase, task.points(4000, 1)]
    ranges = [(0.1, 5.0), (low, high), (0.0, math.pi), (-5.0, 5.0)]
    for values, (a, b) in zip(found, ranges, strict=True):
        assert values.shape == (4000, 1, 1)
        assert a - 1e-6 <= values.min() <= a + (b - a) / 100
        assert b - (b - a) / 100 - 1e-6 <= values.max() <= b + 1e-6
        assert abs(values.mean() - (a + b) / 2) <= 5 * (b - a) / math.sqrt(12 * 4000) + 1e-6


def test_an_episode_has_the_points_of_one_wave() -> None:
    batch = Task(Demo(out=OUT, shots=3), 0).episodes(2, 7)
    assert [batch.support_x.shape, batch.query_y.shape] == [(2, 3, 1), (2, 7, 1)]
    for episode in batch:  # y = a sin x - b cos x: two numbers fit all ten points
        x, y = (
            torch.cat(both)
            for both in ((episode.support_x, episode.query_x), (episode.support_y, episode.query_y))
        )
        basis = torch.cat((x.sin(), x.cos()), 1)
        fitted = basis @ torch.linalg.lstsq(basis, y).solution
        torch.testing.assert_close(fitted, y, rtol=0, atol=1e-4)


def test_the_command_line_has_the_choices_of_the_program() -> None:
    assert (*sinusoid.members(Demo(out=OUT)),) == cli.MEMBERS
    assert (*sinusoid.FREQUENCIES,) == cli.WAVES


@pytest.mark.parametrize("member", cli.MEMBERS)
def test_every_member_learns_what_no_fixed_curve_can(member: str) -> None:
    """A curve that does not adapt is at best the mean wave, -E[A] 2/pi cos x.

    Its error is E[A^2] / 2 - (E[A] 2/pi)^2 E[cos^2 x] = (5^3 - 0.1^3) / (3 * 4.9) / 2
    - (2.55 * 0.6366)^2 * (1/2 + sin(10) / 20) = 4.252 - 2.635 * 0.4728 = 3.006.
    """
    demo = Demo(out=OUT, member=member, inner_steps=2, steps=150)
    learner = build(demo)
    untrained = judge(learner, demo, 200).mean(1)
    lines: list[str] = []
    train(learner, demo, lines.append)
    unadapted, _, adapted = judge(learner, demo, 200).mean(1)
    assert len(lines) == 6
    assert untrained.min() > 3.7
    assert unadapted == pytest.approx(3.006, abs=0.15)  # 200 waves; all members have the same
    assert adapted < 2.5


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_are_hidden_layers_of_40_numbers(layers: int) -> None:
    """1 * 40 + 40 into the first, 40 * 40 + 40 into each other, 40 + 1 out of the last."""
    learner = build(Demo(out=OUT, layers=layers))
    assert sum(p.numel() for p in learner.model.parameters()) == 80 + (layers - 1) * 1640 + 41
    assert learner.head.name == str(2 * layers)


@pytest.mark.parametrize("member", cli.MEMBERS)
def test_the_command(member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinusoid, "TEST_WAVES", 20)
    out = tmp_path / "new" / "waves.png"
    options = ["--shots", "10", "--inner-steps", "2", "--steps", "3", "--waves", "li"]
    options += ["--member", member]
    done = CliRunner().invoke(main, ["demo", "sinusoid", *options, "--out", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    lines = done.output.splitlines()
    assert lines[-1] == str(out)
    assert sum(" +- " in line for line in lines) == 3
    with Image.open(out) as image:
        assert image.format == "PNG"
        image.load()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--member", "mamlpp"], "'mamlpp' is not one of 'maml', 'maml++', 'meta-sgd', 'alfa'"),
        (["--layers", "0"], "0 is not in the range x>=1"),
        (["--shots", "0"], "0 is not in the range x>=1"),
        (["--lr", "0"], "0.0 is not in the range x>0"),
        (["--out", "."], "File '.' is a directory"),
        (["--out", "file/waves.png"], "--out: file cannot be made a folder (File exists)"),
    ],
)
def test_user_errors(
    options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    done = CliRunner().invoke(main, ["demo", "sinusoid", *options])
    assert done.exit_code == 2
    assert says in done.output
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sinusoid, "train", interrupted)
    out = tmp_path / "waves.png"
    done = CliRunner().invoke(main, ["demo", "sinusoid", "--out", str(out)])
    assert done.exit_code == 130
    assert done.output == "raymaml: interrupted; no figure is written\n"
    assert not out.exists()


def test_the_page_quotes_what_commands_wrote() -> None:
    room = Path(sinusoid.__file__).parent
    page, wrote = ((room / name).read_text("utf-8") for name in ("README.md", "measured.txt"))
    measured = page.split("## Measured")[1].split("published")[0]
    quoted = re.findall(r"\d\.\d{3} \+- \d\.\d{3}", measured)
    assert len(quoted) >= 3
    assert set(quoted) <= set(re.findall(r"\d\.\d{3} \+- \d\.\d{3}", wrote))
