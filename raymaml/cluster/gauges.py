"""Ray's gauges of a run, which each node exports to Prometheus and the Ray dashboard."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Gauge

TRAINING = {
    "step": ("raymaml_training_steps", "Outer steps done"),
    "query_loss": ("raymaml_training_loss", "Mean query cross-entropy of the last outer step"),
    "query_accuracy": ("raymaml_training_accuracy_ratio", "Mean query accuracy, 0..1"),
    "grad_norm": ("raymaml_training_gradient_norm", "Length of the meta-gradient before clipping"),
    "episodes_per_second": ("raymaml_training_episodes_per_second", "Training episodes a second"),
    "images_per_second": ("raymaml_training_images_per_second", "Images a second, to pretrain"),
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
"""Ray exports a gauge once each time it is set, at most every second, and soon forgets it."""


class Gauges:
    """Shows numbers, each until the process ends or leaves the cluster.

    Args:
        names: name and meaning of each gauge, by the key of its number in a row.
        run: tags every number.
        tags: keys of a row whose values tag its numbers as well.
    """

    def __init__(
        self, names: Mapping[str, tuple[str, str]], run: str, tags: Sequence[str] = ()
    ) -> None:
        self._gauges = {
            key: Gauge(name, description=meaning, tag_keys=("run", *tags))
            for key, (name, meaning) in names.items()
        }
        self._run, self._tags = run, tags
        self._shown: dict[tuple[str, ...], tuple[float, dict[str, str]]] = {}
        threading.Thread(target=self._refresh, name="gauges").start()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show the numbers of a row that have a gauge."""
        tags = {"run": self._run, **{name: row[name] for name in self._tags}}
        for key in self._gauges.keys() & row.keys():
            self._shown[(key, *tags.values())] = (row[key], tags)

    def _refresh(self) -> None:
        main = threading.main_thread()  # has ended once the interpreter exits
        while ray.is_initialized() and main.is_alive():
            for (key, *_), (number, tags) in list(self._shown.items()):
                self._gauges[key].set(number, tags=tags)
            main.join(_REFRESH_SECONDS)
