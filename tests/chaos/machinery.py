"""What is run and what can be killed: the nodes of a cluster, and one command that uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TITLES = {
    "worker": ("ray::RayTrainWorker", "ray::_judge_chunk", "ray::ImplicitFunc"),
    "controller": ("ray::TrainController",),
}
"""How the titles of the processes of Ray begin that do a job."""
MARK = "RAYMAML_CHAOS_NODES"
"""In the environment of every process of the nodes, those that outlive their parents included."""
PATIENCE = 240
"""Seconds without any progress after which something waits for ever."""


class StuckError(Exception):
    """Something did not go on in ``PATIENCE`` seconds."""


class Nodes:
    """A cluster of nodes with so many CPUs, the head first; ``restart`` it after a kill."""

    def __init__(self, folder: Path, cpus: tuple[int, ...] = (1, 1, 1)) -> None:
        self._folder, self._cpus = folder, cpus
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "disabled",  # no token is written into the home
            "PYTHONPATH": str(ROOT),
        }
        self.restart()

    def restart(self) -> None:
        """Start all nodes."""
        with (self._folder / "nodes.txt").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "nodes.py"), *map(str, self._cpus)],
                env={**self.environment, MARK: str(self._folder)},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._read()

    def add(self) -> None:
        """Start another node."""
        self._tell("add")
        self._read()

    def kill_head(self) -> None:
        """Kill every process of every node, the head's first."""
        gcs = self._state["nodes"][0]["gcs_server"]
        doomed = self.processes()
        kill(sorted(doomed, key=lambda process: process.pid != gcs))
        self.close()

    def kill_node(self, choice: float) -> str:
        """Kill the raylet of one of the nodes beside the head: its workers end with it."""
        others = [node["raylet"] for node in self._state["nodes"][1:] if "raylet" in node]
        pid = others[int(choice * len(others))]
        kill([psutil.Process(pid)])
        return f"raylet {pid}"

    def processes(self) -> list[psutil.Process]:
        """Return all processes of all nodes."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def close(self) -> None:
        """End everything."""
        kill(self.processes())
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    @property
    def address(self) -> str:
        """Where the cluster is joined."""
        return str(self._state["address"])

    def _is_mine(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get(MARK) == str(self._folder)
        return False

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._state = json.loads(line)
                return
        raise StuckError(f"the nodes did not start; see {self._folder / 'nodes.txt'}")


class Command:
    """``python -m raymaml ...`` on the cluster."""

    def __init__(self, nodes: Nodes, arguments: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raymaml", *arguments],
                env={**nodes.environment, "RAY_ADDRESS": nodes.address},
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self) -> int:
        """Wait for its end, which must come."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise StuckError(f"the command does not end; see {self._log}") from None


def find(nodes: Nodes, kind: str) -> list[psutil.Process]:
    """Return the processes of one kind (``worker``, ``controller``) that live now."""
    return [process for process in nodes.processes() if title(process).startswith(TITLES[kind])]


def title(process: psutil.Process) -> str:
    """Return how a process calls itself; nothing if it has just ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL those that live."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def moments(seconds: float, pause: float = 0.05) -> Iterator[None]:
    """Yield again and again for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(pause)
