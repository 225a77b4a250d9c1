"""The network between the nodes of a cluster, measured by processes on each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import combinations
from typing import Any

from raymaml.common.errors import last_line
from raymaml.doctor.finding import Finding, fail, ok, warn

PATIENCE = 60.0
"""Seconds to wait for a node to answer; starting a process there takes some of them."""
ALL_PAIRS = 8
"""Up to so many nodes every pair is measured, of more each node and the next."""
ROUND_TRIPS, PAYLOAD = 50, 32 << 20
"""Calls, and bytes of an object, between two nodes."""
SLOW_TRIP, SLOW_TRANSFER, SKEWED = 0.02, 50e6, 2.0
"""Seconds of a round trip, bytes a second, and seconds between clocks that are worth a warning."""
_PORTS = "open all ports between the nodes, in both directions (firewall, security group)"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that lives."""

    id: str
    name: str
    """Its address, and a number where several share one."""
    address: str
    resources: dict[str, float]

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True, kw_only=True)
class Trip:
    """What lies between two nodes."""

    seconds: float
    """Median of the round trips."""
    bytes_per_second: float
    skew: float
    """Seconds that the other's clock is ahead."""


class Peer:
    """A process on a node, which others call."""

    def now(self) -> float:
        """Return the time of this node's clock."""
        return time.time()

    def payload(self) -> list[Any]:
        """Put an object into this node's store, and return where it is."""
        import numpy as np
        import ray

        return [ray.put(np.zeros(PAYLOAD, dtype=np.uint8))]

    def measure(self, other: Any) -> Trip:
        """Measure the way to another peer and back."""
        import ray

        trips = []
        for _ in range(ROUND_TRIPS):
            sent = time.time()
            answered = ray.get(other.now.remote())
            received = time.time()
            # of the quickest trip, half is the best guess of when the other looked at its clock
            trips.append((received - sent, answered - (sent + received) / 2))
        (reference,) = ray.get(other.payload.remote())
        started = time.perf_counter()
        ray.get(reference)
        took = time.perf_counter() - started
        return Trip(
            seconds=statistics.median(trip for trip, _ in trips),
            bytes_per_second=PAYLOAD / took,
            skew=min(trips)[1],
        )

    def free_port(self) -> int:
        """Return a port of this node that nobody listens on."""
        import socket

        with closing(socket.socket()) as found:
            found.bind(("", 0))
            port: int = found.getsockname()[1]
        return port

    def meet(self, address: str, port: int, rank: int, world_size: int) -> int:
        """Add up ones over a process group of gloo, as training workers on CPU add gradients."""
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=PATIENCE / 2),
        )
        try:
            count = torch.ones(1)
            dist.all_reduce(count)
        finally:
            dist.destroy_process_group()
        return int(count.item())


def living_nodes() -> list[Node]:
    """Return the nodes of the cluster that live, that of this process first."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeID"]))
    addresses = [node["NodeManagerAddress"] for node in alive]
    return [
        Node(
            id=node["NodeID"],
            name=f"{address}#{number}" if addresses.count(address) > 1 else address,
            address=address,
            resources=node["Resources"],
        )
        for number, (node, address) in enumerate(zip(alive, addresses, strict=True), start=1)
    ]


def on(node: Node) -> Any:
    """Return the scheduling strategy that puts a task on ``node`` and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def network_findings(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Measure between nodes, and let processes on all of them meet as training workers do."""
    import ray

    # of a lone node two processes, which can meet at least
    places = [*nodes, nodes[0]] if len(nodes) == 1 else list(nodes)
    peer = ray.remote(num_cpus=0)(Peer)
    peers = [peer.options(scheduling_strategy=on(node)).remote() for node in places]
    try:
        for one, other in pairs(len(nodes)):
            what = f"network {nodes[one].name} - {nodes[other].name}"
            trip = _answer(what, partial(peers[one].measure.remote, peers[other]))
            yield trip if isinstance(trip, Finding) else trip_finding(what, trip)
        yield _meeting(places, peers)
    finally:
        for each in peers:
            ray.kill(each)


def pairs(count: int) -> list[tuple[int, int]]:
    """Return the pairs of ``count`` nodes that are measured."""
    if count <= ALL_PAIRS:
        return list(combinations(range(count), 2))
    return [(node, (node + 1) % count) for node in range(count)]


def trip_finding(what: str, trip: Trip) -> Finding:
    """Judge what lies between two nodes."""
    found = (
        f"round trip {1000 * trip.seconds:.1f} ms, {trip.bytes_per_second / 1e6:.0f} MB/s,"
        f" clocks {abs(trip.skew):.3f} s apart"
    )
    remedies = []
    if trip.seconds > SLOW_TRIP or trip.bytes_per_second < SLOW_TRANSFER:
        remedies.append("bring the nodes nearer to each other: workers wait for each outer step")
    if abs(trip.skew) > SKEWED:
        remedies.append("set the clocks by NTP: times in logs and reports are of different nodes")
    return warn(what, found, "; ".join(remedies)) if remedies else ok(what, found)


def _meeting(places: Sequence[Node], peers: Sequence[Any]) -> Finding:
    """Let all peers meet at the first one's address, as training workers do."""
    what = "process group (gloo)"
    port = _answer(what, peers[0].free_port.remote)
    if isinstance(port, Finding):
        return port
    address, count = places[0].address, len(peers)
    found = _answer(
        what,
        lambda: [each.meet.remote(address, port, rank, count) for rank, each in enumerate(peers)],
        remedy=f"{_PORTS}; where nodes have several networks, start Ray with GLOO_SOCKET_IFNAME",
    )
    if isinstance(found, Finding):
        return found
    return ok(what, f"{count} processes on {len({node.id for node in places})} node(s) met")


def _answer(what: str, ask: Callable[[], Any], remedy: str = _PORTS) -> Any:
    """Return what peers answer, or a finding that they do not."""
    import ray

    try:
        return ray.get(ask(), timeout=PATIENCE)
    except ray.exceptions.GetTimeoutError:
        return fail(what, f"no answer within {PATIENCE:g} s", remedy)
    except Exception as error:
        return fail(what, last_line(error), remedy)
