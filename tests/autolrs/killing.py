"""Kills real training runs with SIGKILL and resumes them: `python -m tests.autolrs.killing FOLDER --moments 50`.

One process imports torch and forks a child for each run, so a trial costs no more than its training. A child is
killed from outside after a random time, or kills itself right before or after one of its writes to the disk.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # by every optimizer, and slow: here, and not again in each fork

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Done
from autolrs_plugin.core.journal import Journal
from tests.autolrs.jobs import Job, batch_step, loader

STEPS = 400
TOO_HIGH = 0.1
"""A prior with which the staged plan takes a chunk back, beside its planned stages, in the arithmetic of most CPUs."""

WRITES = ((Journal, "_append"), (os, "fsync"), (os, "replace"), (Path, "unlink"))
"""What the tuner writes its files with: a kill before or after any of these must not matter."""


@dataclass(frozen=True)
class Trial:
    """A run that was killed, and then resumed up to its end.

    Attributes:
        moment: when it was killed.
        kills: how often.
        same: whether it ended on the weights, buffers, optimizer state and schedule of the uninterrupted run.
        repeated: actions that were begun more than once.
        in_order: whether all others were begun once, in the order of the uninterrupted run.
    """

    moment: str
    kills: int
    same: bool
    repeated: int
    in_order: bool


def train(folder: Path, keep: str) -> None:
    """Train in `folder`, going on with what is there; note each action begun, and a digest of everything at the end."""
    random.seed(0)
    np.random.seed(0)
    job = Job("adam", seed=4)
    tuner = AutoLRS(
        job.model,
        job.optimizer,
        max_steps=STEPS,
        lr_range=(1e-5, 1.0),
        train_step=batch_step(job),
        validate=job.validate,
        train_data=loader(job),
        prior=TOO_HIGH,
        seed=4,
        run_dir=folder / "run",
        keep=keep,
        progress=False,
    )
    with open(folder / "begun", "a") as begun:
        while not isinstance(action := tuner.next_action(), Done):
            begun.write(repr(action) + "\n")
            begun.flush()
            tuner.tell(tuner.perform(action))
    assert tuner.ledger.search.steps > 0, "there is no probe to be killed in"
    digest = hashlib.sha256(repr((sorted(job.bits().items()), tuner.schedule.lrs, tuner.losses)).encode())
    (folder / "end").write_text(digest.hexdigest())


def forked(work: Callable[[], None], folder: Path) -> int:
    """Run `work` in a child; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(folder / "output", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            tempfile.tempdir = str(folder)
            work()
            code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed(pid: int) -> bool:
    """Wait for a child; return whether it was killed.

    Raises:
        RuntimeError: it ended by an error of its own.
    """
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise RuntimeError(f"a child ended with status {status}; see 'output' in its folder")
    return False


def kill_at_write(number: int, after: bool) -> None:
    """Make this process kill itself before (or after) its write of that number."""
    counter = itertools.count()

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            here = next(counter) == number
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return write

    for owner, name in WRITES:
        setattr(owner, name, wrapped(getattr(owner, name)))


class Killer:
    """Runs trials in a folder.

    Attributes:
        seconds: what the uninterrupted run took.
        writes: how many writes to the disk it made.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._trials = itertools.count()
        place = self._place()
        started = time.perf_counter()

        def counted() -> None:
            counts = []
            for owner, name in WRITES:
                original = getattr(owner, name)
                setattr(owner, name, lambda *a, f=original, **k: (counts.append(1), f(*a, **k))[1])
            train(place, "host")
            (place / "writes").write_text(str(len(counts)))

        assert not killed(forked(counted, place))
        self.seconds = time.perf_counter() - started
        self.writes = int((place / "writes").read_text())
        self._end = (place / "end").read_text()
        self._begun = (place / "begun").read_text().splitlines()

    def at_random(self, kills: int = 1) -> Trial:
        """Kill a run after a random part of the time that a run takes; it may be the resumed one, too."""
        while True:
            place, keep = self._place(), self._random.choice(["host", "disk"])
            happened, moments = 0, []
            for _ in range(kills):
                moments.append(self._random.uniform(0.0, self.seconds / kills))
                pid = forked(functools.partial(train, place, keep), place)
                time.sleep(moments[-1])
                os.kill(pid, signal.SIGKILL)
                happened += killed(pid)
            if happened:
                return self._resumed(place, keep, f"after {moments} s", happened)
            self.seconds = min(self.seconds, sum(moments))  # the first run was slower: a busier machine

    def at_write(self, number: int, after: bool) -> Trial | None:
        """Kill a run at one of its writes to the disk; None if it has none of that number."""
        place, keep = self._place(), self._random.choice(["host", "disk"])

        def work() -> None:
            kill_at_write(number, after)
            train(place, keep)

        if not killed(forked(work, place)):
            return None
        return self._resumed(place, keep, f"{'after' if after else 'before'} write {number}", 1)

    def _resumed(self, place: Path, keep: str, moment: str, kills: int) -> Trial:
        assert not killed(forked(lambda: train(place, keep), place))
        begun = (place / "begun").read_text().splitlines()
        once = [action for action, _ in itertools.groupby(begun)]
        wanted = [action for action, _ in itertools.groupby(self._begun)]
        trial = Trial(
            moment,
            kills,
            (place / "end").read_text() == self._end,
            len(begun) - len(self._begun),
            once == wanted,
        )
        if trial.same and trial.in_order:
            shutil.rmtree(place)
        return trial

    def _place(self) -> Path:
        place = self._folder / f"trial-{next(self._trials)}"
        place.mkdir(parents=True)
        return place


def main() -> None:
    """Run the trials that the arguments ask for; print one as JSON per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=0, help="kills at random moments, one per run")
    parser.add_argument("--again", type=int, default=0, help="runs that are killed three times")
    parser.add_argument("--writes", type=int, default=0, help="kills at writes, spread over all of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    killer = Killer(arguments.folder, arguments.seed)
    print(f"a run takes {killer.seconds:.1f} s and {killer.writes} writes", file=sys.stderr)
    both = [(number, after) for number in range(killer.writes) for after in (False, True)]
    chosen = [both[i * len(both) // arguments.writes] for i in range(min(arguments.writes, len(both)))]
    trials = itertools.chain(
        (killer.at_random() for _ in range(arguments.moments)),
        (killer.at_random(kills=3) for _ in range(arguments.again)),
        (killer.at_write(number, after) for number, after in chosen),
    )
    for trial in trials:
        if trial is not None:
            print(json.dumps(asdict(trial)), flush=True)


if __name__ == "__main__":
    main()
