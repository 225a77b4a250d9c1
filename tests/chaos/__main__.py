"""Random kills over training runs and campaigns on a cluster of three nodes on this machine.

    python tests/chaos --kills 100 --seed 0

Trains a small run on glyphs and judges it, once undisturbed and without Ray, then again and again
on the cluster, while worker processes, nodes, the train controller, the driver and the head (with
all nodes) are killed by SIGKILL at random moments; whenever the command ends before it is done, the
same command is run again. At the end weights and records (all columns but the seconds) must be
those of the undisturbed run, bit by bit. Prints each kill; exits with 0 only if all is equal,
nothing hung, and no command printed a traceback.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from machinery import PATIENCE, ROOT, Command, Nodes, StuckError, find, kill, moments
from runs import Job, differences

VICTIMS = {"worker": 8, "node": 4, "controller": 3, "driver": 3, "head": 2}
"""Who is killed, how often in twenty."""
BLIND = 0.5
"""Share of the kills that do not wait until the run goes on again: they hit starts and restarts."""


class Chaos:
    """A seeded sequence of kills."""

    def __init__(self, folder: Path, seed: int, victims: dict[str, int]) -> None:
        self.victims = victims
        self.kills: Counter[str] = Counter()
        self.errors: list[str] = []
        """What each command has written to stderr."""
        self._random = random.Random(seed)
        self._started = time.monotonic()
        self._nodes = Nodes(folder / "r", 1, 1, 1)

    def run(self, job: Job, verb: str, most: int) -> None:
        """Run a command until it is done, through as many kills as come its way, up to ``most``."""
        limit, code = self.kills.total() + most, None
        while code != 0:
            command = self._nodes.command(*job.command(verb))
            while command.running and self.kills.total() < limit:
                if self._moment(command, job, verb):
                    self._strike(command)
            code = command.finish()
            self._note(f"{verb} {job.name} ended with {code} at {job.progress(verb)}")
            self.errors.append(command.errors)

    def close(self) -> None:
        """End the cluster."""
        self._nodes.close()

    def _moment(self, command: Command, job: Job, verb: str) -> bool:
        """Wait for the next moment to kill; False if the command ends before."""
        before = job.progress(verb)
        if self._random.random() >= BLIND:
            for _ in moments(PATIENCE, 0.2):
                if not command.running or job.progress(verb) != before:
                    break
            else:
                raise StuckError(f"{verb} {job.name} stands at {before}: {command.errors}")
        for _ in moments(self._random.uniform(0, 5)):
            if not command.running:
                break
        return command.running

    def _strike(self, command: Command) -> None:
        victim = self._random.choices(list(self.victims), list(self.victims.values()))[0]
        choice = self._random.random()
        found = find(self._nodes, victim) if victim in {"worker", "controller"} else []
        if victim == "head":
            self._nodes.kill_head()
        elif victim == "node":
            self._nodes.kill_node(choice)
            self._nodes.join()
        elif found:
            kill([found[int(choice * len(found))]])
        else:  # there is none of this kind at this moment, or the driver itself is meant
            victim = "driver"
            command.process.kill()
            command.process.wait()
        self.kills[victim] += 1
        self._note(f"kill {self.kills.total()}: {victim}")
        if victim == "head":
            command.finish()
            self._nodes.restart()

    def _note(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:.0f} s: {text}", flush=True)  # noqa: T201


def prepare(job: Job) -> None:
    """Make the data, and the undisturbed run in one process."""
    for verbs in (
        ("data", "import"),
        ("data", "sample"),
        ("train", "--local"),
        ("test", "--local"),
    ):
        arguments = [sys.executable, "-m", "raymaml", *job.command(*verbs)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="outer steps of a run")
    parser.add_argument("--episodes", type=int, default=1500, help="test episodes of a campaign")
    parser.add_argument("--only", choices=VICTIMS, help="kill nothing else")
    parser.add_argument("--folder", type=Path, help="an empty one with a short path")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="rmc-", dir="/tmp"))
    size = {"folder": folder, "steps": given.steps, "episodes": given.episodes}
    lone = Job(name="lone", workers=1, **size)
    prepare(lone)
    chaos = Chaos(folder, given.seed, {given.only: 1} if given.only else VICTIMS)
    problems: list[str] = []
    rounds = 0
    try:
        while (left := given.kills - chaos.kills.total()) > 0:
            rounds += 1
            job = Job(name=f"round-{rounds}", workers=2 + rounds % 2, **size)
            chaos.run(job, "train", most=(left + 1) // 2)
            chaos.run(job, "test", most=given.kills - chaos.kills.total())
            problems += differences(job, lone)
    except StuckError as error:
        problems.append(str(error))
    finally:
        chaos.close()
    said = [text for text in chaos.errors if "Traceback" in text]
    problems += [f"a command printed a traceback: {text}" for text in said]
    counts = ", ".join(f"{count} {victim}" for victim, count in chaos.kills.most_common())
    equal = "all weights and records are those of the undisturbed run, bit by bit"
    head = f"{chaos.kills.total()} kills ({counts}) over {rounds} runs and campaigns"
    print("\n".join([head, *(problems or [equal])]), flush=True)  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
