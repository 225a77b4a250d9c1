"""One Ray cluster for all tests of this folder, and what they share."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_faults import assert_same_bits, quiet
from machinery import Command, fresh_shell

from raymaml.cluster.own_ray import LONGEST_BASE, set_where_unset
from raymaml.cluster.runtime import environment
from raymaml.config.schema import ClusterConfig, Config
from raymaml.training.worker import train_locally

OF_OWN_RAY = (
    *("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"),
    *("RAY_worker_niceness", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"),
)
"""Variables that a Ray of our own is started with, or looks at."""
FAULTS = Path(__file__).resolve().parents[1] / "faults"


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets (about 107 bytes in all)."""
    folder = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def base(short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The usual temporary folder, empty, of the longest path; and a home without a token."""
    for name in OF_OWN_RAY:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    folder = short_folder / ("x" * (LONGEST_BASE - 1 - len(str(short_folder))))
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster(short_folder: Path) -> Iterator[None]:
    """A cluster of four logical CPUs in this process: three workers and their readers fit."""
    with pytest.MonkeyPatch.context() as patch, set_where_unset(environment(ClusterConfig())):
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token is written into the home
        patch.setenv("RAY_worker_niceness", "0")  # or workers wait for the other process of tests
        # workers import an encoder from there
        patch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
        patch.setenv("RAY_metrics_report_interval_ms", "2000")  # Ray's default is 10 s
        import ray

        ray.init(
            address="local",
            num_cpus=4,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(short_folder),
        )
        yield
        ray.shutdown()


@pytest.fixture
def joining(cluster: None) -> dict[str, str]:
    """What leads a command of its own to the shared cluster."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="session")
def trained_alone() -> dict[tuple[str, ...], Config]:
    """The runs that were not disturbed, by their overrides."""
    return {}


@pytest.fixture
def same_as_alone(make_config, tmp_path_factory, trained_alone) -> Callable[..., None]:
    """``same_as_alone(config, "key.path=value", ...)`` compares the bits of weights.

    A run must end in those of one process without Ray, undisturbed, that is given the overrides.
    """

    def compare(config: Config, *overrides: str) -> None:
        if overrides not in trained_alone:
            trained_alone[overrides] = make_config(tmp_path_factory.mktemp("lone"), *overrides)
            assert train_locally(trained_alone[overrides], quiet)
        assert_same_bits(config, trained_alone[overrides])

    return compare


@pytest.fixture
def start(tmp_path: Path, short_folder: Path) -> Iterator[Callable[..., Command]]:
    """``start("train", ...)`` runs a command as from a user's fresh shell.

    The shell's home has no Ray token yet, and nothing says where a cluster may be.
    """
    home = tmp_path / "home"
    home.mkdir()
    environment = fresh_shell(home, RAY_TMPDIR=str(short_folder))
    started: list[Command] = []

    def begin(*arguments: str, cwd: Path = tmp_path, **more: str) -> Command:
        started.append(Command(tmp_path, {**environment, **more}, *arguments, cwd=cwd))
        return started[-1]

    yield begin
    for command in started:
        command.clean_up()
