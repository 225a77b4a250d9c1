"""`raymaml scale`: the model by hand-worked numbers, its fits, its simulation, real traffic."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers_bench import tiny
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from raymaml.bench.cases import image_shape, made_up_episode, standard_on_gpus
from raymaml.bench.probes import AtenCalls
from raymaml.bench.scaling.check import Checked, rate_of, run_config, steps_of
from raymaml.bench.scaling.command import plan, scale
from raymaml.bench.scaling.counts import count
from raymaml.bench.scaling.fit import Timing, fit_line, fit_link, fit_start, fit_storage
from raymaml.bench.scaling.gpus import Assumptions, assume, outlook
from raymaml.bench.scaling.model import Job, Machine, Start, Storage, System, makespan, predict
from raymaml.bench.scaling.network import REDUCTIONS, Link, Network, exchange, sends
from raymaml.bench.scaling.waiting import Hiccups, expected_slowest, simulate
from raymaml.cli import main
from raymaml.common.errors import UserError
from raymaml.config.schema import Config
from raymaml.training.state import build_learner
from raymaml.training.worker import train_locally

CPU = torch.device("cpu")
LINK = Link(latency=1e-3, bandwidth=1e6)
FAR = Link(latency=9.0, bandwidth=1e6)
ONE_NODE = Network(workers_per_node=8, inside=LINK, between=LINK)
"""A millisecond a message, a microsecond a byte."""
JOB = Job(num_params=1000, meta_batch=4, num_steps=100, checkpoint_every=10, outcome_width=3)


def plain(**machine: float) -> System:
    """One second an episode, and else what is given."""
    return System(machine=Machine(episode_seconds=1.0, **machine), network=ONE_NODE)


def test_collectives_by_hand() -> None:
    # 4 workers with 100 bytes each
    assert sends("all_gather", 4, 100) == (3, 300)  # 3 rounds of the ring, 100 bytes each
    assert sends("all_to_all", 4, 100) == (3, 75)  # a quarter to each of the 3 others
    assert sends("all_reduce", 4, 100) == (6, 150)  # a quarter in each of 6 rounds
    assert ONE_NODE.seconds("all_gather", 4, 100) == pytest.approx(3e-3 + 300e-6)
    assert ONE_NODE.seconds("all_to_all", 4, 100) == pytest.approx(3e-3 + 75e-6)
    assert ONE_NODE.seconds("all_reduce", 4, 100) == pytest.approx(6e-3 + 150e-6)


def test_between_nodes_by_hand() -> None:
    slow = Link(latency=2e-3, bandwidth=1e5)
    network = Network(workers_per_node=2, inside=LINK, between=slow)
    # a ring: 2 messages inside and 1 between; two cards a node carry 2e5 bytes/s, below 1e6 inside
    around = 2 * 1e-3 + 2e-3
    assert network.seconds("all_gather", 4, 100) == pytest.approx(around + 300 / 2e5)
    assert network.seconds("all_reduce", 4, 100) == pytest.approx(2 * around + 150 / 2e5)
    # to each other: 1 message inside and 2 away; 25 bytes at 1e6, meanwhile 50 at 1e5
    assert network.seconds("all_to_all", 4, 100) == pytest.approx(1e-3 + 2 * 2e-3 + 50 / 1e5)
    assert network.seconds("all_gather", 2, 100) == ONE_NODE.seconds("all_gather", 2, 100)


def test_reductions_by_hand() -> None:
    # 4 workers with 2 gradients of 1000 floats each: width of a slice 250 floats
    found = {
        reduction: exchange(
            reduction, ONE_NODE, workers=4, rows=2, meta_batch=8, num_params=1000, chunk=2
        )
        for reduction in REDUCTIONS
    }
    sent = {name: each.sent for name, each in found.items()}
    assert sent == {
        "rows to all": 3 * 2 * 4000,
        "slices": 3 * 2 * 1000 + 3 * 1000,
        "chunk sums": 3 * 1 * 1000 + 3 * 1000,
        "all-reduce": 6 * 1000,
    }
    floats = {name: each.memory // 4 for name, each in found.items()}
    assert floats == {  # its own 2 rows, and: what it hands in, what it gets, (the mean)
        "rows to all": 2000 + 2000 + 8000,
        "slices": 2000 + 2000 + 8 * 250 + 1000,
        "chunk sums": 2000 + 1000 + 4 * 250 + 1000,
        "all-reduce": 2000 + 1000,
    }
    added = {name: each.added for name, each in found.items()}
    assert added == {
        "rows to all": 8000,
        "slices": 8 * 250,
        "chunk sums": 2000 + 4 * 250,
        "all-reduce": 2000 + 1000,
    }


@pytest.mark.parametrize("workers", [2, 3, 8, 64, 512])
def test_slices_send_as_much_as_an_all_reduce_at_one_episode_a_worker(workers: int) -> None:
    def sent(reduction: str, rows: int) -> float:
        return exchange(
            reduction,  # type: ignore[arg-type]
            ONE_NODE,
            workers=workers,
            rows=rows,
            meta_batch=rows * workers,
            num_params=7_998_080,
            chunk=rows,
        ).sent

    padding = 4 * 2 * workers**2  # each of the two collectives rounds a slice up
    assert sent("slices", 1) == pytest.approx(sent("all-reduce", 1), abs=padding)
    assert sent("slices", 4) == pytest.approx(2.5 * sent("all-reduce", 4), abs=4 * padding)
    assert sent("chunk sums", 4) == pytest.approx(sent("all-reduce", 4), abs=padding)
    assert sent("rows to all", 1) == pytest.approx(workers / 2 * sent("all-reduce", 1), rel=1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_lone_worker_sends_nothing(reduction: str) -> None:
    step = predict(plain(add_rate=12_000.0), JOB, 1, reduction=reduction)  # type: ignore[arg-type]
    assert (step.sent, step.parts["exchange"]) == (0, 0.0)
    assert step.parts["adding"] == pytest.approx(4.0)  # 4 gradients of 12,000 bytes to touch
    assert step.seconds == pytest.approx(8.0)
    assert step.efficiency == 1.0


def test_a_step_by_hand() -> None:
    machine = Machine(episode_seconds=1.0, step_seconds=0.25, add_rate=1e6, stream_seconds=0.5)
    system = System(
        machine=machine,
        network=ONE_NODE,
        storage=Storage(latency=1.0, rate=12_000.0),
        start=Start(seconds=8.0, per_worker=1.0),
    )
    step = predict(system, JOB, 2)
    assert step.parts == pytest.approx(
        {
            "compute": 2.0,
            "uneven shares": 0.0,
            "waiting for the slowest": 0.0,
            # 2 rows of 1000 floats: 4000 bytes to the other; the mean: 2000; the outcome: 24
            "exchange": (1e-3 + 4e-3) + (1e-3 + 2e-3) + (1e-3 + 24e-6),
            "adding": 4 * 500 * 12 / 1e6,
            "fixed": 0.25,
            "checkpoints": (1.0 + 12_000 / 12_000) / 10,
            "data stream": 0.0,
            "start": (8.0 + 2 * 1.0) / 100,
        }
    )
    assert step.sent == 4000 + 2000 + 24
    assert step.episodes_per_second == pytest.approx(4 / sum(step.parts.values()))
    lone = predict(system, JOB, 1)
    assert step.efficiency == pytest.approx(lone.seconds / step.seconds / 2)


def test_what_a_lone_worker_is_depends_on_the_scaling() -> None:
    system = plain(step_seconds=1.0)
    # 4 episodes: 4 + 1 s alone, 2 + 1 s by two (messages left out by a quick network)
    quick = Link(latency=0.0, bandwidth=math.inf)
    system = replace(system, network=Network(workers_per_node=8, inside=quick, between=quick))
    assert predict(system, JOB, 2).efficiency == pytest.approx(5 / 3 / 2)
    assert predict(system, JOB, 2, weak=True).efficiency == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("system", "workers", "bottleneck"),
    [
        (plain(), 2, "compute"),
        (plain(), 8, "uneven shares"),  # 4 of 8 workers have no episode, 1/2 s each is lost
        (plain(step_seconds=3.0), 2, "fixed"),
        (plain(add_rate=100.0), 2, "adding"),
        (plain(stream_seconds=3.0), 2, "data stream"),
        (plain(spread=2.0), 4, "waiting for the slowest"),
        (replace(plain(), network=replace(ONE_NODE, inside=FAR)), 2, "exchange"),
        (replace(plain(), storage=Storage(latency=100.0)), 2, "checkpoints"),
        (replace(plain(), start=Start(seconds=1000.0)), 2, "start"),
    ],
)
def test_the_bottleneck_is_named(system: System, workers: int, bottleneck: str) -> None:
    step = predict(system, JOB, workers)
    expected = {"uneven shares": "compute"}.get(bottleneck, bottleneck)  # as much: the first
    assert step.bottleneck == expected
    assert step.largest_loss == ("exchange" if bottleneck == "compute" else bottleneck)


def test_shared_cores_by_hand() -> None:
    assert makespan([2, 1, 1], None) == 2.0
    assert makespan([4], 2) == 4.0
    assert makespan([2, 2], 2) == 2.0
    # 3 at two thirds of a core until 1 is done by each: 1.5; then 1 more by the first alone
    assert makespan([2, 1, 1], 2) == pytest.approx(2.5)
    assert makespan([1, 1, 1, 1], 2) == pytest.approx(2.0)
    # two at once take 1.5 times as long each
    assert makespan([1, 1], 2, 1.5) == pytest.approx(1.5)
    assert makespan([2, 1], 2, 1.5) == pytest.approx(1.5 + 1)
    assert makespan([1, 0], 2, 3.0) == pytest.approx(1.0)
    # Ray's own processes take a fifth of a core
    assert makespan([1, 1], 1.8) == pytest.approx(2 / 1.8)


def test_workers_that_share_cores_gain_nothing_beyond_them() -> None:
    quick = Link(latency=0.0, bandwidth=math.inf)
    system = System(
        machine=Machine(episode_seconds=1.0, cores=2),
        network=Network(workers_per_node=8, inside=quick, between=quick),
    )
    rates = [predict(system, JOB, workers).episodes_per_second for workers in (1, 2, 4)]
    assert rates == pytest.approx([1.0, 2.0, 2.0])


def test_the_mean_of_the_slowest_of_two_lognormals() -> None:
    # E max(X, Y) = E X + E|X - Y| / 2 = 2 Phi(sigma / sqrt 2) for lognormals of mean 1
    for spread in (0.05, 0.5, 1.0):
        exact = 1 + math.erf(spread / 2)
        assert expected_slowest(2, 1, spread) == pytest.approx(exact, rel=1e-6)
    assert expected_slowest(1, 1, 0.5) == 1.0
    assert expected_slowest(512, 1, 0.0) == 1.0
    # the more episodes, the more even their sum
    assert 1 < expected_slowest(8, 16, 0.5) < expected_slowest(8, 1, 0.5)


@pytest.mark.parametrize(("workers", "episodes"), [(2, 1), (8, 1), (64, 1), (8, 4)])
def test_the_simulation_agrees_with_the_analysis(workers: int, episodes: int) -> None:
    found = simulate(
        shares=[episodes] * workers, episode_seconds=2.0, spread=0.3, together=0.5, steps=20_000
    )
    expected = 2.0 * episodes * expected_slowest(workers, episodes, 0.3) + 0.5
    assert found.step_seconds == pytest.approx(expected, rel=5e-3)
    waited = 1 - (2.0 * episodes + 0.5) / expected  # of a worker's time
    assert found.waited == pytest.approx(waited, abs=5e-3)


def test_a_simulation_without_chance_by_hand() -> None:
    found = simulate(
        shares=[2, 1],
        episode_seconds=1.0,
        spread=0.0,
        together=0.5,
        checkpoint_seconds=1.5,
        checkpoint_every=4,
        steps=8,
    )
    # 6 steps of 2 + 0.5, 2 of 2 + 1.5 + 0.5; the second worker waits 1 in those and 2.5 in these
    assert found.step_seconds == pytest.approx((6 * 2.5 + 2 * 4.0) / 8)
    assert found.waited == pytest.approx((6 * 1.0 + 2 * 2.5) / (2 * 23.0))


def test_hiccups_of_one_episode_hold_up_all_workers() -> None:
    found = simulate(
        shares=[1] * 64,
        episode_seconds=1.0,
        spread=0.0,
        together=0.0,
        hiccups=Hiccups(chance=0.01, factor=3.0),
        steps=20_000,
    )
    some = 1 - 0.99**64  # 47% of the steps have one
    assert found.step_seconds == pytest.approx(1 + 2 * some, rel=1e-2)


def test_fits_recover_what_made_the_data() -> None:
    link = Link(latency=3e-4, bandwidth=8e8)
    network = Network(workers_per_node=8, inside=link, between=link)
    timings = [
        Timing(
            collective=collective,
            workers=workers,
            size=size,
            seconds=network.seconds(collective, workers, size) * max(1.0, workers / 2),
        )
        for collective in ("all_gather", "all_to_all", "all_reduce")
        for workers in (2, 3, 4)
        for size in (4096, 1 << 20, 8 << 20)
    ]
    found = fit_link(timings, cores=2)
    assert found.latency == pytest.approx(3e-4)
    assert found.bandwidth == pytest.approx(8e8)
    noise = np.random.default_rng(0).lognormal(0, 0.1, len(timings))
    rough = [replace(t, seconds=t.seconds * n) for t, n in zip(timings, noise, strict=True)]
    assert fit_link(rough, cores=2).bandwidth == pytest.approx(8e8, rel=0.2)
    storage = fit_storage([100, 300], [1.0, 2.0])
    assert (storage.latency, storage.rate) == (pytest.approx(0.5), pytest.approx(200.0))
    start = fit_start([1, 2, 4], [10.0, 11.0, 13.0])
    assert (start.seconds, start.per_worker) == (pytest.approx(9.0), pytest.approx(1.0))


def test_a_fit_is_never_negative() -> None:
    assert fit_line([[1.0, 1.0], [1.0, 2.0]], [2.0, 1.0])[1] == 0.0
    assert fit_storage([100, 200], [2.0, 1.0]).rate == math.inf


def test_parameters_are_those_of_the_real_models() -> None:
    convnet, resnet = (count(config) for config in standard_on_gpus())
    # 3x3 convolutions with bias and two of norm, 4 blocks; 5 * 5 * 32 features and a head
    assert convnet.num_params == (9 * 3 + 3) * 32 + 3 * (9 * 32 + 3) * 32 + (800 + 1) * 5
    for config, counts in zip(standard_on_gpus(), (convnet, resnet), strict=True):
        learner = build_learner(config, image_shape(config), 5, CPU)
        assert counts.num_params == sum(value.numel() for value in learner.params.values())
    assert resnet.num_params > 7_900_000
    assert convnet.method == resnet.method == "checkpointed"


def test_operations_are_counted_as_they_would_be_done() -> None:
    config = tiny(inner={"num_steps": 2, "lr": 0.1, "gradient": "unrolled"})
    counts = count(config)
    learner = build_learner(config, image_shape(config), 3, CPU)
    with FlopCounterMode(display=False) as flops, AtenCalls() as calls:
        learner.episode_gradient(made_up_episode(config, "training", CPU, torch.float32))
    assert (counts.method, counts.flops) == ("unrolled", flops.get_total_flops())
    assert counts.calls == pytest.approx(calls.count, rel=0.02)  # some kernels ask for more
    # one inner step more: as many again as the second
    one, two, three = (
        count(tiny(inner={"num_steps": n, "lr": 0.1, "gradient": "unrolled"})).flops
        for n in (1, 2, 3)
    )
    assert three - two == two - one > 0


def test_a_forward_pass_has_the_operations_of_its_convolutions() -> None:
    flops = count(tiny(inner={"num_steps": 0, "lr": 0.1})).flops
    # 6 queries; 2 channels, 16x16, 8x8, 4x4, 2x2; 2 for a multiplication with its addition; the
    # first convolution needs no gradient of its images
    layers = [
        2 * 9 * channels * 2 * size**2 for channels, size in ((1, 16), (2, 8), (2, 4), (2, 2))
    ]
    head = 2 * 2 * 3
    assert flops == 6 * (3 * sum(layers) - layers[0] + 3 * head)


def test_assumptions_are_read_and_checked() -> None:
    assert assume(()) == Assumptions()
    found = assume(("tflops=30", "gpus_per_node=4"))
    assert found == replace(Assumptions(), tflops=30.0, gpus_per_node=4)
    with pytest.raises(UserError) as error:
        assume(("tflop=30", "call_us=0", "gpus_per_node=1.5", "nvlink_gb=fast"))
    assert len(error.value.problems) == 4
    assert all(text.startswith("--assume: ") for text in error.value.problems)


def test_what_binds_a_gpu() -> None:
    counts = count(tiny())
    system = Assumptions().system(counts, step_calls=100, storage=Storage())
    assert system.machine.bound == "operator calls"
    assert system.machine.episode_seconds == pytest.approx(counts.calls * 6e-6)
    assert system.machine.step_seconds == pytest.approx(100 * 6e-6)
    slow = replace(Assumptions(), tflops=1e-6)
    system = slow.system(counts, step_calls=100, storage=Storage())
    assert system.machine.bound == "arithmetic"
    assert system.machine.episode_seconds == pytest.approx(counts.flops / 1e6)


def test_an_outlook_has_all_cases() -> None:
    found = outlook("x", plain(), JOB, gpus=(1, 8), per_gpu=(1, 4), fixed=4)
    assert len(found) == len(REDUCTIONS) * 2 * 3
    cases = {(e.scaling, e.step.workers, e.step.meta_batch) for e in found}
    assert cases == {
        ("1 a GPU", 1, 1),
        ("1 a GPU", 8, 8),
        ("4 a GPU", 1, 4),
        ("4 a GPU", 8, 32),
        ("4 in all", 1, 4),
        ("4 in all", 8, 4),
    }
    assert all(e.step.efficiency == 1 for e in found if e.step.workers == 1)


TRAFFIC = """
import json, sys
import torch, torch.distributed as dist
from raymaml.cluster.session import RaySession
from raymaml.training.reduction import share_sizes

rank, world, count, length = map(int, sys.argv[1:5])
store = sys.argv[5]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
sent = []
all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_into_tensor

def counted_all_to_all(output, input, output_splits, input_splits):
    others = sum(input_splits) - input_splits[rank]
    assert sum(input_splits) == input.numel() and sum(output_splits) == output.numel()
    sent.append(others * input.element_size())
    return all_to_all(output, input, output_splits, input_splits)

def counted_all_gather(output, input):
    assert output.numel() == world * input.numel()
    sent.append((world - 1) * input.numel() * input.element_size())  # once around the ring
    return all_gather(output, input)

dist.all_to_all_single, dist.all_gather_into_tensor = counted_all_to_all, counted_all_gather
session = object.__new__(RaySession)  # its reduction alone, without Ray
session.rank, session.world_size = rank, world
sizes = share_sizes(count, world)
rows = torch.randn(count, length, generator=torch.Generator().manual_seed(0)).split(sizes)[rank]
mean = session.mean(rows, sizes)
session.gather(rows[:, :3], sizes)
print(json.dumps([sent, mean.double().sum().item()]))
"""


@pytest.mark.slow
def test_traffic_is_what_the_session_hands_to_the_collectives(tmp_path: Path) -> None:
    world, meta_batch, num_params = 3, 5, 1001  # shares of 2, 2 and 1; slices of 334, padded
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAFFIC]
            + [str(n) for n in (rank, world, meta_batch, num_params)]
            + [str(tmp_path / "store")],
            stdout=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    sent = [sum(each) for each, _ in outputs]
    job = replace(JOB, num_params=num_params, meta_batch=meta_batch)
    assert max(sent) == predict(plain(), job, world).sent
    assert len({mean for _, mean in outputs}) == 1


def test_a_run_for_the_check_is_short_and_valid(tmp_path: Path) -> None:
    config = tiny(outer={"num_steps": 900, "meta_batch_size": 3, "schedule": "cosine"})
    run = run_config(config, tmp_path, workers=3, num_steps=12)
    assert Config.model_validate(run.model_dump()) == run
    assert (run.cluster.num_workers, run.outer.num_steps, run.outer.log_every) == (3, 12, 2)
    assert run.episodes.train.num_episodes == 36
    assert run.episodes.val.num_episodes == 1
    assert run.run_folder == tmp_path / "tiny-3-workers"


def test_a_run_for_the_check_lasts_as_long_as_it_should() -> None:
    step = predict(plain(), JOB, 1)
    assert step.seconds == pytest.approx(4.0)
    assert steps_of(step, 240.0) == 60
    assert steps_of(step, 1.0) == 12


def test_the_rate_of_a_run_leaves_the_first_row_out() -> None:
    rows = [
        {"step": 0, "val_accuracy": 0.2},
        {"step": 2, "episodes_per_second": 0.1},
        {"step": 4, "episodes_per_second": 2.0},
        {"step": 6, "episodes_per_second": 6.0},
    ]
    assert rate_of(rows) == pytest.approx(3.0)  # 1 / 2 + 1 / 6 = 2 / 3 s for 2
    run = Checked(
        config="x", workers=1, meta_batch=4, predicted=3.0, measured=2.0, start_seconds=1.0
    )
    assert run.ratio == 1.5


def test_a_start_that_takes_no_time_at_all() -> None:
    """Without Ray the difference of two timings may be 0, or below it."""
    start = fit_start([1, 2], [0.0, -0.1])
    assert start.seconds + 2 * start.per_worker == pytest.approx(1e-3, rel=1e-6)


def lone_runs(configs: Sequence[Config], _cpus: int) -> Iterator[float]:
    """Train in this process, without Ray and with one worker whatever the config says."""
    for config in configs:
        start = time.perf_counter()
        assert train_locally(config, lambda _line: None)
        yield time.perf_counter() - start


@pytest.mark.slow
def test_the_command_measures_predicts_and_checks(make_config, tmp_path: Path) -> None:
    make_config("run", "name=scaled", "outer.meta_batch_size=3")
    said: list[str] = []
    scale(
        tmp_path / "run" / "config.yaml",
        ("name=scaled", "outer.meta_batch_size=3"),
        plan("1,2", Assumptions(), real_runs=True, seconds=1.0),
        train=lone_runs,
        json_path=tmp_path / "scale.json",
        plot_path=tmp_path / "scale.png",
        echo=said.append,
    )
    content = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert content["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert [run["workers"] for run in content["runs"]] == [1, 2]
    assert all(run["ratio"] == run["predicted"] / run["measured"] > 0 for run in content["runs"])
    (steps,) = content["here"].values()
    assert [step["meta_batch"] for step in steps] == [3, 3]
    assert steps[0]["sent"] == 0 < steps[1]["sent"]
    workers = {each["workers"] for each in content["outlooks"]}
    assert {8, 64, 512} <= workers
    assert len(content["measured"]["timings"]) == 4 * 3  # sizes, collectives, by two workers
    text = "\n".join(said)
    assert "scaled, 3 episodes an outer step, workers on this machine:" in text
    assert "bound by operator calls" in text
    with Image.open(tmp_path / "scale.png") as image:
        assert image.format == "PNG"
        image.load()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--workers", "1,two"],
            "--workers: 'two' is no number of workers below 1,000; give 1,2,3,4",
        ),
        (["--workers", "0"], "--workers: '0' is no number of workers"),
        (["--workers", "1000000000"], "--workers: '1000000000' is no number of workers below"),
        (["--assume", "gpus=9"], "--assume: 'gpus' is unknown; give some of tflops, call_us"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_what_users_get_wrong(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(main, ["scale", *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
