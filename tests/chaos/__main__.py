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
from dataclasses import dataclass, replace
from pathlib import Path

from machinery import PATIENCE, ROOT, Command, Nodes, StuckError, find, kill, moments
from runs import Job, differences, weights_of

VICTIMS = {"worker": 8, "node": 4, "controller": 3, "driver": 3, "head": 2}
"""Who is killed, how often in twenty."""
BLIND = 0.5
"""Share of the kills that do not wait until the run goes on again: they hit starts and restarts."""


@dataclass
class Kill:
    """A kill, and the outcome of it."""

    number: int
    seconds: float
    job: str
    victim: str
    progress: int
    outcome: str = "killed again before it went on"

    def __str__(self) -> str:
        where = f"{self.seconds:.0f} s, {self.job} at {self.progress}"
        return f"kill {self.number} ({where}): {self.victim}; {self.outcome}"


class Chaos:
    """A seeded sequence of kills."""

    def __init__(self, folder: Path, seed: int, victims: dict[str, int]) -> None:
        self.folder, self.victims = folder, victims
        self.kills: list[Kill] = []
        self.commands: list[Command] = []
        self._random = random.Random(seed)
        self._started = time.monotonic()
        self._nodes = Nodes(folder / "r", 1, 1, 1)

    def run(self, job: Job, verb: str, most: int) -> None:
        """Run a command until it is done, through as many kills as come its way, up to ``most``."""
        limit = len(self.kills) + most
        while True:
            command = self._nodes.command(*job.command(verb))
            self.commands.append(command)
            while command.running and len(self.kills) < limit:
                if self._moment(command, job, verb):
                    self._strike(command, job, verb)
            code = command.finish()
            if code == 0:
                self._outcome("went on to the end")
                return
            self._outcome(f"ended with {code}; run again")

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
            if command.running:
                self._outcome("went on by itself")
        for _ in moments(self._random.uniform(0, 5)):
            if not command.running:
                break
        return command.running

    def _strike(self, command: Command, job: Job, verb: str) -> None:
        victim = self._random.choices(list(self.victims), list(self.victims.values()))[0]
        choice = self._random.random()
        progress = job.progress(verb)
        if victim == "head":
            self._nodes.kill_head()
            who = "head and all nodes"
        elif victim == "node":
            self._nodes.kill_node(choice)
            who = "node"
        else:
            found = find(self._nodes, victim) if victim != "driver" else []
            if found:
                process = found[int(choice * len(found))]
                kill([process])
                who = f"{victim} {process.pid}"
            else:  # there is none of this kind at this moment, or the driver itself is meant
                command.process.kill()
                command.process.wait()
                who = f"driver {command.process.pid}"
        number, seconds = len(self.kills) + 1, time.monotonic() - self._started
        self.kills.append(Kill(number, seconds, f"{verb} {job.name}", who, progress))
        if victim == "node":
            self._nodes.join()
        if victim == "head":
            began = time.monotonic()
            code = command.finish()
            took = time.monotonic() - began
            self._outcome(f"ended with {code} after {took:.0f} s; run again")
            self._nodes.restart()

    def _outcome(self, outcome: str) -> None:
        if self.kills and self.kills[-1].outcome.startswith("killed again"):
            self.kills[-1].outcome = outcome
            print(self.kills[-1], flush=True)  # noqa: T201


def prepare(job: Job) -> None:
    """Make the data, and the undisturbed run in one process."""
    for verbs, more in (
        (("data", "import"), ()),
        (("data", "sample"), ()),
        (("train",), ("--local",)),
        (("test",), ("--local",)),
    ):
        arguments = [sys.executable, "-m", "raymaml", *job.command(*verbs), *more]
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
    lone = Job(folder=folder, name="lone", steps=given.steps, episodes=given.episodes, workers=1)
    prepare(lone)
    victims = VICTIMS if given.only is None else {given.only: 1}
    chaos = Chaos(folder, given.seed, victims)
    problems, rounds = [], 0
    try:
        while (left := given.kills - len(chaos.kills)) > 0:
            rounds += 1
            job = replace(lone, name=f"round-{rounds}", workers=2 + rounds % 2)
            chaos.run(job, "train", most=(left + 1) // 2)
            chaos.run(job, "test", most=given.kills - len(chaos.kills))
            problems += differences(job, lone)
    except StuckError as error:
        problems.append(str(error))
    finally:
        chaos.close()
    said = [command.errors for command in chaos.commands]
    problems += [f"a command printed a traceback: {text}" for text in said if "Traceback" in text]
    report(chaos, rounds, problems, weights_of(lone)[1])
    return 1 if problems else 0


def report(chaos: Chaos, rounds: int, problems: list[str], digest: str) -> None:
    """Print the verdict; each kill was printed when its outcome was known."""
    counts = Counter(kill.victim.split()[0] for kill in chaos.kills)
    lines = [
        f"{len(chaos.kills)} kills ({', '.join(f'{n} {who}' for who, n in counts.most_common())})"
        f" over {rounds} runs and campaigns",
        f"weights of the undisturbed run: sha256 {digest}",
        *(problems or ["all weights and records are those of the undisturbed run, bit by bit"]),
    ]
    print("\n".join(lines), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
