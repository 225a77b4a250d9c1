"""What Prometheus and the Ray dashboard see of a run: Ray's gauges, which each node exports."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Gauge

TRAINING = {
    "step": ("raymaml_training_steps", "Outer steps done"),
    "query_loss": ("raymaml_training_loss", "Mean query cross-entropy of the last outer step"),
    "query_accuracy": ("raymaml_training_accuracy_ratio", "Mean query accuracy, 0..1"),
    "grad_norm": ("raymaml_training_gradient_norm", "Length of the meta-gradient before clipping"),
    "episodes_per_second": ("raymaml_training_episodes_per_second", "Training episodes a second"),
    "seconds_left": ("raymaml_training_left_seconds", "Time to the last outer step, at this rate"),
    "workers": ("raymaml_training_workers", "Workers that learn"),
    "val_accuracy": ("raymaml_validation_accuracy_ratio", "Accuracy over the val episodes, 0..1"),
    "val_ci95": ("raymaml_validation_interval_ratio", "Half width of its 95% interval, 0..1"),
    "val_loss": ("raymaml_validation_loss", "Mean cross-entropy over the val episodes"),
}
"""Name and meaning by the key of ``metrics.jsonl``; Ray puts ``ray_`` before the names."""
CAMPAIGN = {
    "episodes": ("raymaml_campaign_episodes", "Episodes of the arm that are judged"),
    "accuracy": ("raymaml_campaign_accuracy_ratio", "Their mean accuracy, 0..1"),
    "ci95": ("raymaml_campaign_interval_ratio", "Half width of its 95% interval, 0..1"),
    "episodes_per_second": (
        "raymaml_campaign_episodes_per_second",
        "Episodes a second, of all arms together",
    ),
}
_REFRESH_SECONDS = 0.5
"""Ray exports a gauge once for each time it was set, at most every second, and soon forgets it."""


class TrainingGauges:
    """Shows the rows of ``metrics.jsonl``, tagged with the run."""

    def __init__(self, run: str, num_workers: int) -> None:
        self._gauges = _Gauges(TRAINING, ("run",))
        self._tags = {"run": run}
        self._workers = {"workers": num_workers}

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a row."""
        self._gauges.set({**self._workers, **row}, self._tags)


class CampaignGauges:
    """Shows the numbers that the arms of a campaign stand at, tagged with run and arm."""

    def __init__(self, run: str) -> None:
        self._gauges = _Gauges(CAMPAIGN, ("run", "arm"))
        self._run = run

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show an arm's row."""
        self._gauges.set(row, {"run": self._run, "arm": row["arm"]})


class _Gauges:
    """Gauges that keep their last numbers until the process ends, or leaves the cluster."""

    def __init__(self, names: Mapping[str, tuple[str, str]], tags: tuple[str, ...]) -> None:
        self._gauges = {
            key: Gauge(name, description=meaning, tag_keys=tags)
            for key, (name, meaning) in names.items()
        }
        self._tags = tags
        self._numbers: dict[tuple[str, ...], float] = {}  # by key and values of the tags
        threading.Thread(target=self._refresh, name="gauges").start()

    def set(self, row: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Take over the numbers of a row that have a gauge."""
        for key in self._gauges.keys() & row.keys():
            self._numbers[(key, *(tags[name] for name in self._tags))] = row[key]

    def _refresh(self) -> None:
        main = threading.main_thread()  # has ended once the interpreter exits
        while ray.is_initialized() and main.is_alive():
            for (key, *values), number in list(self._numbers.items()):
                self._gauges[key].set(number, tags=dict(zip(self._tags, values, strict=True)))
            main.join(_REFRESH_SECONDS)
