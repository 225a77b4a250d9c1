"""Joining a Ray cluster, or starting one, quietly."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from raymaml.cluster.own_ray import has_token, own_ray, own_sessions
from raymaml.common.errors import UserError
from raymaml.common.logs import is_verbose
from raymaml.common.stopping import Terminated
from raymaml.config.schema import ClusterConfig, Config
from raymaml.training.crew import Crew, elastic_crew
from raymaml.training.process import MALLOC_ENVIRONMENT
from raymaml.training.session import require_precision

T = TypeVar("T")
_ENVIRONMENT = {
    # No usage reports, no import hook around print, no progress bars, no change of directory: the
    # workers run where the driver runs, so that relative paths mean the same everywhere.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The controller looks after its workers this often, s. Its default of 2 delays each end of a
    # run by as much.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers watch the draining of their own nodes (leaving.py); Ray's way to tell them would have
    # the controller wait until the node is gone.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Tune's old output honours verbose=0, its new one prints a banner all the same.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Without it Ray announces, at every start of a worker without GPU, a default that will change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CONNECT_TIMEOUT = 10.0
"""Seconds to wait for the address that RAY_ADDRESS names."""
_HEAD_EVERY, _HEAD_MISSES = 5.0, 3
"""Seconds between looks at the head, and how many in a row it must not answer to be given up."""
_calls: set[Future[Any]] = set()
"""What ``call_in_thread`` waits for, or has given up to wait for."""
_GOODBYE = 10.0
"""Seconds for the threads of such calls to end, once Ray has."""
WORKER_CPUS = 0.9
"""Logical CPUs of one CPU training worker..."""
READER_CPUS = 0.1
"""...and of the Ray Data task that reads for it: together one core. A cluster whose CPUs are all
held by workers would leave its reading tasks waiting for ever."""


@contextlib.contextmanager
def connected(cluster: ClusterConfig, num_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine for the block.

    One that is started has ``num_cpus`` logical CPUs; None: as many as there are cores.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    prepare_environment(cluster)
    if address and has_token():  # Ray sends it to an address in this mode alone
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():  # inside a program that uses Ray itself
        yield
        return
    require_answer(address)
    joined = contextlib.nullcontext({"address": address})
    with joined if address else own_ray(num_cpus) as arguments:
        try:
            _connect(arguments)
            yield
        finally:
            ray.shutdown()
            wait(_calls, timeout=_GOODBYE)


def _connect(arguments: dict[str, Any]) -> None:
    """Call ``ray.init``.

    Raises:
        UserError: Ray does not start, or does not answer.
    """
    import ray

    try:
        with _own_sigterm(), own_sessions():
            ray.init(
                log_to_driver=is_verbose(),
                logging_level=logging.INFO if is_verbose() else logging.ERROR,
                configure_logging=True,
                **arguments,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise _no_cluster(arguments, error) from None
    _silence()


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


def require_answer(address: str | None) -> None:
    """Check that somebody listens at ``host:port``: Ray itself tries for minutes, loudly.

    Raises:
        UserError: nobody does.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", "local", or none: Ray knows at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster({"address": address}, error) from None


def _no_cluster(arguments: dict[str, Any], error: Exception) -> UserError:
    address = arguments["address"]
    if address == "local":
        return UserError(
            f"Ray does not start on this machine ({error}); look into its logs under"
            f" {arguments['_temp_dir']}, or give --local to run without Ray"
        )
    return UserError(
        f"RAY_ADDRESS is {address}: no Ray cluster answers there ({error}); start one with"
        " `ray start --head`, or unset RAY_ADDRESS to run on this machine"
    )


def call_in_thread(function: Callable[[], T]) -> T:
    """Return ``function()``, called in another thread: so Ctrl-C is ours and not Ray's.

    Raises:
        ConnectionError: the cluster's head has not answered for a while. Ray itself would end the
            process after a minute, without a word on what to do.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # the caller sees it, whatever it is
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
    import ray

    try:
        require_answer(ray.get_runtime_context().gcs_address)
    except UserError:
        return False
    return True


def prepare_environment(cluster: ClusterConfig) -> None:
    """Set what Ray and its workers read from the environment, where the user has not set it."""
    malloc = MALLOC_ENVIRONMENT if cluster.keep_freed_memory else {}
    # A worker that hangs, and does not even say so to the controller.
    bound = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(cluster.timeout)}
    for name, value in (_ENVIRONMENT | malloc | bound).items():
        os.environ.setdefault(name, value)


def _silence() -> None:
    """Keep other libraries' chatter off the terminal, unless it is asked for: errors only.

    That a node is gone Ray prints all the same; the workers that are left are told of by us.
    """
    if is_verbose():
        return
    import ray

    ray._private.worker.print_to_stdstream = lambda *_data, **_options: None
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # which tells of each trial that failed, with a traceback, and then tries it again
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def plan_workers(cluster: ClusterConfig, resources: dict[str, float]) -> tuple[int, bool]:
    """Return the number of training workers and whether they use GPUs.

    Args:
        cluster: what the config asks for.
        resources: total resources of the Ray cluster, by name.

    Raises:
        UserError: the cluster is smaller than what is asked for, or has not the precision.
    """
    use_gpu = wants_gpu(cluster, resources)
    slots, kind = count_slots(resources, use_gpu)
    if slots == 0:
        raise UserError(
            f"cluster.device is {cluster.device} but the Ray cluster has no {kind}; set"
            " cluster.device to what there is, or auto"
        )
    if cluster.num_workers == "auto":
        return slots, use_gpu
    if cluster.num_workers > slots:
        raise UserError(
            f"cluster.num_workers is {cluster.num_workers} but the Ray cluster has {slots} {kind};"
            f" use at most {slots}, or auto"
        )
    return cluster.num_workers, use_gpu


def plan_crew(config: Config, resources: dict[str, float]) -> Crew:
    """Return how many training workers there may be.

    Raises:
        UserError: the number is fixed, and the cluster is too small for it; or it has not the
            precision.
    """
    elastic = elastic_crew(config, wants_gpu(config.cluster, resources))
    if elastic is not None:
        return elastic
    count, use_gpu = plan_workers(config.cluster, resources)
    return Crew(minimum=count, maximum=count, use_gpu=use_gpu)


def wants_gpu(cluster: ClusterConfig, resources: dict[str, float]) -> bool:
    """Tell whether workers use GPUs.

    Raises:
        UserError: they would not have the precision.
    """
    has_gpu = resources.get("GPU", 0) >= 1
    use_gpu = cluster.device == "cuda" or (cluster.device == "auto" and has_gpu)
    require_precision(cluster, use_gpu)
    return use_gpu


def count_slots(resources: dict[str, float], use_gpu: bool) -> tuple[int, str]:
    """Return how many workers fit into ``resources``, and what limits them."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if not use_gpu:
        return cpus, "CPU cores"
    # a worker on a GPU takes a CPU core as well
    return (cpus, "CPU cores for its GPUs") if cpus < gpus else (gpus, "GPUs")


def worker_resources(use_gpu: bool) -> dict[str, float]:
    """Return what one training worker reserves."""
    return {"GPU": 1, "CPU": WORKER_CPUS} if use_gpu else {"CPU": WORKER_CPUS}


def cluster_resources() -> dict[str, float]:
    """Return the total resources of the cluster."""
    import ray

    resources: dict[str, Any] = ray.cluster_resources()
    return resources
