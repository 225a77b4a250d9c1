"""The command with a Ray of its own: its signals, processes, sockets, folder, and lines."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
from pathlib import Path

import psutil
import pytest
from helpers_cluster import SETTINGS, not_of_training, trained_steps
from machinery import Command, kill, wait_until

from raymaml.training.checkpoint import list_steps

pytestmark = pytest.mark.ray

SERVERS = {"dashboard.py", "DashboardAgent", "RuntimeEnvAgent", "gcs_server", "raylet"}
"""What serves a cluster, by a word of its command line. Dashboard and agent take jobs."""


@pytest.mark.fault("driver killed")
@pytest.mark.fault("driver interrupted")
def test_a_run_that_is_interrupted_terminated_and_killed_ends_in_the_bits_of_a_lone_one(
    tmp_path, make_config, same_as_alone, start, base
):
    """Ctrl-C, SIGKILL, SIGTERM to all processes: each ends Ray as well."""
    rhythm = "outer.validate_every=50000"
    config = make_config("run", "name=disturbed", "outer.num_steps=100000", rhythm)
    folder, path = config.run_folder, str(tmp_path / "run/config.yaml")

    def started() -> tuple[Command, dict[psutil.Process, tuple[int, int]]]:
        at = max(list_steps(folder), default=0)
        command = start("train", path, RAY_TMPDIR=str(base))
        command.wait_until(lambda: trained_steps(folder) >= at + 10, "ten steps further")
        (own,) = base.glob("raymaml.*")
        found = processes_of(own)
        return command, {each: of for each, of in found.items() if each.pid != command.process.pid}

    def assert_stopped(command: Command) -> None:
        assert command.finish() == 130
        assert command.errors == ""
        assert command.lines[0] == f"{folder}: 1 CPU {SETTINGS}"
        assert command.lines[-1] == (
            f"{folder}: stopped before outer step {list_steps(folder)[-1]} of 100000, and saved;"
            " run the same command to go on"
        )
        assert not_of_training(command.lines[1:-1]) == []
        assert trained_steps(folder) == list_steps(folder)[-1]
        assert list(base.glob("raymaml.*")) == []

    command, processes = started()
    assert {niceness for niceness, _ in processes.values()} == {os.nice(0)}
    assert os.getsid(command.process.pid) not in {session for _, session in processes.values()}
    assert_closed_to_others(command)
    token = tmp_path / "home/.ray/auth_token"
    assert token.stat().st_mode & 0o077 == 0
    command.interrupt()
    assert_stopped(command)

    command, killed = started()
    command.kill()
    (left,) = base.glob("raymaml.*")

    command, processes = started()
    wait_until(lambda: not any(each.is_running() for each in killed), "rid of the killed ones")
    wait_until(lambda: not left.exists(), "rid of their folder")
    command.process.terminate()  # and all others, as a service manager does
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    code = command.finish()
    assert code == 143, command.errors  # Ray may end the driver before it says where it stopped
    last = [*command.lines, *command.errors.splitlines()][-1]
    assert re.fullmatch(r".*(saved|kept)[;:] run the same command to go on", last)
    wait_until(lambda: not any(each.is_running() for each in processes), "rid of all")
    kill(killed)
    same_as_alone(config, rhythm, f"outer.num_steps={list_steps(folder)[-1]}")


def processes_of(folder: Path) -> dict[psutil.Process, tuple[int, int]]:
    """Return niceness and session of each process that has a file below ``folder`` open."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has just ended
            if any(file.path.startswith(f"{folder}/") for file in process.open_files()):
                found[process] = process.nice(), os.getsid(process.pid)
    return found


def assert_closed_to_others(command: Command) -> None:
    """Nobody outside this machine reaches the Ray of a command, nobody without its token."""
    found: list[tuple[str, tuple[str, int]]] = []

    def serving() -> bool:
        found[:] = listeners(command.process.pid)
        return all(any(word in line for line, _ in found) for word in SERVERS)

    command.wait_until(serving, "served by all of its parts")
    open_to_all = {line for line, (ip, _) in found if not is_loopback(ip)}
    # PyTorch's key-value store, where workers find each other, knows no address to bind to.
    # A worker's title goes on with the method that it is in.
    assert not {line for line in open_to_all if not line.startswith("ray::RayTrainWorker")}

    line = next(line for line, _ in found if "dashboard.py" in line)
    first, tries = map(int, re.search(r"--port=(\d+) --port-retries=(\d+)", line).groups())
    ports = range(first, first + tries + 1)  # the first of them that was free
    (address,) = {address for owner, address in found if owner == line and address[1] in ports}
    connection = http.client.HTTPConnection(*address, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/api/jobs/")
        assert connection.getresponse().status == http.client.UNAUTHORIZED


def listeners(pid: int) -> list[tuple[str, tuple[str, int]]]:
    """Return (command line, (ip, port)) of all listening sockets of a process's descendants."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            line = " ".join(process.cmdline()).strip()
            found += [
                (line, tuple(connection.laddr))
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def is_loopback(ip: str) -> bool:
    """Return whether an address, IPv4 in IPv6 or not, is this machine's own."""
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.fault("cluster absent")
def test_a_cluster_that_does_not_answer_is_one_message(tmp_path, make_config, start):
    make_config("run")
    with socket.socket() as reserved:  # bound and not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        train = start("train", str(tmp_path / "run/config.yaml"), RAY_ADDRESS=address)
        doctor = start("doctor", "--json", RAY_ADDRESS=address)
        assert (train.finish(), doctor.finish()) == (2, 1)

    problem = f"RAY_ADDRESS is {address}: no Ray cluster answers there "
    remedy = "start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine"
    assert train.lines == []
    message = rf"raymaml: {problem}\(.*refused\); {remedy}\n"
    assert re.fullmatch(message, train.errors)
    assert doctor.errors == ""
    findings = json.loads("\n".join(doctor.lines))["findings"]
    (finding,) = [each for each in findings if each["what"] == "cluster"]
    assert finding["status"] == "fail"
    assert finding["found"].startswith(problem)
    assert finding["remedy"] == remedy
