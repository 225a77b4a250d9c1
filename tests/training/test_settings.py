"""What a run decides for itself, and that it says so."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from raymaml.common.errors import UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.kernels.build import NoKernelsError
from raymaml.kernels.library import Kernels
from raymaml.training.run import Run
from raymaml.training.settings import (
    gradient_method,
    image_layout,
    kernels_line,
    set_determinism,
    workers_line,
)
from raymaml.training.state import build_learner
from raymaml.training.worker import require_kernels_alike

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COLOUR = (3, 84, 84)


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def has_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a machine with a C++ compiler, and on one without."""
    found = object.__new__(Kernels) if request.param else NoKernelsError("no C++ compiler")
    monkeypatch.setattr("raymaml.training.settings.usable", lambda _dtype: found)
    return bool(request.param)


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs/mini-imagenet/convnet4-5way-1shot-template.yaml", overrides)


def method_of(config: Config, shape: tuple[int, int, int], device: torch.device) -> str:
    spec = config.episodes.train
    support = (spec.num_ways * spec.num_shots, *shape)
    return gradient_method(config.inner, config.model, config.cluster, support, device)


@pytest.mark.parametrize(
    ("overrides", "shape", "method"),
    [
        ((), COLOUR, "mixed_mode"),
        (("model.norm=context",), COLOUR, "mixed_mode"),
        (("model.norm=layer",), COLOUR, "checkpointed"),  # no closed rules
        (("cluster.memory_format=contiguous",), COLOUR, "checkpointed"),  # closed rules need it
        # 5 images of 28 x 28 with 32 channels: 125,440 activations
        ((), (1, 28, 28), "unrolled"),
        (("inner.num_steps=11",), (1, 28, 28), "mixed_mode"),
        (("model.width=64",), (1, 28, 28), "mixed_mode"),
        (("episodes.train.num_shots=5",), (1, 28, 28), "mixed_mode"),
        (("model.encoder=resnet12", "model.width=16"), (3, 32, 32), "unrolled"),
        (("model.encoder=resnet12", "model.width=64"), COLOUR, "mixed_mode"),
        (("model.encoder=torch.nn:Flatten", "model.width=null"), COLOUR, "checkpointed"),
        (("model.norm=layer", "inner.num_steps=1"), COLOUR, "unrolled"),
        (("inner.gradient=first_order",), COLOUR, "first_order"),
        (("inner.gradient=unrolled",), COLOUR, "unrolled"),
    ],
)
@pytest.mark.parametrize("has_kernels", [False], indirect=True)
def test_auto_picks_what_was_measured(overrides, shape, method: str, has_kernels: bool) -> None:
    assert method_of(config(*overrides), shape, CPU) == method


GRAY = (1, 28, 28)
ONE_BY_ONE = ("cluster.episodes_per_chunk=1",)


@pytest.mark.parametrize(
    ("overrides", "shape", "method"),
    [
        ((), COLOUR, "mixed_mode"),
        ((), GRAY, "mixed_mode"),
        (("inner.num_steps=1",), GRAY, "mixed_mode"),
        (("model.norm=layer",), COLOUR, "checkpointed"),  # from here on as without kernels
        (("model.width=24",), GRAY, "unrolled"),
        (("cluster.kernels=off",), GRAY, "unrolled"),
        (("cluster.precision=bf16",), GRAY, "unrolled"),
        (("cluster.threads_per_worker=5",), GRAY, "unrolled"),
    ],
)
@pytest.mark.parametrize("has_kernels", [True], indirect=True)
def test_by_kernels_mixed_mode_is_best(overrides, shape, method: str, has_kernels: bool) -> None:
    assert method_of(config(*overrides), shape, CPU) == method


@pytest.mark.parametrize(
    ("overrides", "shape", "method"),
    [
        (ONE_BY_ONE, COLOUR, "unrolled"),  # 5 images of 84 x 84 with 32 channels: 1,128,960
        ((*ONE_BY_ONE, "model.width=64"), GRAY, "unrolled"),
        ((*ONE_BY_ONE, "episodes.train.num_shots=5"), COLOUR, "mixed_mode"),  # 5,644,800
        ((*ONE_BY_ONE, "inner.num_steps=6"), GRAY, "mixed_mode"),
        ((), COLOUR, "mixed_mode"),  # several at once, in closed form
        (("cluster.precision=tf32",), GRAY, "mixed_mode"),
        (("cluster.precision=bf16",), COLOUR, "unrolled"),
        (("cluster.kernels=off",), COLOUR, "unrolled"),
        (("model.encoder=resnet12", "model.width=64"), GRAY, "mixed_mode"),
        (("model.norm=layer",), COLOUR, "checkpointed"),  # not measured
        (("model.norm=layer", "inner.num_steps=1"), COLOUR, "unrolled"),
        (("model.encoder=torch.nn:Flatten", "model.width=null"), COLOUR, "checkpointed"),
        (("inner.gradient=first_order",), COLOUR, "first_order"),
    ],
)
def test_on_a_gpu_auto_picks_what_was_measured_there_or_moves_less(
    overrides, shape, method: str
) -> None:
    assert method_of(config(*overrides), shape, CUDA) == method


def test_deterministic_kernels_are_asked_for_where_the_config_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    set_determinism(config().cluster)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        set_determinism(config("cluster.deterministic=true").cluster)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_layout_on_a_gpu() -> None:
    assert image_layout(config().cluster, CUDA) == "contiguous"
    asked = config("cluster.memory_format=channels_last").cluster
    assert image_layout(asked, CUDA) == "channels_last"


def test_the_learner_is_built_so() -> None:
    learner = build_learner(config("cluster.precision=bf16"), (3, 84, 84), 5, CPU)
    assert learner.inner.gradient == "mixed_mode"
    assert learner.channels_last
    plain = build_learner(config("cluster.memory_format=contiguous"), (3, 84, 84), 5, CPU)
    assert not plain.channels_last


ASKED = ("inner.gradient=unrolled", "cluster.precision=bf16", "cluster.episodes_per_chunk=2")


@pytest.mark.parametrize(
    ("overrides", "device", "workers", "says"),
    [
        (
            (),
            *(CPU, 2),
            "2 CPU worker(s) of 1 thread(s), freed memory is kept, channels_last, float32, KERNELS;"
            " meta-gradient by mixed_mode (auto)",
        ),
        (
            ("cluster.kernels=off",),
            *(CPU, 2),
            "2 CPU worker(s) of 1 thread(s), freed memory is kept, channels_last, float32, kernels:"
            " none, cluster.kernels is off; 2 to 3x slower here; meta-gradient by mixed_mode"
            " (auto)",
        ),
        (
            ("cluster.keep_freed_memory=false", *ASKED),
            *(CPU, 1),
            "1 CPU worker(s) of 1 thread(s), default allocator, channels_last, bf16, 2 episodes at"
            " once; meta-gradient by unrolled",
        ),
        (
            (),
            *(CUDA, 8),
            "8 GPU worker(s), contiguous, float32, as many episodes at once as memory allows;"
            " meta-gradient by mixed_mode (auto)",
        ),
    ],
)
def test_the_line_says_all(overrides, device, workers: int, says: str, has_kernels: bool) -> None:
    none = "kernels: none, no C++ compiler; 2 to 3x slower here"
    says = says.replace("KERNELS", "kernels" if has_kernels else none)
    chosen = config("run_dir=r", "name=n", *overrides)
    run = Run(
        config=chosen,
        folder=chosen.run_folder,
        data=cast("Any", SimpleNamespace(image_shape=COLOUR, train=None)),
        learner=build_learner(chosen, COLOUR, 5, CPU),
        identity=cast("Any", None),
        gradients=cast("Any", None),
        predict=cast("Any", None),
        at_once=cast("Any", None),
        judged_at_once=cast("Any", None),
    )
    assert run.introduction(device, workers).splitlines()[0] == f"r/n: {says}"


@pytest.mark.parametrize(
    ("overrides", "slower"),
    [
        ((), "2 to 3x"),
        (("model.norm=layer",), "1.1 to 1.5x"),
        (("model.encoder=resnet12", "model.width=16"), "1.3 to 1.6x"),
    ],
)
def test_the_line_says_what_the_lack_of_kernels_costs(
    overrides, slower: str, has_kernels: bool
) -> None:
    chosen = config(*overrides)
    words = f": none, no C++ compiler; {slower} slower here" * (not has_kernels)
    assert kernels_line([chosen.model], chosen.cluster, CPU) == f", kernels{words}"
    assert kernels_line([chosen.model], chosen.cluster, CUDA) == ""
    for other in ("model.width=24", "model.encoder=convnet4_strided", "cluster.precision=bf16"):
        none = config(other)
        assert kernels_line([none.model], none.cluster, CPU) == ""
    assert kernels_line([none.model, chosen.model], chosen.cluster, CPU) != ""


def test_the_line_of_judging_says_what_its_arms_are_judged_with() -> None:
    one, other = config(), config("cluster.precision=bf16", "cluster.num_workers=3")
    line = "2 CPU worker(s) of 1 thread(s), freed memory is kept, channels_last, float32"
    assert workers_line([one.cluster, one.cluster], CPU, 2) == line
    line = "4 GPU worker(s), contiguous, float32 and bf16"
    assert workers_line([one.cluster, other.cluster], CUDA, 4) == line


@pytest.mark.parametrize("having", [0, 1, 2, 3])
def test_all_workers_have_the_kernels_or_none(having: int, has_kernels: bool) -> None:
    """Otherwise the result would depend on the worker that takes an episode."""

    def gather(row: Tensor, counts: list[int]) -> Tensor:
        assert counts == [1, 1, 1]
        assert row.tolist() == [[float(has_kernels)]]
        return torch.tensor([[1.0]] * having + [[0.0]] * (3 - having))

    session = cast("Any", SimpleNamespace(world_size=3, device=CPU, gather=gather))
    if having in (0, 3):
        require_kernels_alike(config(), session)
        return
    with pytest.raises(UserError, match=f"{having} of 3 workers") as error:
        require_kernels_alike(config(), session)
    assert "cluster.kernels" in str(error.value)
