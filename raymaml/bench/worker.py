"""The process of one contender: it does what the lines on its standard input say.

The first line is who it is, each further one a request, all of them JSON; each answer is a line of
JSON on standard output, which nothing else may write to. It ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raymaml.bench.cases import PHASES, Phase, made_up_episode, smallest
from raymaml.bench.contenders import build_contender
from raymaml.bench.probes import AtenCalls, peak_mib, release
from raymaml.config.load import check_config
from raymaml.config.schema import Config
from raymaml.training.process import prepare_process

Answer = dict[str, Any]


class Worker:
    """One contender, and the configuration that it is at.

    raymaml gets the settings of its training processes, others the defaults.
    """

    def __init__(self, library: str, method: str, threads: int, device: str) -> None:
        self._library, self._method = library, method
        self._device = torch.device(device)
        torch.set_num_threads(threads)
        self._take(smallest(), torch.float32)
        for phase in PHASES:  # libraries load parts of themselves at the first use
            self._run(phase)

    def begin(self, config: dict[str, Any], dtype: Literal["float32", "float64"]) -> Answer:
        """Build the model of ``config``, its weights and images in ``dtype``."""
        checked = check_config(config, "bench")
        if self._library == "raymaml":
            prepare_process(checked.cluster, self._device)
        self._take(checked, getattr(torch, dtype))
        return {}

    def outcome(self, phase: Phase, path: str | None) -> Answer:
        """Do an episode: ``peak_mib``. Write the gradient, [P], or logits, [N*Q * N], to ``path``.

        To be asked before ``seconds``, since what a process keeps for later counts as well.
        """
        results: list[Tensor] = []
        peak = peak_mib(lambda: results.append(self._run(phase)), self._device)
        if path is not None:
            np.save(Path(path), results[0].cpu().numpy())
        release(self._device)
        return {"peak_mib": peak}

    def aten_calls(self, phase: Phase) -> Answer:
        """Do an episode, counting: ``count``."""
        with AtenCalls() as calls:
            self._run(phase)
        return {"count": calls.count}

    def seconds(self, phase: Phase, episodes: int, warm_up: bool) -> Answer:
        """Do so many episodes on the clock, maybe after one that is not: ``seconds``."""
        if warm_up:
            self._run(phase)
        self._wait()
        start = time.perf_counter()
        for _ in range(episodes):
            self._run(phase)
        self._wait()
        seconds = time.perf_counter() - start
        release(self._device)
        return {"seconds": seconds}

    def _take(self, config: Config, dtype: torch.dtype) -> None:
        if dtype is torch.float64:  # to compare: there is nothing to autocast
            exact = config.cluster.model_copy(update={"precision": "float32"})
            config = config.model_copy(update={"cluster": exact})
        self._contender = build_contender(self._library, self._method, config, self._device)
        self._contender.model.to(dtype)
        self._episodes = {
            phase: made_up_episode(config, phase, self._device, dtype) for phase in PHASES
        }

    def _run(self, phase: Phase) -> Tensor:
        """Do an episode and return its gradient, [P], or logits."""
        torch.manual_seed(0)  # for dropout
        episode = self._episodes[phase]
        if phase == "evaluation":
            return self._contender.predict(episode).reshape(-1)
        grads = self._contender.meta_gradient(episode)
        names = [name for name, _ in self._contender.model.named_parameters()]
        return torch.cat([grads[name].reshape(-1) for name in names])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where libraries may print
    worker = Worker(**json.loads(sys.stdin.readline()))
    print("{}", file=answers, flush=True)
    requests: dict[str, Callable[..., Answer]] = {
        "begin": worker.begin,
        "outcome": worker.outcome,
        "aten_calls": worker.aten_calls,
        "seconds": worker.seconds,
    }
    for line in sys.stdin:
        request = json.loads(line)
        answer = requests[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
