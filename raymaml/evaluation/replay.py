"""Judging recorded episodes again: a record that does not repeat is no evidence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from raymaml.common.errors import gathered
from raymaml.config.schema import ClusterConfig
from raymaml.evaluation.campaign import Campaign, Echo, Plan
from raymaml.evaluation.judge import judge
from raymaml.evaluation.records import EpisodeRecord, record_arrays
from raymaml.training.settings import local_device, prepare_process

NOT_REPEATED = {"seconds"}


def replay_locally(plan: Plan, cluster: ClusterConfig, echo: Echo) -> int:
    """Do as ``replay`` in this process, set up as one that judges."""
    device = local_device(cluster)
    prepare_process(cluster, device)
    return replay(plan(device), echo)


def replay(campaign: Campaign, echo: Echo) -> int:
    """Judge every recorded episode of a finished campaign again, and compare bit for bit.

    All columns are compared but the seconds. Nothing is written. On other hardware, or with other
    numbers of threads, rounding may differ.

    Returns:
        The number of records that were repeated: all.

    Raises:
        UserError: the campaign is not finished, or a value differs; the first of each arm is named.
    """
    campaign.require_finished()
    count = 0
    with gathered() as mistakes:
        for result in campaign.results():
            arm = campaign.arm(result.name)
            columns = vars(record_arrays(result.records))
            again = judge(arm.build(), arm.episodes, range(len(result.records)))
            found = next(filter(None, (_difference(columns, each) for each in again)), None)
            if found is not None:
                mistakes.add(f"{arm.name}: {found}", "the record, or its model, was altered")
                continue
            count += len(result.records)
            echo(f"{arm.name}: {len(result.records)} records repeated bit for bit")
    return count


def _difference(columns: dict[str, Any], again: EpisodeRecord) -> str | None:
    """Return the first value that differs from the record of the same episode, in words."""
    for field in fields(EpisodeRecord):
        recorded = columns[field.name][again.episode]
        replayed = np.asarray(getattr(again, field.name))
        equal = np.array_equal(recorded, replayed, equal_nan=replayed.dtype.kind == "f")
        if field.name not in NOT_REPEATED and not equal:
            return (
                f"episode {again.episode} was recorded with {field.name}"
                f" {np.asarray(recorded).tolist()}, and comes out as {replayed.tolist()}"
            )
    return None
