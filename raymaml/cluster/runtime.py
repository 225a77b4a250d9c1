"""Joining a Ray cluster, or starting one, quietly; calls that outlive its head; its nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import ray
from packaging.version import Version
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymaml.cluster.internals import own_sessions, token_mode, unprinted_errors
from raymaml.cluster.own_ray import has_token, own_ray, set_where_unset
from raymaml.common.errors import UserError, last_line
from raymaml.common.logs import is_verbose
from raymaml.common.stopping import Terminated
from raymaml.config.schema import ClusterConfig
from raymaml.training.settings import MALLOC_ENVIRONMENT

T = TypeVar("T")
_ENVIRONMENT = {
    # No usage reports, no import hook around print, no progress bars, no change of directory: the
    # workers run where the driver runs, so that relative paths mean the same everywhere.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The controller checks its workers this often, in seconds. Its default of 2 delays each end of
    # a run by as much.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers watch the draining of their own nodes (trainer.py); Ray's own watcher makes the
    # controller wait until the node is gone.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Tune's old output honours verbose=0, its new one prints a banner all the same.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Without it Ray announces, at every start of a worker without GPU, a default that will change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_LEVELS = {
    **dict.fromkeys(("ray", "ray.data", "ray.train"), logging.ERROR),
    # It logs each trial that failed, with a traceback, and then tries it again.
    "ray.tune": logging.CRITICAL,
}
"""The levels of Ray's loggers while raymaml is quiet."""
_CONNECT_TIMEOUT = 10.0
"""Seconds to wait for the address that RAY_ADDRESS names."""
_HEAD_EVERY, _HEAD_MISSES = 5.0, 3
"""Seconds between two looks at the head; after this many without an answer it is given up."""
_calls: set[Future[Any]] = set()
"""The calls of ``call_in_thread`` that have not ended."""
_GOODBYE = 10.0
"""Seconds that the threads of these calls get to end after Ray shuts down."""
NODE_PATIENCE = 60.0
"""Seconds to wait for a node to answer; the start of a process there takes some of them."""


@contextlib.contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine, for the block.

    A program that uses Ray itself keeps its own. After the block environment and loggers are as
    they were before.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or Ray does not start.
    """
    with set_where_unset(environment(cluster)):
        if ray.is_initialized():
            yield
            return
        address = os.environ.get("RAY_ADDRESS")
        with _joined(address) if address else own_ray() as arguments, _quiet():
            try:
                _connect(arguments)
                yield
            finally:
                ray.shutdown()
                wait(_calls, timeout=_GOODBYE)


def environment(cluster: ClusterConfig) -> dict[str, str]:
    """Return the variables that Ray and its workers read."""
    malloc = MALLOC_ENVIRONMENT if cluster.keep_freed_memory else {}
    # This bounds a worker that hangs so that it does not even answer the controller.
    bound = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(cluster.timeout)}
    return _ENVIRONMENT | malloc | bound


@contextlib.contextmanager
def _joined(address: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments of ``ray.init`` that join a cluster, for the block."""
    _require_answer(address)
    # Earlier releases ask for a token only where RAY_AUTH_MODE says so. A process that asks alone
    # would refuse the calls of its cluster, which come without one.
    by_default = Version(ray.__version__) >= Version("2.59")
    with token_mode() if by_default and has_token() else contextlib.nullcontext():
        yield {"address": address}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's messages off the terminal for the block, except errors, unless verbose."""
    if is_verbose():
        yield
        return
    before = {name: logging.getLogger(name).level for name in _LEVELS}
    try:
        _set_levels(_LEVELS)
        with unprinted_errors():
            yield
    finally:
        _set_levels(before)


def _set_levels(levels: Mapping[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _connect(arguments: dict[str, Any]) -> None:
    """Call ``ray.init``; its errors are ``UserError``s."""
    try:
        with _own_sigterm(), own_sessions():
            ray.init(
                log_to_driver=is_verbose(),
                logging_level=logging.INFO if is_verbose() else logging.ERROR,
                configure_logging=True,
                **arguments,
            )
    except Exception as error:  # Ray raises a plain one, too: that it took too long to start
        raise _no_cluster(arguments, error) from None


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our answer to SIGTERM: Ray, when it starts, puts ``sys.exit(15)`` in its place."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _require_answer(address: str) -> None:
    """Check that a process listens at ``host:port``: Ray itself tries for minutes, loudly."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # "auto" and "local" name no port; Ray answers for them at once
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster({"address": address}, error) from None


def _no_cluster(arguments: dict[str, Any], error: Exception) -> UserError:
    address = arguments["address"]
    if address == "local":
        return UserError(
            f"Ray does not start on this machine ({error})",
            remedy=f"look into its logs under {arguments['_temp_dir']}, or give --local to run"
            " without Ray",
        )
    return UserError(
        f"RAY_ADDRESS is {address}: no Ray cluster answers there ({error})",
        remedy="start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine",
    )


@contextlib.contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run ``work(over)`` in a thread during the block, at whose end ``over`` is set."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def call_in_thread(function: Callable[[], T]) -> T:
    """Return ``function()``, called in another thread, so that raymaml and not Ray handles Ctrl-C.

    Raises:
        ConnectionError: the cluster's head has not answered for a while. Ray itself would end the
            process after a minute, without advice.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # raised by the caller
            outcome.set_exception(error)

    _calls.add(outcome)
    outcome.add_done_callback(_calls.discard)
    threading.Thread(target=call, name="call_in_thread", daemon=True).start()
    unanswered = 0
    while not wait([outcome], timeout=_HEAD_EVERY).done:
        unanswered = 0 if _head_answers() else unanswered + 1
        if unanswered == _HEAD_MISSES:
            raise ConnectionError("the head of the cluster does not answer")
    return outcome.result()


def _head_answers() -> bool:
    try:
        _require_answer(ray.get_runtime_context().gcs_address)
    except UserError:
        return False
    return True


def on_every_node(
    function: Callable[[Mapping[str, float]], T],
) -> Iterator[tuple[str, T | UserError]]:
    """Call ``function`` in a process on each node, on all at once.

    Args:
        function: is given what Ray counts on its node: ``CPU``, ``GPU``, and ``memory`` and
            ``object_store_memory`` in bytes.

    Yields:
        The name of each node, and its answer, or an error if there is none.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {}
    for number, node in enumerate((node for node in ray.nodes() if node["Alive"]), start=1):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(scheduling_strategy=there).remote(node["Resources"])
        asked[f"node {number} ({node['NodeManagerAddress']})"] = reference
    for name, reference in asked.items():
        try:
            answer: T | UserError = ray.get(reference, timeout=NODE_PATIENCE)
        except Exception as error:
            answer = UserError(
                f"it cannot run raymaml ({last_line(error)})",
                remedy="install raymaml there, or submit the command as a job (launch/submit.sh),"
                " which brings the code along",
            )
        yield name, answer
