"""How many workers there may be, and how many failures are borne."""

from __future__ import annotations

from typing import Any

import pytest

from raymaml.cluster.workers import Crew, Patience, plan_crew
from raymaml.common.errors import UserError

CPUS, GPUS = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("overrides", "resources", "crew"),
    [
        ((), CPUS, (1, 1, False)),  # the tiny config has one worker
        (("cluster.num_workers=auto",), CPUS, (2, 2, False)),
        # elastic: what the cluster has at the start does not matter; 7 episodes in chunks of 2
        (("cluster.min_workers=1", "cluster.num_workers=5"), CPUS, (1, 5, False)),
        (("cluster.min_workers=3", "cluster.num_workers=auto"), {}, (3, 7, False)),
        (
            ("cluster.min_workers=1", "cluster.num_workers=auto", "cluster.episodes_per_chunk=2"),
            CPUS,
            (1, 4, False),
        ),
        (("cluster.min_workers=9", "cluster.num_workers=auto"), CPUS, (9, 9, False)),
        (("cluster.min_workers=1", "cluster.device=auto"), GPUS, (1, 1, True)),
        (("cluster.min_workers=1", "cluster.device=cuda"), CPUS, (1, 1, True)),
    ],
)
def test_the_crew_is_what_the_config_says(
    make_config: Any,
    overrides: tuple[str, ...],
    resources: dict[str, float],
    crew: tuple[int, int, bool],
) -> None:
    config = make_config("run", "outer.meta_batch_size=7", *overrides)
    minimum, maximum, use_gpu = crew
    found = plan_crew(config.cluster, config.outer.meta_batch_size, resources)
    assert found == Crew(minimum=minimum, maximum=maximum, use_gpu=use_gpu)


def test_a_fixed_crew_needs_the_whole_cluster_at_the_start(make_config: Any) -> None:
    config = make_config("run", "cluster.num_workers=3")
    with pytest.raises(UserError, match=r"cluster.num_workers is 3 but the Ray cluster has 2 CPU"):
        plan_crew(config.cluster, config.outer.meta_batch_size, CPUS)


@pytest.mark.parametrize(
    ("max_failures", "steps", "last"),
    [
        (0, [5], 1),
        (2, [5, 5, 5], 3),
        (2, [-1, -1, -1], 3),  # no checkpoint ever
        (2, [5, 5, 6, 6, 6], 5),  # a checkpoint after the second one
        (1, [1, 2, 3, 4, 5, 5], 6),  # nodes that go, again and again, while the run gets on
    ],
)
def test_failures_count_while_there_is_no_new_checkpoint(
    max_failures: int, steps: list[int], last: int
) -> None:
    patience = Patience(max_failures)
    ends = [patience.ends(step) for step in steps]
    assert ends.index(True) + 1 == last == len(steps)
