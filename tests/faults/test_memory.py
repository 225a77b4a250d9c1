"""Memory that does not suffice: one message at once, with remedies that apply."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers_faults import quiet

from raymaml.common.errors import UserError
from raymaml.training.checkpoint import list_steps
from raymaml.training.explain import explained, is_out_of_memory
from raymaml.training.worker import train_locally

HUNGRY = 'model={encoder: "helpers_faults:Hungry", norm: none}'


@pytest.mark.fault("out of memory")
def test_memory_that_pytorch_does_not_get_is_one_message(make_config):
    config = make_config("run", HUNGRY, "cluster.num_workers=auto")
    with pytest.raises(UserError) as caught:
        train_locally(config, quiet)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{config.run_folder}: out of memory (")
    assert "allocate memory" in problem
    assert "; set a smaller cluster.num_workers or take a machine" in problem
    assert "under another name, fewer episodes.train" in problem


@pytest.mark.fault("out of memory")
def test_a_process_of_too_little_address_space_ends_with_a_message(make_config, tmp_path):
    """A limit of 64 MiB beyond what it has when it starts to train."""
    make_config("run", "model.width=512", "inner.gradient=unrolled", "outer.meta_batch_size=24")
    limited = (
        "import resource, raymaml.training.loop as loop\n"
        "from raymaml.cli import main\n"
        "meta_step = loop.meta_step\n"
        "def limit(*arguments):\n"
        "    pages = int(open('/proc/self/statm').read().split()[0])\n"
        "    size = pages * resource.getpagesize() + (64 << 20)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "    return meta_step(*arguments)\n"
        "loop.meta_step = limit\n"
        "main()\n"
    )
    arguments = ["train", str(tmp_path / "run/config.yaml"), "--local"]
    ended = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert ": out of memory (" in line
    assert "inner.gradient: checkpointed" in line
    assert "cluster.num_workers" not in line  # there is one
    assert list_steps(tmp_path / "run/runs/tiny") == [0]


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(
    ("method", "more", "remedies"),
    [
        ("unrolled", (), "inner.gradient: checkpointed, fewer episodes.train.num_queries"),
        ("mixed_mode", (), "name, fewer episodes.train.num_queries"),
        (
            "mixed_mode",
            ("cluster.episodes_per_chunk=2",),
            "name, a smaller cluster.episodes_per_chunk, fewer episodes.train.num_queries",
        ),
        ("", (), "name, fewer episodes.test.num_queries"),
    ],
)
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_only_remedies_that_apply_are_named(make_config, method, more, remedies, error):
    config = make_config("run", *more)
    with pytest.raises(UserError) as caught, explained(config.run_folder, config.cluster, method):
        raise error
    assert remedies in str(caught.value)


def test_other_errors_are_defects_and_stay_what_they_are(make_config):
    config = make_config("run")
    unsupported = RuntimeError("could not create a primitive descriptor for a convolution")
    for error in (unsupported, RuntimeError("shapes"), ValueError("no"), KeyError("no")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), explained(config.run_folder, config.cluster):
            raise error
