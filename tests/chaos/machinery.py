"""What is run and what can be killed: the nodes of a cluster, and commands that use them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
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
PATIENCE = 300
"""Seconds without any progress after which something waits for ever."""
STARTED = "will now block"
"""Printed by `ray start` once it has written the address file."""


class StuckError(Exception):
    """Something did not go on in ``PATIENCE`` seconds."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Look again and again; fail after a generous while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: still not {what}"
        time.sleep(0.1)


class Nodes:
    """A Ray cluster on this machine; each node is ``ray start --block`` with its children.

    Args:
        folder: has a path short enough for Ray's sockets.
        cpus: of each node, the head first.
        environment: of the nodes, and of commands that join them; asks for no token by default.
        python: runs the nodes.
    """

    def __init__(
        self,
        folder: Path,
        *cpus: int,
        environment: Mapping[str, str] | None = None,
        python: Path | str = sys.executable,
    ) -> None:
        self._folder, self._cpus, self._python = folder, cpus, python
        own = fresh_shell(folder, RAY_AUTH_MODE="disabled", PYTHONPATH=str(ROOT))
        # by default Ray's workers give way to all else on this machine: to other tests, for minutes
        self.environment = {**(environment or own), "RAY_worker_niceness": "0"}
        folder.mkdir(parents=True, exist_ok=True)
        self.restart()

    def restart(self) -> None:
        """Start all nodes."""
        self._nodes: list[subprocess.Popen[bytes]] = []
        port, dashboard_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        head, *others = self._cpus
        ports = (f"--port={port}", f"--dashboard-port={dashboard_port}")
        self._start("--head", *ports, f"--num-cpus={head}", f"--temp-dir={self._folder / 'ray'}")
        for cpus in others:
            self.join(cpus=cpus)

    def join(
        self, *, cpus: int = 1, gpus: int = 0, within: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Add a node; its GPUs are in name only. ``within`` runs the command behind it."""
        options = f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"
        return self._start(*options, within=within)

    def command(self, *arguments: str, **more: str) -> Command:
        """Start ``raymaml`` on the cluster."""
        environment = {**self.environment, "RAY_ADDRESS": self.address, **more}
        return Command(self._folder, environment, *arguments)

    def kill_head(self) -> None:
        """Kill every process of every node, the head's first."""
        kill(sorted(self.processes(), key=lambda process: "gcs_server" not in title(process)))
        self.close()

    def kill_node(self, choice: float = 0) -> None:
        """Kill one of the nodes beside the head, with all that runs there."""
        others = [node for node in self._nodes[1:] if node.poll() is None]
        kill_with_children(others[int(choice * len(others))])

    def processes(self) -> list[psutil.Process]:
        """Return all processes of all nodes."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def close(self) -> None:
        """End everything."""
        kill(self.processes())
        for node in self._nodes:
            node.wait()

    def _is_mine(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get(MARK) == str(self._folder)
        return False

    def _start(self, *options: str, within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a node, a process with children, and wait until it runs."""
        output = self._folder / f"node-{len(self._nodes)}.txt"
        # The agent, which starts jobs, has a fixed port by default: only one node could have it.
        (agent_port,) = free_ports(1)
        with output.open("wb") as file:
            process = subprocess.Popen(
                [
                    *(*within, str(self._python), "-m", "ray.scripts.scripts", "start", "--block"),
                    *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
                    *(f"--dashboard-agent-listen-port={agent_port}", *options),
                    "--object-store-memory=100000000",
                ],
                env={**self.environment, MARK: str(self._folder)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._nodes.append(process)
        wait_until(lambda: STARTED in output.read_text() or process.poll() is not None, "started")
        assert process.poll() is None, output.read_text()
        return process


def fresh_shell(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a user's fresh shell, where nothing says where a cluster may be."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    return {**inherited, "HOME": str(home), "PATH": path, **more}


class Command:
    """``python -m raymaml ...`` with a session of its own, as a terminal gives each command.

    What it writes is kept in ``folder``, in files of its own.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *arguments: str, cwd: Path = ROOT
    ) -> None:
        self.orphans: list[psutil.Process] = []
        name = f"command-{len(list(folder.glob('command-*.out')))}"
        self._files = (folder / f"{name}.out", folder / f"{name}.err")
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raymaml", *arguments],
                cwd=cwd,
                env=dict(environment),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition that must come true before the command ends."""
        wait_until(lambda: condition() or not self.running, what)
        assert self.running, f"ended before it was {what}: {self.errors}"

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
        if self.running:
            self.kill()
        kill(self.orphans)

    def finish(self) -> int:
        """Wait for the end, which must come, and return the exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise StuckError(f"the command does not end: {self.errors}") from None

    @property
    def lines(self) -> list[str]:
        """What it has written to stdout."""
        return self._files[0].read_text(encoding="utf-8").splitlines()

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._files[1].read_text(encoding="utf-8", errors="replace")


def find(nodes: Nodes, kind: str) -> list[psutil.Process]:
    """Return the processes of one kind (``worker``, ``controller``) that live now."""
    return [process for process in nodes.processes() if title(process).startswith(TITLES[kind])]


def title(process: psutil.Process) -> str:
    """Return how a process calls itself; nothing if it has just ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL those that live."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, and nothing else."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        kill(children)
    process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def moments(seconds: float, pause: float = 0.05) -> Iterator[None]:
    """Yield again and again for a number of seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(pause)
