"""Fixtures that many tests share: a tiny bank whose classes can be learned, and configs for it.

Everything is a function of fixed seeds. 16x16 is the smallest image that ConvNet4 takes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymaml.config.load import dump_config, load_config
from raymaml.config.schema import Config
from raymaml.data.bank import ImageBank, write_bank
from raymaml.data.bank_format import ClassImages, in_memory
from raymaml.storage.place import Place, is_remote, to_place
from raymaml.training.data import sample_shards

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it

MakeConfig = Callable[..., Config]

CLASSES = {"train": 12, "val": 5, "test": 5}
IMAGES_PER_CLASS = 8
SIZE = 16

TINY = """\
name: tiny
seed: 3
run_dir: {place}/runs
data:
  source: {{kind: image-folder, path: {place}/images, mode: gray}}
  bank: {bank}
  shards: {place}/shards
  image_size: 16
episodes:
  seed: 3
  train: {{num_ways: 3, num_shots: 1, num_queries: 2, num_episodes: 24}}
  val: {{num_ways: 3, num_shots: 1, num_queries: 2, num_episodes: 4}}
  test: {{num_ways: 3, num_shots: 1, num_queries: 2, num_episodes: 10}}
model: {{width: 4}}
inner: {{num_steps: 2, lr: 0.1}}
outer: {{num_steps: 6, meta_batch_size: 3, log_every: 1, validate_every: 3}}
evaluation: {{chunk_size: 4, baseline_episodes: 5}}
cluster: {{num_workers: 1, device: cpu}}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here and not in ``tests/fuzz``: options are read before its folder is looked at."""
    parser.addoption("--fuzz-inputs", type=int, help="Hostile inputs of each reader in tests/fuzz.")
    parser.addoption("--nightly", action="store_true", help="Run the tests marked nightly as well.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked nightly, unless they are asked for."""
    if not config.getoption("--nightly"):
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def tiny_classes() -> list[ClassImages]:
    """22 classes of 8 images: each a coarse random pattern of its own, under noise."""
    generator = np.random.default_rng(0)
    shape = (IMAGES_PER_CLASS, SIZE, SIZE, 1)
    classes = []
    for split, count in CLASSES.items():
        for number in range(count):
            pattern = np.kron(generator.integers(0, 2, (4, 4)) * 160, np.ones((4, 4)))
            noise = generator.integers(0, 96, shape)
            images = (pattern[None, :, :, None] + noise).astype(np.uint8)
            classes.append(in_memory(f"{split}-{number}", split, images))
    return classes


@pytest.fixture(scope="session")
def tiny_bank(tmp_path_factory: pytest.TempPathFactory) -> ImageBank:
    """12/5/5 classes x 8 images of 16x16x1; shared by all tests: never write into its folder."""
    folder = tmp_path_factory.mktemp("tiny") / "bank"
    image_shape = (1, SIZE, SIZE)
    return write_bank(
        folder, tiny_classes(), source="patterns", licence="none", image_shape=image_shape
    )


@pytest.fixture
def make_config(tiny_bank: ImageBank, tmp_path: Path) -> MakeConfig:
    """``make_config(place, "key.path=value", ...)`` -> a ``Config`` whose shards are sampled.

    ``place`` is a folder, or a name under ``tmp_path``: shards and runs lie there, and the whole
    config as ``place/config.yaml``. Calls with one place share what they may share.
    """

    def make(place: Path | str = "tiny", *overrides: str) -> Config:
        folder = tmp_path / place  # an absolute place replaces tmp_path
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(TINY.format(place=folder, bank=tiny_bank.folder), encoding="utf-8")
        config = load_config(path, overrides)
        path.write_text(dump_config(config), encoding="utf-8")
        assert len(list(sample_shards(config.data, config.episodes, tiny_bank))) == 3
        return config

    return make


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """An S3 server on loopback, in a process of its own, and the environment that leads to it."""
    pytest.importorskip("moto", reason="no moto: pip install raymaml[test]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log.txt").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    while True:  # until it listens; pytest's own limit ends a server that never does
        assert server.poll() is None, "the S3 server ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield environment
    server.kill()
    server.wait()
    log.close()


@pytest.fixture
def s3(s3_server: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder, empty and of this test alone, in a bucket of the S3 server."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    bucket = to_place("s3://raymaml-tests")
    assert is_remote(bucket)
    bucket.mkdir(exist_ok=True)
    return bucket / tmp_path.name


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by its own driver; skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program, driver = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver on the PATH (Debian: chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()
