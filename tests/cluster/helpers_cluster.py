"""Waiting for a condition, looking at runs and weights, and commands in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch
from machinery import title
from torch import Tensor

from raymaml.training.metrics import METRICS_FILE, read_metrics

RATE = r"\d+\.\d episodes/s  (\d+h\d\dm|\d+m\d\ds) left"
"""How every progress line ends, as a regular expression."""

_PERCENT = r"\d{1,3}\.\d\d"
_OF_TRAINING = (
    r".*: the inner loop adapts|  \S.* [\d,]+  (adapts|[\d,]+ adapt)",
    rf"step +\d+/\d+  loss \d+\.\d{{4}}  accuracy {_PERCENT}%  {RATE}",
    rf"step +\d+/\d+  validation accuracy {_PERCENT} \+- {_PERCENT}%  loss \d+\.\d{{4}}",
)
"""What a run prints between its first and its last line."""

SETTINGS = (
    "worker(s) of 1 thread(s), freed memory is kept, channels_last, float32;"
    " meta-gradient by unrolled (auto)"
)
"""How the first line of a run of the tiny config ends, on CPU."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Look again and again; fail after a generous while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: still not {what}"
        time.sleep(0.1)


def not_of_training(lines: Iterable[str]) -> list[str]:
    """Return what is no line of a run's: of Ray, a warning, a traceback, a colour."""
    known = re.compile("|".join(_OF_TRAINING))
    return [line for line in lines if not known.fullmatch(line)]


def trained_steps(folder: Path) -> int:
    """Return how many outer steps a run has written metrics of."""
    return max((row["step"] for row in read_metrics(folder / METRICS_FILE)), default=0)


def attempts(folder: Path) -> int:
    """Return how often rank 0 began to train: each time it opens an event file of its own."""
    return len(list((folder / "tensorboard").iterdir()))


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless both hold the same tensors under the same names, bit by bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def pids(name: str) -> list[int]:
    """Return the processes of the actors of a class, which Ray names after it, of our cluster."""
    found = psutil.Process().children(recursive=True)
    return [process.pid for process in found if title(process).startswith(f"ray::{name}")]


class Command:
    """``python -m raymaml ...`` with a session of its own, as a terminal gives each command."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *arguments: str, cwd: Path
    ) -> None:
        self.orphans: list[psutil.Process] = []
        self._files = (folder / "stdout.txt", folder / "stderr.txt")
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raymaml", *arguments],
                cwd=cwd,
                env=dict(environment),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition that must come true before the command ends."""
        wait_until(lambda: condition() or self.process.poll() is not None, what)
        assert self.process.poll() is None, f"ended before it was {what}: {self.errors}"

    def interrupt(self) -> None:
        """Press Ctrl-C: the signal goes to every process of the terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM to the process itself, as `kill`, Kubernetes and Slurm do."""
        self.process.terminate()

    def kill(self) -> None:
        """End the process itself at once; what it started is left to itself."""
        self.orphans = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()

    def clean_up(self) -> None:
        """End all that is left of it."""
        if self.process.poll() is None:
            self.kill()
        kill_all(self.orphans)

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout=300)

    @property
    def lines(self) -> list[str]:
        """What it has written to stdout."""
        return self._files[0].read_text(encoding="utf-8").splitlines()

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._files[1].read_text(encoding="utf-8")


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kill those of the processes that live."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, and nothing else."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        kill_all(children)
    process.wait()


def start_node(
    output: Path,
    environment: Mapping[str, str],
    *options: str,
    python: Path | str = sys.executable,
    within: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start a node of a Ray cluster, a process with children, and wait until it runs.

    ``within`` is a command that runs another, and comes before it.
    """
    # The agent, which starts jobs, has a fixed port by default: only one node could have it.
    (agent_port,) = free_ports(1)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [
                *(*within, str(python), "-m", "ray.scripts.scripts", "start", "--block"),
                *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
                f"--dashboard-agent-listen-port={agent_port}",
                *options,
            ],
            env=dict(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    # `ray start` writes the address file after "Ray runtime started", and before this line.
    wait_until(
        lambda: "will now block" in output.read_text() or process.poll() is not None,
        "started",
    )
    assert process.poll() is None, output.read_text()
    return process


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
