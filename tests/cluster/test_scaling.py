"""The real runs that the cost model is compared with."""

from __future__ import annotations

import pytest

from raymaml.bench.scaling.check import rate_of, run_config
from raymaml.cluster.scaling import timed_runs
from raymaml.training.data import open_bank, sample_shards
from raymaml.training.metrics import METRICS_FILE, read_metrics

pytestmark = pytest.mark.ray


def test_runs_are_timed_and_leave_their_metrics(cluster, make_config, tmp_path):
    config = run_config(make_config("run", "name=run"), tmp_path / "runs", 2, num_steps=12)
    list(sample_shards(config, open_bank(config)))
    (seconds,) = timed_runs([config], cpus=3)
    rows = read_metrics(config.run_folder / METRICS_FILE)
    assert [row["step"] for row in rows if "episodes_per_second" in row] == [2, 4, 6, 8, 10, 12]
    assert seconds > 12 * config.outer.meta_batch_size / rate_of(rows) > 0
