"""The model's figures as text and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, ScalarFormatter

from raymaml.bench.scaling.check import Checked
from raymaml.bench.scaling.counts import Counts
from raymaml.bench.scaling.fit import Timing
from raymaml.bench.scaling.gpus import Outlook
from raymaml.bench.scaling.measure import Measured
from raymaml.bench.scaling.model import Step, System
from raymaml.bench.scaling.network import REDUCTIONS
from raymaml.bench.scaling.waiting import Hiccups, expected_slowest, simulate
from raymaml.storage.files import replacing

_COLORS = ("#bc4c00", "#1f6feb", "#8250df", "#57606a")
_INK, _GRID = "#24292f", "#e4e7eb"


def measured_lines(names: Sequence[str], found: Measured) -> Iterator[str]:
    """Say what this machine was found to do."""
    yield f"This machine, {found.cores} cores:"
    for name, costs in zip(names, found.costs, strict=True):
        yield (
            f"  {name}: P {costs.num_params:,}; an episode {_time(costs.episode_seconds)},"
            f" {costs.crowding:.2f} times as long with all cores busy, spread"
            f" {100 * costs.spread:.0f}%; a step beside its episodes {_time(costs.step_seconds)}"
        )
    link, storage = found.link, found.storage
    yield (
        f"  gloo between processes: {_time(link.latency)} a message, {_bytes(link.bandwidth)}/s;"
        f" adding gradients up {_bytes(found.add_rate)}/s; a checkpoint"
        f" {_time(storage.latency)} and {_bytes(storage.rate)}/s"
    )
    yield f"  the fit by the {len(found.timings)} timings of collectives: {fit_quality(found)}"


def fit_quality(found: Measured) -> str:
    """Say within what the fitted link gives back what was timed."""
    ratios = sorted(fitted_seconds(found, each) / each.seconds for each in found.timings)
    tenth = len(ratios) // 10
    return (
        f"median ratio {ratios[len(ratios) // 2]:.2f},"
        f" 80% within {ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f}"
    )


def fitted_seconds(found: Measured, timing: Timing) -> float:
    """Return what the fitted link says of a collective."""
    network = found.system(found.costs[0], 0.0).network
    seconds = network.seconds(timing.collective, timing.workers, timing.size)
    return seconds * max(1.0, timing.workers / found.cores)


def workers_lines(name: str, steps: Sequence[Step], runs: Sequence[Checked]) -> Iterator[str]:
    """Lay out predictions for this machine, beside real runs where there are any."""
    by_workers = {run.workers: run for run in runs}
    yield f"{name}, {steps[0].meta_batch} episodes an outer step, workers on this machine:"
    yield (
        f"  {'workers':>7}{'episodes/s':>12}{'efficiency':>12}{'sent':>10}"
        f"{'measured':>10}{'ratio':>7}  after the episodes, most goes into"
    )
    for step in steps:
        run = by_workers.get(step.workers)
        real = f"{run.measured:>10.3g}{run.ratio:>7.2f}" if run else f"{'-':>10}{'-':>7}"
        yield (
            f"  {step.workers:>7}{step.episodes_per_second:>12.3g}{step.efficiency:>12.0%}"
            f"{_bytes(step.sent):>10}{real}  {step.largest_loss}"
        )


def counts_line(name: str, counts: Counts, system: System) -> str:
    """Say what one episode is, and how long it takes a GPU of the assumptions."""
    machine = system.machine
    return (
        f"{name} on GPUs: P {counts.num_params:,}, {counts.flops / 1e9:,.1f} GFLOP and"
        f" {counts.calls:,} operators an episode ({counts.method}):"
        f" {_time(machine.episode_seconds)}, bound by {machine.bound}"
    )


def outlook_lines(outlooks: Sequence[Outlook]) -> Iterator[str]:
    """Lay out predictions for GPUs with raymaml's own reduction."""
    yield (
        f"  {'GPUs':>6}{'episodes':>12}{'a step':>10}{'episodes/s':>12}{'efficiency':>12}"
        f"  {'bottleneck':<24}largest loss"
    )
    for each in outlooks:
        step = each.step
        if step.reduction == "slices":
            yield (
                f"  {step.workers:>6}{each.scaling:>12}{_time(step.seconds):>10}"
                f"{step.episodes_per_second:>12,.4g}{step.efficiency:>12.0%}"
                f"  {step.bottleneck:<24}{step.largest_loss}"
            )


def reduction_lines(outlooks: Sequence[Outlook]) -> Iterator[str]:
    """Compare the reductions: what a worker sends and holds, and what time they take."""
    yield (
        f"  {'reduction':<14}{'GPUs':>6}{'episodes':>12}{'sent':>10}{'memory':>10}"
        f"{'exchange':>10}{'adding':>10}{'efficiency':>12}"
    )
    for each in outlooks:
        step = each.step
        if each.scaling.endswith("a GPU"):
            yield (
                f"  {step.reduction:<14}{step.workers:>6}{each.scaling:>12}{_bytes(step.sent):>10}"
                f"{_bytes(step.memory):>10}{_time(step.parts['exchange']):>10}"
                f"{_time(step.parts['adding']):>10}{step.efficiency:>12.1%}"
            )


def waiting_lines(spread: float, gpus: Sequence[int], steps: int = 2000) -> Iterator[str]:
    """Say how long the slowest of the workers takes, in episodes of the mean, one episode each."""
    yield (
        f"Waiting for the slowest, an episode a worker, spread {spread:.0%}: analysis, simulation,"
        " and with 1% of the episodes 3 times as long"
    )
    for workers in gpus:
        seconds = [
            simulate(
                shares=[1] * workers,
                episode_seconds=1.0,
                spread=spread,
                together=0.0,
                hiccups=hiccups,
                steps=steps,
            ).step_seconds
            for hiccups in (None, Hiccups(chance=0.01, factor=3.0))
        ]
        yield (
            f"  {workers:>6} workers: {expected_slowest(workers, 1, spread):.3f}"
            f"  {seconds[0]:.3f}  {seconds[1]:.3f}"
        )


def draw(path: Path, outlooks: Sequence[Outlook]) -> None:
    """Draw efficiency against the number of GPUs, a column a config, as PNG."""
    configs = list(dict.fromkeys(each.config for each in outlooks))
    figure = Figure(
        figsize=(1 + 4.4 * len(configs), 4), dpi=130, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    columns = figure.subplots(1, len(configs), squeeze=False, sharey=True)[0]
    scalings = [s for s in dict.fromkeys(e.scaling for e in outlooks) if s.endswith("a GPU")]
    for axes, config in zip(columns, configs, strict=True):
        for color, reduction in zip(_COLORS, REDUCTIONS, strict=True):
            for scaling, style in zip(scalings, ("-", "--", ":"), strict=False):
                points = [
                    (each.step.workers, each.step.efficiency)
                    for each in outlooks
                    if (each.config, each.step.reduction) == (config, reduction)
                    and each.scaling == scaling
                ]
                label = f"{reduction}, {scaling}"
                axes.plot(*zip(*points, strict=True), style, color=color, label=label)
        axes.set_title(config, loc="left", fontsize=10, fontweight="bold", color=_INK)
        axes.set_xscale("log", base=2)
        gpus = sorted({each.step.workers for each in outlooks})
        axes.xaxis.set_major_locator(FixedLocator(gpus))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("GPUs", color=_INK)
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
        axes.grid(axis="y", color=_GRID)
    columns[0].set_ylabel("efficiency (predicted)", color=_INK)
    columns[0].legend(frameon=False, fontsize=7, loc="lower left")
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _time(seconds: float) -> str:
    if seconds == 0:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _bytes(count: float) -> str:
    if count == 0 or math.isinf(count):
        return "0" if count == 0 else "inf"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
