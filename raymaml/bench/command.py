"""The command: from configurations to a table, a JSON file and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raymaml.bench.cases import configs_to_measure
from raymaml.bench.contenders import EXACT_METHODS, OTHERS
from raymaml.bench.contest import Echo
from raymaml.bench.measure import Effort, measure
from raymaml.bench.report import draw, table, write_json
from raymaml.bench.rows import Row
from raymaml.common.errors import UserError
from raymaml.storage.place import Place


def bench(
    config_path: Place | None,
    overrides: Sequence[str],
    effort: Effort,
    *,
    json_path: Path | None,
    plot_path: Path,
    echo: Echo,
) -> list[Row]:
    """Measure one configuration, or the standard ones; files are written after each.

    Raises:
        UserError: a configuration has mistakes, or contenders disagree.
    """
    rows: list[Row] = []
    for config in configs_to_measure(config_path, overrides):
        measured = measure(config, effort, echo)
        rows += measured
        echo(f"\n{table(measured)}\n")
        if json_path is not None:
            write_json(json_path, rows)
        if effort.steps:
            draw(plot_path, rows)
    if json_path is not None:
        echo(str(json_path))
    if effort.steps:
        echo(str(plot_path))
    return rows


def effort(names: str | None, steps: str, repeats: int, episodes: int) -> Effort:
    """Read the options of the command; ``names`` and ``steps`` are separated by commas.

    Raises:
        UserError: a name is unknown, or a number is none.
    """
    known = (*EXACT_METHODS, *OTHERS)
    chosen = known if names is None else tuple(dict.fromkeys(names.split(",")))
    problems = [
        f"--methods: {name!r} is unknown; give some of {','.join(known)}"
        for name in chosen
        if name not in known
    ]
    texts = steps.split(",") if steps else []
    problems += [
        f"--steps: {text!r} is no number of inner steps; give numbers below 100,000, such as 1,5,10"
        for text in texts
        if not (text.isascii() and text.isdigit() and len(text) <= 5)
    ]
    if problems:
        raise UserError(*problems)
    numbers = tuple(map(int, texts))
    return Effort(names=chosen, repeats=repeats, episodes=episodes, steps=numbers)
