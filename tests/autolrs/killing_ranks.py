"""Kills a rank of real runs of DDP with SIGKILL and resumes them: `python -m tests.autolrs.killing_ranks FOLDER`.

One process imports torch and forks both ranks of each run, so a trial costs no more than its training.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # by every optimizer, and slow: here, and not again in each fork
from torch import distributed

from tests.autolrs.killing import forked
from tests.autolrs.ranks_job import SEARCH, RanksJob


def train(rank: int, folder: Path, rendezvous: Path) -> None:
    """Train one rank in `folder`, going on with what is there; leave a digest of everything at the end."""
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    job = RanksJob("ddp", rank, 2)
    tuner = job.tuner(run_dir=folder / "run", **SEARCH)
    tuner.run()
    assert tuner.ledger.search.steps > 0, "there is no probe to be killed in"
    found = repr((job.digests(), tuner.schedule.lrs, tuner.losses, tuner.val_losses))
    (folder / f"end-{rank}").write_text(hashlib.sha256(found.encode()).hexdigest())
    tuner.close()
    distributed.barrier()


def started(folder: Path, attempt: int) -> list[int]:
    """Fork both ranks; return their process ids."""
    rendezvous = folder / f"rendezvous-{attempt}"
    return [forked(functools.partial(train, rank, folder, rendezvous), folder) for rank in (0, 1)]


def ended(pids: list[int]) -> list[int]:
    """Wait for both; return their statuses."""
    return [os.waitpid(pid, 0)[1] for pid in pids]


def ends(folder: Path) -> list[str]:
    return [(folder / f"end-{rank}").read_text() for rank in (0, 1)]


def main() -> None:
    """Run as many trials as asked for; print one as JSON per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    whole = arguments.folder / "whole"
    whole.mkdir(parents=True)
    began = time.perf_counter()
    assert ended(started(whole, 0)) == [0, 0]
    seconds = time.perf_counter() - began
    print(f"a run takes {seconds:.1f} s", file=sys.stderr)
    draw = random.Random(arguments.seed)
    trial = 0
    while trial < arguments.moments:
        folder = arguments.folder / f"trial-{trial}"
        folder.mkdir(exist_ok=True)
        pids = started(folder, 0)
        moment, rank = draw.uniform(0.0, seconds), draw.randrange(2)
        time.sleep(moment)
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
        if (folder / f"end-{rank}").exists():  # it had ended: that is no trial
            ended([pids[1 - rank]])
            seconds = min(seconds, moment)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            continue
        os.kill(pids[1 - rank], signal.SIGKILL)  # as torchrun does
        os.waitpid(pids[1 - rank], 0)
        statuses = ended(started(folder, 1))
        same = statuses == [0, 0] and ends(folder) == ends(whole)
        print(json.dumps({"moment_s": moment, "rank": rank, "same": same, "statuses": statuses}), flush=True)
        trial += 1


if __name__ == "__main__":
    main()
