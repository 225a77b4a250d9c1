"""What Prometheus reads of a run and of a campaign, at the port that Ray's node exports."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import pytest
from machinery import wait_until
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from raymaml.cluster.campaign import judge_on_cluster
from raymaml.cluster.gauges import CAMPAIGN, TRAINING
from raymaml.cluster.train import train_on_cluster
from raymaml.evaluation.run_test import plan_test
from raymaml.reports.write import write_test_report
from raymaml.training.metrics import METRICS_FILE, read_metrics
from raymaml.training.worker import train_locally

pytestmark = pytest.mark.ray

NAMES = {f"ray_{name}": key for kind in (TRAINING, CAMPAIGN) for key, (name, _) in kind.items()}
"""Key of a row by the name that Prometheus sees; the two kinds share keys, but no names."""


def scrape(run: str) -> Iterator[Sample]:
    """Read the numbers of a run as Prometheus does."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    for family in families:
        for sample in family.samples:
            if sample.labels.get("run") == run:
                assert family.type == "gauge"
                assert family.documentation
                yield sample


def test_names_say_what_is_counted_in_which_unit() -> None:
    units = {"val_ci95": "_ratio", "ci95": "_ratio", "seconds_left": "_seconds"}
    units |= dict.fromkeys(("query_accuracy", "val_accuracy", "accuracy"), "_ratio")
    for name, key in NAMES.items():
        assert re.fullmatch("ray_raymaml_(training|validation|campaign)_[a-z_]+", name)
        assert name.endswith(units.get(key, ""))


def test_a_run_shows_its_metrics(cluster, make_config):
    """Ctrl-C stops it when all have been seen: each value seen is one of metrics.jsonl."""
    config = make_config("run", "name=seen", "outer.num_steps=1000000", "outer.validate_every=50")
    shown = TRAINING.keys() - {"images_per_second"}  # of a pretraining
    seen: dict[str, set[float]] = defaultdict(set)
    ended = threading.Event()

    def complete() -> bool:
        with contextlib.suppress(OSError):  # before the node exports
            for sample in scrape("seen"):
                seen[NAMES[sample.name]].add(sample.value)
        return ended.is_set() or seen.keys() == shown

    def watch() -> None:
        try:
            wait_until(complete, "shown")
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        assert not train_on_cluster(config, lambda _line: None)
    finally:
        ended.set()
        watcher.join()

    rows = read_metrics(config.run_folder / METRICS_FILE)
    assert seen.keys() == shown
    assert seen.pop("workers") == {1.0}
    for key, values in seen.items():
        assert values <= {row[key] for row in rows if key in row}, key


def test_a_campaign_shows_its_arms(cluster, make_config):
    config = make_config("run", "name=judged")
    train_locally(config, lambda _line: None)
    campaign = judge_on_cluster(partial(plan_test, config), config.cluster, lambda _line: None)
    summary = write_test_report(campaign)
    arms = json.loads(summary.read_text(encoding="utf-8"))["arms"]
    counts = {"model": 10, "untrained": 5, "no-adaptation": 5}
    assert arms.keys() == counts.keys()
    found: dict[tuple[str, str], float] = {}

    def complete() -> bool:
        for sample in scrape("judged"):
            found[sample.labels["arm"], NAMES[sample.name]] = sample.value
        return all(found.get((arm, "episodes")) == count for arm, count in counts.items())

    wait_until(complete, "shown")
    assert found.keys() == {(arm, key) for arm in counts for key in CAMPAIGN}
    for arm, judged in arms.items():
        shown = found[arm, "accuracy"]
        assert shown == pytest.approx(judged["accuracy"]["mean"], rel=1e-12)
