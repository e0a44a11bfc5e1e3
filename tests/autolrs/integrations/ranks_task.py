"""The task in a framework on one of two processes; run by torchrun:

`python -m torch.distributed.run ... -m tests.autolrs.integrations.ranks_task FRAMEWORK... FOLDER`.

Each rank leaves what it found in FOLDER/rank-N.json.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

from tests.autolrs.integrations import task
from tests.autolrs.scripted import script

STOP = {"transformers": 4, "accelerate": 4, "lightning": 6, "lightning-fsdp2": 6}
"""Where a run is stopped: Lightning's own loader can be resumed between two epochs alone.

What is spread by hand is not saved by the Trainer and by Accelerate: they save what they have spread themselves.
"""


def stopped(run: Callable[..., task.Outcome], folder: Path, step: int, *how: Any) -> dict[str, Any]:
    """Return what comes of a run that was stopped and gone on with."""
    run(folder, *how, stop_at=step)
    return told(run(folder, *how, resume=step))


def runner(framework: str) -> Callable[..., task.Outcome]:
    """Return the framework's run on two processes."""
    name, _, sharded = framework.partition("-")
    if name == "transformers":
        from tests.autolrs.integrations import with_trainer

        return partial(with_trainer.run, ddp_backend="gloo", shard=bool(sharded))
    if name == "accelerate":
        from tests.autolrs.integrations import with_accelerate

        return partial(with_accelerate.run, shard=bool(sharded))
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tests.autolrs.integrations import with_lightning

    def run(*args: Any, **options: Any) -> task.Outcome:
        strategy: Any = "ddp"
        if sharded:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            options["kind"] = with_lightning.Sharded
        options |= {"seedable": False, "strategy": strategy, "devices": 2}
        return with_lightning.run(*args, **options)

    return run


def told(outcome: task.Outcome) -> dict[str, Any]:
    digest = hashlib.sha256(b"".join(name.encode() + outcome.bits[name] for name in sorted(outcome.bits)))
    return {
        "bits": digest.hexdigest(),
        "bytes": {name: len(outcome.bits[name]) for name in ("body.weight", "state.0.exp_avg")},
        "trained_on": outcome.trained_on,
        "rates": outcome.rates,
        "steps": outcome.steps,
        "schedule": outcome.schedule,
        "search_steps": outcome.search_steps,
    }


def found_in(framework: str, folder: Path) -> dict[str, Any]:
    """Return what comes of each run in a framework."""
    run = runner(framework)
    found = {"without": told(run(folder / "without", None, replay=task.RATES))}
    with script(task.PROBING):
        found["tuned"] = told(run(folder / "tuned", {}))
        if framework in STOP:
            found["resumed"] = stopped(run, folder / "part", STOP[framework], {})
    if framework in STOP:
        found["resumed_without"] = stopped(run, folder / "plain", STOP[framework], None, task.RATES)
    found["searched"] = told(run(folder / "searched", {"seed": 3, "mode": "once"}, steps=160))
    return found


def main() -> None:
    *frameworks, folder = sys.argv[1:]
    found = {framework: found_in(framework, Path(folder) / framework) for framework in frameworks}
    (Path(folder) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
