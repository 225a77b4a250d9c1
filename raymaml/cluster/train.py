"""Ray Train: the driver of a training run, and of a trial of a sweep."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ray
import torch
from ray.util.queue import Queue

from raymaml.cluster.explain import explain_failure, is_recoverable, user_error
from raymaml.cluster.runtime import call_in_thread, connected, in_background
from raymaml.cluster.trainer import STARTED, build_trainer
from raymaml.cluster.workers import Crew, Patience, find_room, growing, plan_crew
from raymaml.common.errors import StorageError
from raymaml.common.stopping import on_interrupt, stopped
from raymaml.config.schema import Config
from raymaml.storage.files import exists, make_folder, read_text, remove
from raymaml.storage.place import Place, is_remote
from raymaml.training.checkpoint import saved_step
from raymaml.training.data import verify_images
from raymaml.training.metrics import METRICS_FILE, progress_line
from raymaml.training.run import Run, claim, is_done, open_run, request_stop, withdraw_stop
from raymaml.training.session import Ask
from raymaml.training.state import Validation
from raymaml.training.worker import Echo, conclude

_START_ATTEMPTS = 10
"""Attempts, of about a minute each, to find room for the workers of a trial; Ray tries without
limit by default."""


def train_on_cluster(config: Config, echo: Echo) -> bool:
    """Train with Ray Train's workers, from the last checkpoint on.

    Ctrl-C and SIGTERM stop at the next step boundary.

    Returns:
        Whether all outer steps are done.

    Raises:
        UserError: data, run folder or cluster do not fit the config, or a worker raised one.
    """
    run = open_run(config, torch.device("cpu"))
    with claim(run):
        if not is_done(run.folder, config.steps):
            verify_images(run.data)
            with connected(config.cluster):
                _train(run, echo)
        return conclude(run.folder, config.steps.num_steps, echo)


def _train(run: Run, echo: Echo) -> None:
    """Train with one crew after the other, each as large as the cluster has room for."""
    config, folder = run.config, run.folder
    crew = plan_crew(config.cluster, config.steps.meta_batch_size, ray.cluster_resources())
    asked = threading.Event()

    def stop() -> None:
        asked.set()
        request_stop(folder)

    def announce(workers: int, before: int) -> None:
        if before == 0:
            device = torch.device("cuda" if crew.use_gpu else "cpu")
            echo(run.introduction(device, workers))
        elif workers != before:
            step = max(0, saved_step(folder))
            echo(f"{folder}: {workers} worker(s) from outer step {step} on, {before} before")

    with (
        in_background(partial(_follow, folder, config.steps.num_steps, echo)),
        on_interrupt(stop, config.cluster.grace_seconds),
    ):
        workers, patience = 0, Patience(config.cluster.max_failures)
        while not is_done(folder, config.steps):
            before = workers
            try:
                workers = call_in_thread(partial(find_room, crew, config.cluster, asked, echo))
            except ConnectionError as error:
                if asked.is_set():
                    break
                raise explain_failure(error, folder) from error
            withdraw_stop(folder)
            # a request that came just before ``withdraw_stop`` counts too
            if asked.is_set():
                break
            announce(workers, before)
            failure = _let_train(run, crew, workers, asked)
            if failure is None:
                withdraw_stop(folder)
            if asked.is_set():
                break
            if failure and patience.ends(saved_step(folder)):
                raise explain_failure(failure, folder) from failure
    if saved_step(folder) < 0:
        raise stopped()


def _let_train(run: Run, crew: Crew, workers: int, asked: threading.Event) -> Exception | None:
    """Train with ``workers`` until they end; return the error if workers failed and others may
    succeed. An error that other workers would meet as well is raised.
    """
    folder = run.folder
    started = folder / STARTED
    remove(started)
    with growing(crew, workers, partial(exists, started), lambda: request_stop(folder)):
        try:
            call_in_thread(build_trainer(run.config, workers, crew.use_gpu, start_attempts=1).fit)
        except Exception as error:
            # The signal that asked for a stop may have ended the cluster as well.
            if is_recoverable(error) or (asked.is_set() and user_error(error) is None):
                return error
            raise explain_failure(error, folder) from error
    return None


def _follow(folder: Place, num_steps: int, echo: Echo, over: threading.Event) -> None:
    """Echo a progress line for each metrics row that rank 0 writes until ``over`` is set."""
    path = folder / METRICS_FILE
    seen = set(read_text(path).splitlines()) if exists(path) else set()
    pause = 3.0 if is_remote(folder) else 0.5
    last = False
    while not last:
        last = over.wait(pause)
        try:
            lines = read_text(path).splitlines()
        except (OSError, StorageError):  # not there yet, or away for a moment
            continue
        for line in lines:
            if line not in seen and line.endswith("}"):
                seen.add(line)
                echo(progress_line(json.loads(line), num_steps))


def train_trial(config: Config, num_workers: int, use_gpu: bool, ask: Ask, stop: Place) -> None:
    """Train a trial of a sweep with Ray Train's workers, from the last checkpoint on.

    Args:
        config: the trial's.
        num_workers: number of workers.
        use_gpu: a GPU each.
        ask: this process calls it with each validation, and it returns whether the run goes on. If
            it raises, the workers end before the error leaves this function.
        stop: the folder in which a stop is asked for.

    Raises:
        UserError: the workers met a mistake of the user's, or the cluster failed.
        Exception: Ray Train's own, where workers failed; Ray Tune tries the trial again.
    """
    folder = config.run_folder
    questions, answers = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
    make_folder(folder, "run_dir")
    trainer = build_trainer(
        config,
        num_workers,
        use_gpu,
        start_attempts=_START_ATTEMPTS,
        ask=partial(_ask_by_queue, questions, answers),
        stop=stop,
    )
    with ThreadPoolExecutor(1) as executor:
        fit = executor.submit(call_in_thread, trainer.fit)
        fit.add_done_callback(lambda _: questions.put(None))
        while (validation := questions.get()) is not None:
            goes_on = False
            try:
                goes_on = ask(validation)
            finally:
                answers.put(goes_on)
    if (error := fit.exception()) is not None:
        if not isinstance(error, Exception) or is_recoverable(error):
            raise error
        raise explain_failure(error, folder) from error


def _ask_by_queue(questions: Queue, answers: Queue, validation: Validation) -> bool:
    """Ask the process that started the workers whether the run goes on."""
    questions.put(validation)
    return bool(answers.get())
