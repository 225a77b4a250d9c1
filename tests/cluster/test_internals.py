"""Ray without its private parts: nothing is lost but comfort."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymaml.cluster import internals

WITHOUT = """
import importlib, sys

usual = importlib.import_module

def without(name, package=None):
    if sys._getframe(1).f_globals["__name__"] == "raymaml.cluster.internals":
        raise ImportError(name)
    return usual(name, package)

importlib.import_module = without
"""
"""Python reads it at its start, in the driver and in all processes of Ray."""


def test_private_names_are_there_in_this_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would lose comfort without a word."""
    from ray._private import ray_constants, services, worker
    from ray._raylet import AuthenticationMode, get_authentication_mode

    usual = services.ConsolePopen, worker.print_to_stdstream
    with internals.own_sessions(), internals.unprinted_errors(), internals.on_loopback():
        assert not ray_constants.ENABLE_RAY_CLUSTER
        assert services.ConsolePopen is not usual[0]
        assert worker.print_to_stdstream({"lines": ["a node is gone"]}, ignore_prefix=False) is None
    assert (services.ConsolePopen, worker.print_to_stdstream) == usual
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    modes = []
    with internals.token_mode():
        modes.append(get_authentication_mode())
    assert [*modes, get_authentication_mode()] == [
        AuthenticationMode.TOKEN,
        AuthenticationMode.DISABLED,
    ]
    state = importlib.import_module("ray._private.state").state
    assert callable(state.get_draining_nodes)
    called: list[None] = []
    (callback,) = internals.at_worker_start(lambda: called.append(None))
    callback.after_init_train_context()
    assert len(called) == 1
    context = SimpleNamespace()
    internals.slow_down(context, 0.0)
    (pause,) = context.custom_execution_callback_classes
    pause().on_execution_step(None)


def test_without_them_each_function_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert internals._private("ray._private.services", "NoSuchName") is None
    assert internals._private("ray._private.no_such_module", "Name") is None
    monkeypatch.setattr(internals, "_private", lambda _module, _name: None)
    before = dict(os.environ)
    with internals.own_sessions(), internals.unprinted_errors(), internals.token_mode():
        assert os.environ == before
    assert not internals.is_draining("node")
    assert internals.at_worker_start(lambda: None) == []
    context = SimpleNamespace()
    internals.slow_down(context, 1.0)
    assert vars(context) == {}


@pytest.mark.ray
def test_a_run_without_them_ends_in_the_same_bits(tmp_path, make_config, same_as_alone, start):
    config = make_config("run", "name=without", "cluster.num_workers=2")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    path = f"{tmp_path}:{root}"
    probe = (
        "import raymaml.cluster.internals as i; print(i._private('ray._private.state', 'state'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", probe], env={"PYTHONPATH": path}, capture_output=True, check=True
    )
    assert shown.stdout.split() == [b"None"]  # or this test would prove nothing

    command = start("train", str(tmp_path / "run/config.yaml"), PYTHONPATH=path)

    assert command.finish() == 0, command.errors
    same_as_alone(config)
