"""A Ray that raymaml starts: nobody outside this machine reaches it, nobody without its token."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re

import psutil
import pytest
from helpers_cluster import trained_steps
from machinery import wait_until

pytestmark = pytest.mark.ray

SERVERS = {"dashboard.py", "DashboardAgent", "RuntimeEnvAgent", "gcs_server", "raylet"}
"""What serves a cluster, by a word of its command line. Dashboard and agent take jobs."""
SWEEP = """\
name: s
title: A sweep
config: config.yaml
space: {model.norm: {grid: [transductive]}}
"""
TRIAL = "sweeps/tiny/s/trial-00000"


@pytest.mark.parametrize(
    ("arguments", "run"), [(("train", "config.yaml"), "tiny"), (("sweep", "s.yaml"), TRIAL)]
)
def test_a_cluster_of_our_own_listens_on_loopback_and_asks_for_a_token(
    tmp_path, make_config, start, arguments, run
):
    """A sweep, whose ASHA is Ray's, imports Ray before it starts one."""
    config = make_config("run", "outer.num_steps=5000", "outer.validate_every=2500")
    (tmp_path / "run/s.yaml").write_text(SWEEP, encoding="utf-8")
    command = start(*arguments, cwd=tmp_path / "run")
    command.wait_until(lambda: trained_steps(config.run_dir / run) >= 1, "training")

    found: list[tuple[str, tuple[str, int]]] = []

    def serving() -> bool:
        found[:] = listeners(command.process.pid)
        return all(any(word in line for line, _ in found) for word in SERVERS)

    wait_until(serving, "served by all of its parts")
    open_to_all = {line for line, (ip, _) in found if not loopback(ip)}
    # PyTorch's key-value store, where workers find each other, knows no address to bind to.
    # A worker's title goes on with the method that it is in.
    assert not {line for line in open_to_all if not line.startswith("ray::RayTrainWorker")}

    line = next(line for line, _ in found if "dashboard.py" in line)
    first, tries = map(int, re.search(r"--port=(\d+) --port-retries=(\d+)", line).groups())
    ports = range(first, first + tries + 1)  # the first of them that was free
    (address,) = {address for owner, address in found if owner == line and address[1] in ports}
    assert answer(*address, "/api/jobs/") == http.client.UNAUTHORIZED


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


def loopback(ip: str) -> bool:
    """Whether an address, IPv4 in IPv6 or not, is this machine's own."""
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def answer(ip: str, port: int, path: str) -> int:
    """Return the status that a server answers somebody without a token."""
    connection = http.client.HTTPConnection(ip, port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
