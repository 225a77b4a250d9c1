"""Regression of sine waves, from the task to the figure, on the public names of raymaml.

An episode is one wave: K points to adapt to, and other points of the same wave to judge by. Task,
network and loss are those of Finn et al. 2017, section 5.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import raymaml
from raymaml.statistics.intervals import mean_interval
from raymaml.storage.files import make_folder, replacing

FREQUENCIES = {"finn": (1.0, 1.0), "li": (0.8, 1.2)}
"""Ranges of the frequency: Finn et al. 2017; Li et al. 2017 (Meta-SGD), as PARL's code has it."""
PUBLISHED = """\
published, 5 shots, waves as --waves li:
  1.13 +- 0.18  MAML, 1 step, and
  0.90 +- 0.16  Meta-SGD, 1 step: Li et al. 2017, arXiv 1707.09835, section 4.1
  0.93 +- 0.02  MAML, and
  0.34 +- 0.01  MAML++, 3 steps, network 1-40-40-40-1: PaddlePaddle/PARL, benchmark/torch/maml++"""
WIDTH = 40
"""Numbers in each hidden layer."""
META_BATCH, QUERIES = 25, 50
"""Waves in an outer step, and their points that the outer loss is of."""
MAX_NORM = 10.0
"""The meta-gradient is scaled down to this norm: a step that is too long leads far off."""
TEST_WAVES, TEST_QUERIES, TEST_SEED = 10_000, 100, 2**62
DRAWN_STEPS, DRAWN_WAVES = (0, 1, 5, 10), 3
_INK = "#24292f"
_COLORS = ("#8c959f", "#bc4c00", "#8250df", "#1f6feb")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The options of `raymaml demo sinusoid`."""

    out: Path
    member: str = "maml"
    waves: str = "finn"
    shots: int = 5
    inner_steps: int = 1
    layers: int = 2
    """Hidden layers."""
    steps: int = 6_000
    """Outer steps."""
    lr: float = 5e-3
    """Highest rate of the outer Adam; it falls to 0 along a half cosine..."""
    rule_lr: float = 1e-3
    """...and so does that of learned rates."""
    seed: int = 0


@dataclass(frozen=True)
class Waves:
    """Sine waves ``amplitude * sin(frequency * x - phase)``; each number is ``[E, 1, 1]``."""

    amplitude: Tensor
    frequency: Tensor
    phase: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the heights at ``x``, both ``[E, n, 1]``."""
        return self.amplitude * torch.sin(self.frequency * x - self.phase)

    def episodes(self, support_x: Tensor, query_x: Tensor) -> raymaml.EpisodeBatch:
        """Return an episode a wave, of its points at the places given, ``[E, n, 1]``."""
        support_y, query_y = self(support_x), self(query_x)
        return raymaml.EpisodeBatch(
            support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y
        )


class Task:
    """Draws waves, and points on them, by one stream of random numbers."""

    def __init__(self, demo: Demo, seed: int) -> None:
        self.frequencies, self.shots = FREQUENCIES[demo.waves], demo.shots
        self.random = torch.Generator().manual_seed(seed)

    def waves(self, count: int) -> Waves:
        """Draw waves with amplitudes of 0.1 to 5 and phases of 0 to pi."""
        ranges = ((0.1, 5.0), self.frequencies, (0.0, math.pi))
        return Waves(*(self._uniform(low, high, count, 1) for low, high in ranges))

    def points(self, count: int, each: int) -> Tensor:
        """Draw ``each`` places from -5 to 5 for ``count`` waves: ``[E, each, 1]``."""
        return self._uniform(-5.0, 5.0, count, each)

    def episodes(self, count: int, queries: int) -> raymaml.EpisodeBatch:
        """Draw waves, K points on each to adapt to, and others to judge by."""
        waves = self.waves(count)
        return waves.episodes(self.points(count, self.shots), self.points(count, queries))

    def _uniform(self, low: float, high: float, count: int, each: int) -> Tensor:
        return low + (high - low) * torch.rand(count, each, 1, generator=self.random)


def members(demo: Demo) -> dict[str, dict[str, Any]]:
    """Return each member of the family as settings of ``InnerConfig``."""
    early = max(1, demo.steps // 5)
    per_weight = {"rates": "per_parameter", "lr_range": (0.005, 0.1)}
    annealed = {"num_outer_steps": early, "num_stages": min(early, 10)}
    return {
        "maml": {"lr": 0.01},
        "maml++": {"lr": 0.01, "rates": "per_tensor_per_step", "multi_step_loss": annealed},
        "meta-sgd": per_weight,
        "alfa": {"rule": "alfa", **per_weight},
    }


def build(demo: Demo) -> raymaml.MetaLearner:
    """Return the network 1-40-..-40-1, and how it adapts."""
    torch.manual_seed(demo.seed)
    widths = (1, *[WIDTH] * demo.layers)
    hidden = [(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(widths)]
    model = nn.Sequential(*itertools.chain(*hidden), nn.Linear(WIDTH, 1))
    inner = raymaml.InnerConfig(
        num_steps=demo.inner_steps, gradient="unrolled", **members(demo)[demo.member]
    )
    head = str(len(model) - 1)
    return raymaml.MetaLearner(model, inner, head=head, loss_fn=F.mse_loss, seed=demo.seed)


def train(learner: raymaml.MetaLearner, demo: Demo, echo: Callable[[str], None]) -> None:
    """Take the outer steps: Adam on the mean squared error of the queries after adaptation."""
    task = Task(demo, demo.seed)
    weights, rates = (list(each.parameters()) for each in (learner.model, learner.rule))
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": rates, "lr": demo.rule_lr}]
    optimizer = torch.optim.Adam(groups, lr=demo.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, demo.steps)
    recent, every = 0.0, max(1, demo.steps // 6)
    for step in range(demo.steps):
        optimizer.zero_grad()
        batch = task.episodes(META_BATCH, QUERIES)
        recent += learner.backward(batch, step, at_once=META_BATCH).item() / every
        nn.utils.clip_grad_norm_(learner.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            echo(f"outer step {step + 1:>6,}: error of {every:,} meta-batches {recent:.3f}")
            recent = 0.0


def judge(learner: raymaml.MetaLearner, demo: Demo, count: int) -> NDArray[np.float64]:
    """Return the mean squared error of ``count`` new waves after 0..T inner steps: ``[T+1, E]``."""
    test = Task(demo, TEST_SEED)  # the same waves for each member and seed
    found = []
    for each in test.episodes(count, TEST_QUERIES):
        outputs = learner.logits_by_step(each)  # [T+1, Q, 1]
        found.append((outputs - each.query_y).double().square().mean((1, 2)))
    return torch.stack(found, 1).numpy()


def draw(learner: raymaml.MetaLearner, demo: Demo) -> None:
    """Draw new waves, their points, and the curve before and after 1, 5 and 10 steps, as PNG.

    Rates that are learned are those of the T steps of training, and further ones may lead far off.
    """
    fixed = learner.inner.rates == "fixed"
    drawn = DRAWN_STEPS if fixed else tuple(sorted({0, 1, demo.inner_steps}))
    learner.test_inner = learner.inner.model_copy(update={"num_steps": drawn[-1]})
    task = Task(demo, TEST_SEED)
    waves, points = task.waves(DRAWN_WAVES), task.points(DRAWN_WAVES, demo.shots)
    x = torch.linspace(-5, 5, 201)
    episodes = waves.episodes(points, x.expand(DRAWN_WAVES, -1)[..., None])
    figure = Figure(figsize=(4 * DRAWN_WAVES, 3.6), dpi=80, layout="constrained")
    all_axes = figure.subplots(1, DRAWN_WAVES, sharey=True)
    for axes, episode in zip(all_axes, episodes, strict=True):
        axes.plot(x, episode.query_y, color=_INK, linewidth=2.5, alpha=0.35, label="true wave")
        curves = learner.logits_by_step(episode)  # [T+1, Q, 1]
        for step, color in zip(drawn, _COLORS, strict=False):
            axes.plot(x, curves[step], color=color, label=_after(step))
        axes.plot(episode.support_x, episode.support_y, "^", color=_INK, label="points")
        axes.set_ylim(-6, 6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    with replacing(demo.out) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _after(steps: int) -> str:
    return f"after {steps} step{'' if steps == 1 else 's'}" if steps else "before"


def run(demo: Demo, echo: Callable[[str], None]) -> None:
    """Train, judge on new waves, print the errors beside published ones, and draw the figure.

    Raises:
        UserError: the folder of the figure cannot be made.
    """
    make_folder(demo.out.parent, "--out")
    torch.set_num_threads(1)  # more are slower on numbers this few
    learner = build(demo)
    train(learner, demo, echo)
    echo(f"mean squared error of {TEST_WAVES:,} new waves, with its 95% interval:")
    for step, values in enumerate(judge(learner, demo, TEST_WAVES)):
        found = mean_interval(values)
        echo(f"  {found.mean:.3f} +- {found.half_width:.3f}  {_after(step)}")
    if demo.shots == 5:
        echo(PUBLISHED)
    draw(learner, demo)
    echo(str(demo.out))
