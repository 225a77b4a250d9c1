"""A worker, or its node, that is told to go: the run is saved at the next step boundary.

All workers then end, and the driver goes on with those for which there is room. No collective call
is needed to agree on it: whoever notices asks for a stop as the driver does, by a file.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import ray
from ray.train.v2._internal.execution.callback import WorkerCallback

from raymaml.storage.place import Place
from raymaml.training.run_folder import request_stop

_POLL_SECONDS = 2.0


class StopOnTerminate(WorkerCallback):
    """Has a worker process ask for a stop at SIGTERM; a second one ends it as usual.

    Ray Train calls it in the main thread, where alone signals can be handled.
    """

    def __init__(self, folder: Place) -> None:
        self._folder = folder

    def after_init_train_context(self) -> None:
        """Handle SIGTERM from now on."""
        usual = signal.getsignal(signal.SIGTERM)

        def handle(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, usual)
            request_stop(self._folder)

        signal.signal(signal.SIGTERM, handle)


@contextlib.contextmanager
def stop_on_drain(folder: Place) -> Iterator[None]:
    """During the block, ask for a stop once the node of this process is drained.

    ``ray drain-node``, an autoscaler, and a node whose ``ray start --block`` gets SIGTERM do so.
    """
    node = ray.get_runtime_context().get_node_id()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            if node in ray._private.state.state.get_draining_nodes():
                request_stop(folder)
                return

    watcher = threading.Thread(target=watch, name="stop_on_drain", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
