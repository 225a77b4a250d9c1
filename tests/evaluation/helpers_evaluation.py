"""Records, and judged runs, for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from helpers_faults import quiet

from raymaml.config.schema import Config
from raymaml.evaluation.campaign import Campaign, judge_locally
from raymaml.evaluation.records import COLUMNS, Record, RecordArrays
from raymaml.evaluation.run_test import plan_test


def judge_run(config: Config, echo: Callable[[str], None] = quiet) -> Campaign:
    """Do as `raymaml test --local`, without the report."""
    return judge_locally(partial(plan_test, config), config.cluster, echo)


def record(episode: int, **values: Any) -> Record:
    """A record of 5 ways, 1 shot and 3 queries; accuracy and loss are those of the last step."""
    values = {"accuracy_by_step": (0.2, 0.8), **values}
    values = {"loss_by_step": (1.0,) * len(values["accuracy_by_step"]), **values}
    ways = range(5)
    defaults = {
        "accuracy": values["accuracy_by_step"][-1],
        "loss": values["loss_by_step"][-1],
        "class_accuracy": (values["accuracy_by_step"][-1],) * 5,
        "class_ids": tuple(ways),
        "support_rows": tuple(20 * way for way in ways),
        "query_rows": tuple(20 * way + 1 + query for way in ways for query in range(3)),
        "bin_count": (0,) * 14 + (15,),
        "bin_confidence": (0.0,) * 14 + (14.5,),
        "bin_correct": (0,) * 14 + (15,),
        "brier": 0.25,
        "seconds": 0.5,
    }
    found = defaults | values
    for which in ("support", "query"):
        images, num_ways = len(found[f"{which}_rows"]), len(found["class_ids"])
        each = images // num_ways
        found.setdefault(f"{which}_labels", tuple(at // each for at in range(images)))
    found.setdefault("query_predictions", found["query_labels"])
    return {"episode": episode, **found}


def arrays(accuracy: np.ndarray, rows: np.ndarray) -> RecordArrays:
    """Records of these accuracies [E]; classes and images are ``rows`` [E, n], one per label."""
    count = len(accuracy)
    columns = dict.fromkeys(COLUMNS, np.zeros(count))
    labels = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    ids = {"class_ids": rows, "support_rows": rows, "query_rows": rows}
    ids |= {"support_labels": labels, "query_labels": labels}
    return RecordArrays(
        bank="", **(columns | ids | {"episode": np.arange(count), "accuracy": accuracy})
    )
