"""``raymaml doctor``: all checks, one after the other, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raymaml.common.errors import UserError
from raymaml.common.logs import plain
from raymaml.common.untrusted import json_text
from raymaml.config.schema import ClusterConfig, Config
from raymaml.doctor.data import config_findings, device_findings
from raymaml.doctor.finding import Finding, user_error
from raymaml.doctor.machine import machine_findings
from raymaml.doctor.rehearsal import rehearsal_folder, rehearse
from raymaml.doctor.software import software_findings
from raymaml.evaluation.campaign import judge_locally
from raymaml.storage.place import Place
from raymaml.training.worker import train_locally

Elsewhere = Callable[[ClusterConfig, Config | None, Place], Iterator[Finding]]
"""Checks a cluster: what a config says of it, the config if there is one, a folder to write in."""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def examine(config: Config | None, elsewhere: Elsewhere | None) -> Iterator[Finding]:
    """Check this machine, what ``config`` names, and the cluster, or a run without Ray if None."""
    yield from software_findings()
    yield from machine_findings()
    cluster = ClusterConfig() if config is None else config.cluster
    if config is not None:
        yield from config_findings(config)
        if elsewhere is None:
            yield from device_findings(config)
    try:
        with rehearsal_folder(None if config is None else config.run_dir) as folder:
            if elsewhere is None:
                yield from rehearse(folder, cluster, train_locally, judge_locally)
            else:
                yield from elsewhere(cluster, config, folder)
    except UserError as error:
        yield from (user_error("rehearsal", problem) for problem in error.problems)


def show(findings: Iterator[Finding], *, as_json: bool) -> bool:
    """Print the findings as a table or as JSON, and tell whether none is a failure."""
    if as_json:
        found = list(findings)
        content = {"ok": _all_well(found), "findings": [vars(finding) for finding in found]}
        Console(soft_wrap=True, highlight=False).print_json(json_text(content))
        return _all_well(found)
    console = Console(highlight=False)
    found = []
    with console.status("looking") as status:  # on a terminal alone
        for finding in findings:
            found.append(finding)
            status.update(f"looked at {finding.what}")
    if console.is_terminal:
        console.print(_table(found))
    else:
        width = max(len(finding.what) for finding in found)
        for finding in found:
            line = f"{finding.status:<4}  {finding.what:<{width}}  {_text(finding)}"
            console.print(line, soft_wrap=True, markup=False)
    counts = {status: sum(each.status == status for each in found) for status in _COLOURS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return _all_well(found)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(min_width=min(30, max(len(finding.what) for finding in findings)))
    table.add_column()
    for each in findings:  # as Text, in which brackets are brackets
        table.add_row(Text(each.status, _COLOURS[each.status]), Text(each.what), Text(_text(each)))
    return table


def _text(finding: Finding) -> str:
    return plain(f"{finding.found} -> {finding.remedy}" if finding.remedy else finding.found)


def _all_well(findings: Sequence[Finding]) -> bool:
    return not any(finding.status == "fail" for finding in findings)
