"""The task in a framework on one of two processes; run by torchrun:

`python -m torch.distributed.run ... -m tests.autolrs.integrations.ranks_task FRAMEWORK FOLDER`.

Each rank leaves what it found in FOLDER/rank-N.json.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from tests.autolrs.integrations import task
from tests.autolrs.scripted import script

STOP = 4


def runner(framework: str) -> Callable[..., task.Outcome]:
    """Return the framework's run on two processes."""
    if framework == "transformers":
        from tests.autolrs.integrations import with_trainer

        return lambda *args, **options: with_trainer.run(*args, ddp_backend="gloo", **options)
    if framework == "accelerate":
        from tests.autolrs.integrations import with_accelerate

        return with_accelerate.run
    if framework == "accelerate-fsdp2":
        from tests.autolrs.integrations import with_accelerate

        return lambda *args, **options: with_accelerate.run(*args, shard=True, **options)
    from tests.autolrs.integrations import with_lightning

    return lambda *args, **options: with_lightning.run(
        *args, seedable=False, strategy="ddp", devices=2, **options
    )


def told(outcome: task.Outcome) -> dict[str, Any]:
    digest = hashlib.sha256(b"".join(name.encode() + outcome.bits[name] for name in sorted(outcome.bits)))
    return {
        "bits": digest.hexdigest(),
        "trained_on": outcome.trained_on,
        "rates": outcome.rates,
        "steps": outcome.steps,
        "schedule": outcome.schedule,
        "search_steps": outcome.search_steps,
    }


def main() -> None:
    framework, folder = sys.argv[1], Path(sys.argv[2])
    run = runner(framework)
    found = {"without": told(run(folder / "without", None, replay=task.RATES))}
    with script(task.PROBING):
        found["tuned"] = told(run(folder / "tuned", {}))
        # Lightning's own loader has no position to be resumed at; Accelerate saves no model that it has not prepared.
        if framework in ("transformers", "accelerate"):
            run(folder / "part", {}, stop_at=STOP)
            found["resumed"] = told(run(folder / "part", {}, resume=STOP))
    found["searched"] = told(run(folder / "searched", {"seed": 3, "mode": "once"}, steps=160))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
