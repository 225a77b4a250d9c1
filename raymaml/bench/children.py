"""The processes of the contenders, seen from the one that measures."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from typing import Any

import torch


class ChildError(Exception):
    """A contender's process has ended by itself; the text says how."""


class Child:
    """A process of ``raymaml.bench.worker``; it is asked by ``send`` and answers to ``receive``.

    Args:
        library: ``raymaml``, or one of ``contenders.OTHERS``.
        method: how it computes the meta-gradient.
        threads: intra-op threads.
        device: where it computes.
    """

    def __init__(self, library: str, method: str, threads: int, device: torch.device) -> None:
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - `close` closes it
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raymaml.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        spec = {"library": library, "method": method, "threads": threads, "device": str(device)}
        self._write(spec)  # answered when the process is ready

    def send(self, request: str, **arguments: Any) -> None:
        """Let it begin with a method of ``worker.Worker``."""
        self._write({"do": request, **arguments})

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to what was sent first.

        Raises:
            ChildError: there will be none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildError(self._end())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send and receive."""
        self.send(request, **arguments)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of what it has not read
                if stream is not None:
                    stream.close()

    def _write(self, content: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._end()) from None

    def _end(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"was ended by signal {-code}, as the system does when memory runs out"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"ended with exit code {code}"
