"""``raymaml scale``: measure here, predict, check by real runs, and look ahead to GPUs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raymaml.bench.cases import standard_on_gpus
from raymaml.bench.report import machine
from raymaml.bench.scaling import report
from raymaml.bench.scaling.check import Checked, Train, check, checkable
from raymaml.bench.scaling.counts import Counts, count
from raymaml.bench.scaling.fit import fit_start
from raymaml.bench.scaling.gpus import Assumptions, Outlook, outlook
from raymaml.bench.scaling.measure import Measured, job, measure
from raymaml.bench.scaling.model import Start, Step, System, predict
from raymaml.bench.scaling.probes import step_calls
from raymaml.common.errors import UserError
from raymaml.common.untrusted import json_text
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.storage.files import write_text
from raymaml.storage.place import Place

Echo = Callable[[str], None]
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (8, 64, 512)
PER_GPU = (1, 4)
FIXED = 64
BACKGROUND = 0.2
"""Cores that Ray's own processes take while workers train (README, Measured)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command is asked for."""

    workers: tuple[int, ...]
    """Of this machine."""
    assumptions: Assumptions
    seconds: float | None
    """Of a lone worker's real run; None: no real runs."""


@dataclass
class Findings:
    """All figures."""

    measured: dict[str, Any] = field(default_factory=dict)
    here: dict[str, list[Step]] = field(default_factory=dict)
    runs: list[Checked] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)
    outlooks: list[Outlook] = field(default_factory=list)


def scale(
    config_path: Place | None,
    overrides: Sequence[str],
    plan: Plan,
    *,
    train: Train,
    json_path: Path | None,
    plot_path: Path | None,
    echo: Echo,
) -> None:
    """Measure, predict and say so; JSON and picture are written at the end.

    Args:
        config_path: what is trained; None: glyphs here, and standard configs on GPUs.
        overrides: of the config.
        plan: what is asked for.
        train: makes the real runs.
        json_path: for all figures.
        plot_path: for efficiency against the number of GPUs.
        echo: where the tables go.

    Raises:
        UserError: the config has mistakes, or what it needs is missing.
    """
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="raymaml-") as name:
        folder = Path(name)
        if config_path is None:
            here, ahead = checkable(folder), standard_on_gpus()
        else:
            here = ahead = [load_config(config_path, overrides)]
        echo("measuring this machine: episodes, collectives, checkpoints")
        here = [_on_cpu(config) for config in here]
        machine_ = measure(here, workers=max(plan.workers), episodes=8)
        _here(here, machine_, plan, folder=folder, train=train, findings=found, echo=echo)
    start = Start()
    if found.runs:
        start = fit_start([r.workers for r in found.runs], [r.start_seconds for r in found.runs])
        echo(f"start of a run with Ray: {start.seconds:.1f} s + {start.per_worker:.1f} s a worker")
    _ahead(ahead, machine_, plan.assumptions, found, echo)
    if json_path is not None:
        content = {"machine": machine(), "assumptions": asdict(plan.assumptions), "start": start}
        write_json(json_path, content | vars(found))
        echo(str(json_path))
    if plot_path is not None:
        report.draw(plot_path, found.outlooks)
        echo(str(plot_path))


def _on_cpu(config: Config) -> Config:
    cluster = config.cluster.model_copy(update={"device": "cpu"})
    return config.model_copy(update={"cluster": cluster})


def _here(
    configs: Sequence[Config],
    found: Measured,
    plan: Plan,
    *,
    folder: Path,
    train: Train,
    findings: Findings,
    echo: Echo,
) -> None:
    """Predict for this machine, and run what was predicted if that is asked for."""
    names = [config.name for config in configs]
    for line in report.measured_lines(names, found):
        echo(line)
    findings.measured = asdict(found)
    for config, costs in zip(configs, found.costs, strict=True):
        # episodes/s of the metrics are those of outer steps alone
        system = found.system(costs, BACKGROUND)
        what = job(config, num_params=costs.num_params, outcome_width=costs.outcome_width)
        steps = [predict(system, what, workers) for workers in plan.workers]
        findings.here[config.name] = steps
        runs: list[Checked] = []
        if plan.seconds is not None:
            echo(f"{config.name}: training with {_words(plan.workers)} workers")
            lone = predict(system, what, 1)
            runs = check(config, steps, folder, lone=lone, seconds=plan.seconds, train=train)
            findings.runs += runs
        echo("")
        for line in report.workers_lines(config.name, steps, runs):
            echo(line)


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _ahead(
    configs: Sequence[Config],
    found: Measured,
    assumptions: Assumptions,
    findings: Findings,
    echo: Echo,
) -> None:
    """Predict for GPUs."""
    echo("\nGPUs are assumed, none was measured (--assume NAME=NUMBER):")
    echo("  " + ", ".join(f"{name}={value:g}" for name, value in asdict(assumptions).items()))
    for config in configs:
        counts = count(config)
        system: System = assumptions.system(counts, step_calls(config), found.storage)
        what = job(config, num_params=counts.num_params, outcome_width=counts.outcome_width)
        outlooks = outlook(config.name, system, what, gpus=GPUS, per_gpu=PER_GPU, fixed=FIXED)
        findings.counts[config.name] = counts
        findings.outlooks += outlooks
        shown = [each for each in outlooks if each.step.workers in SHOWN]
        echo(f"\n{report.counts_line(config.name, counts, system)}")
        for line in (*report.outlook_lines(shown), "", *report.reduction_lines(shown)):
            echo(line)
    echo("")
    for line in report.waiting_lines(assumptions.spread, SHOWN):
        echo(line)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all figures; of predictions also what is derived from their parts."""
    write_text(path, json_text(_plain(content), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Step):
        derived = ("seconds", "episodes_per_second", "bottleneck", "largest_loss")
        return asdict(value) | {name: getattr(value, name) for name in derived}
    if isinstance(value, Checked):
        return asdict(value) | {"ratio": value.ratio}
    if isinstance(value, Outlook):
        return {"config": value.config, "scaling": value.scaling, **_plain(value.step)}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def plan(workers: str, assumptions: Assumptions, *, real_runs: bool, seconds: float) -> Plan:
    """Read the options of the command; ``workers`` is separated by commas.

    Raises:
        UserError: a number is none.
    """
    texts = workers.split(",")
    wrong = [text for text in texts if not re.fullmatch(r"0*[1-9][0-9]{0,2}", text, re.ASCII)]
    if wrong:
        raise UserError(
            *[
                f"--workers: {text!r} is no number of workers below 1,000; give 1,2,3,4"
                for text in wrong
            ]
        )
    numbers = tuple(sorted(set(map(int, texts))))
    return Plan(workers=numbers, assumptions=assumptions, seconds=seconds if real_runs else None)
