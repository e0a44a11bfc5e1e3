"""A step that fails in a probe, on one rank of two and on both: `python -m tests.autolrs.failing_ranks FOLDER`.

One process imports torch and forks the ranks. Prints, as JSON, what each rank of each case ended with.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by every optimizer, and slow: here, and not again in each fork
from torch import distributed

from autolrs_plugin.training import distributed as ours
from tests.autolrs.jobs import outside
from tests.autolrs.killing import forked
from tests.autolrs.ranks_job import SCRIPTED, RanksJob
from tests.autolrs.scripted import script

IN_A_PROBE = 4
"""Two real steps, and two of the first probe."""


def fail(rank: int, folder: Path, failing: tuple[int, ...]) -> None:
    """Train up to the error; leave what it was, and whether the weights are those of the real step."""
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    ours.PATIENCE_S = 3.0
    job = RanksJob("ddp", rank, 2)
    weights = outside([])
    step = job.step

    def failing_step(batch: Any) -> torch.Tensor:
        if len(job.seen) == 2 and not weights.held:
            weights.held.append(job.digests())
        if len(job.seen) == IN_A_PROBE and rank in failing:
            raise ValueError("out of memory.")
        return step(batch)

    job.step = failing_step  # type: ignore[method-assign]
    with script():
        tuner = job.tuner(**SCRIPTED)
    try:
        tuner.run()
    except Exception as error:
        found = [type(error).__name__, str(error), job.digests() == weights.held[0]]
        (folder / f"end-{rank}").write_text(json.dumps(found))


def main() -> None:
    """Try both cases."""
    torch.set_num_threads(1)  # threads do not survive a fork
    found = {}
    for name, failing in (("one", (1,)), ("both", (0, 1))):
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        pids = [forked(functools.partial(fail, rank, folder, failing), folder) for rank in (0, 1)]
        for pid in pids:
            os.waitpid(pid, 0)
        found[name] = [json.loads((folder / f"end-{rank}").read_text()) for rank in (0, 1)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
