"""What Prometheus and the Ray dashboard see of a run: Ray's gauges, which each node exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


class TrainingGauges:
    """Shows the rows of ``metrics.jsonl``, tagged with the run."""

    def __init__(self, run: str, num_workers: int) -> None:
        self._gauges = _gauges(TRAINING, ("run",))
        self._tags = {"run": run}
        self._workers = {"workers": num_workers}

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a row."""
        _set(self._gauges, {**self._workers, **row}, self._tags)


class CampaignGauges:
    """Shows the numbers that the arms of a campaign stand at, tagged with run and arm."""

    def __init__(self, run: str) -> None:
        self._gauges = _gauges(CAMPAIGN, ("run", "arm"))
        self._run = run

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show an arm's row."""
        _set(self._gauges, row, {"run": self._run, "arm": row["arm"]})


def _gauges(names: Mapping[str, tuple[str, str]], tags: tuple[str, ...]) -> dict[str, Gauge]:
    return {
        key: Gauge(name, description=meaning, tag_keys=tags)
        for key, (name, meaning) in names.items()
    }


def _set(gauges: Mapping[str, Gauge], row: Mapping[str, Any], tags: dict[str, str]) -> None:
    for key in gauges.keys() & row.keys():
        gauges[key].set(row[key], tags=tags)
