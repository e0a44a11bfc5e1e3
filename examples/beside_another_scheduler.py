"""Another scheduler beside ours: one that publishes what each step does, as NVIDIA Dynamo's instrumented scheduler.

`InstrumentedScheduler` stands in for it: a subclass of vLLM's scheduler that notes what vLLM decided and hands it on.
Ours goes above it, either by hand, as `Both` here, or by name:

    vllm serve MODEL --scheduler sarathi --tbt-slo-ms 50 --scheduler-cls beside_another_scheduler.InstrumentedScheduler

What it has to do is call `super()`; what it must not do is reorder vLLM's queues.
"""

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sarathi import SarathiMixin


class InstrumentedScheduler(Scheduler):
    """Publishes a record of each forward pass; `published` takes the place of a message bus."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.published: list[dict[str, float]] = []
        self._started_s = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule, and note when the pass begins."""
        self._started_s = time.monotonic()
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a finished pass, and publish it."""
        self.published.append(
            {
                "seconds": time.monotonic() - self._started_s,
                "tokens": scheduler_output.total_num_scheduled_tokens,
                "requests": len(scheduler_output.num_scheduled_tokens),
            }
        )
        return super().update_from_output(scheduler_output, model_runner_output)


class Both(SarathiMixin, InstrumentedScheduler):
    """What `scheduler_cls` names to have both."""
