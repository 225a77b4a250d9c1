"""The private parts of Ray that raymaml uses: each behind one function that works without it.

A release of Ray may rename or remove them. Then the function does nothing, and a run loses the
comfort that its docstring names, not its result.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

_AUTH_MODE = "RAY_AUTH_MODE"


def own_sessions() -> contextlib.AbstractContextManager[None]:
    """Give each process that Ray starts in the block a session of its own.

    A signal to the process group of the driver, such as that of ``timeout`` or of a scheduler, then
    reaches the driver alone, which stops Ray itself. The kernel still ends them with the driver.
    Without it such a signal ends Ray too: the run continues from its last checkpoint.
    """

    def leading_sessions(usual: Any) -> Any:
        return partial(usual, start_new_session=True)

    return _replaced("ray._private.services", "ConsolePopen", leading_sessions)


def on_loopback() -> contextlib.AbstractContextManager[None]:
    """Make 127.0.0.1 the address of a Ray that starts in the block, as on macOS and Windows.

    Ray decides it by a variable that it reads when it is imported, so its answer is changed.
    Without it Ray has this machine's address in the network.
    """
    return _replaced("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", lambda _usual: False)


def unprinted_errors() -> contextlib.AbstractContextManager[None]:
    """Keep Ray from printing during the block that a node or a worker is gone: raymaml reports it.

    Without it these lines appear among those of the run.
    """
    return _replaced("ray._private.worker", "print_to_stdstream", lambda _usual: _print_nothing)


@contextlib.contextmanager
def token_mode() -> Iterator[None]:
    """Make Ray send its token in the block, and ask for it where it starts, unless the user chose.

    Ray reads RAY_AUTH_MODE when it is imported, so it has to read it again. Without it Ray keeps
    its default: since 2.59, to ask for a token where a program starts it.
    """
    config = _private("ray._raylet", "Config")
    if config is None or _AUTH_MODE in os.environ:
        yield
        return
    os.environ[_AUTH_MODE] = "token"
    config.initialize("")
    try:
        yield
    finally:
        del os.environ[_AUTH_MODE]
        config.initialize("")


def is_draining(node: str) -> bool:
    """Return whether the node with this id is to leave the cluster.

    Without it a worker notices nothing before its node is gone: the run continues from its last
    checkpoint.
    """
    state = _private("ray._private.state", "state")
    return hasattr(state, "get_draining_nodes") and node in state.get_draining_nodes()


def at_worker_start(action: Callable[[], None]) -> list[Any]:
    """Return callbacks that have Ray Train call ``action`` in the main thread of each worker.

    Python lets no other thread handle signals, and the training function runs in another one.
    Without it there are none: SIGTERM ends a worker at once.
    """
    base = _private("ray.train.v2._internal.execution.callback", "WorkerCallback")
    if base is None:
        return []

    class AtWorkerStart(base):  # type: ignore[misc,valid-type]
        def after_init_train_context(self) -> None:
            action()

    return [AtWorkerStart()]


def slow_down(context: Any, pause: float) -> None:
    """Make Ray Data's executor pause, for ``pause`` seconds, between its rounds.

    Whenever the tasks are ahead of the reader, as is the rule in training, it looks for something
    to do again and again without a pause, in a thread of the worker that learns. Measured with Ray
    2.60, and what a run costs without it: a third of a core in each of 2 workers.
    """
    base = _private("ray.data._internal.execution.execution_callback", "ExecutionCallback")
    if base is None:
        return

    class Pause(base):  # type: ignore[misc,valid-type]
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(pause)

    context.custom_execution_callback_classes = [Pause]


def _private(module: str, name: str) -> Any:
    """Return what Ray has under a private name; None where it has nothing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


@contextlib.contextmanager
def _replaced(module: str, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Put something else in the place of a private name for the block."""
    usual = _private(module, name)
    if usual is None:
        yield
        return
    home = importlib.import_module(module)
    setattr(home, name, replacement(usual))
    try:
        yield
    finally:
        setattr(home, name, usual)


def _print_nothing(*_data: Any, **_options: Any) -> None:
    pass
