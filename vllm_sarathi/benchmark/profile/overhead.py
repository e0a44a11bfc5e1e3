"""What our scheduler adds to vLLM's own `schedule()`, measured in the real scheduler without a model.

The scene: requests that run, of which one is still reading a long prompt, and requests that wait. Each step is
timed twice in the same call: all of `schedule()`, and the part of it inside the parent's. The difference is ours. The
figures for /metrics are gathered meanwhile, as in a server.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.engine.offline import (
    build_output,
    build_request,
    build_scheduler,
    config_folder,
    engine_config,
)

WARM_UP_STEPS = 50
MEASURED_STEPS = 400


@dataclass(frozen=True)
class Overhead:
    """Medians over the measured steps, in microseconds."""

    running: int
    waiting: int
    parent_us: float
    ours_us: float
    ratio: float


class _ParentTimes:
    """Seconds spent inside vLLM's own methods, and inside all of ours around them, in the current step."""

    def __init__(self) -> None:
        self.parent_s = 0.0
        self.all_s = 0.0


def _timed_class(times: _ParentTimes) -> type[Any]:
    """Return SarathiScheduler with a stopwatch around it and another between it and its parent."""
    # Imported here: it needs vLLM, and the rest of this module does not.
    from vllm_sarathi.engine.scheduler import SarathiScheduler
    from vllm_sarathi.engine.vllm.contract import scheduler_classes

    parent = scheduler_classes()[0]

    class TimedParent(parent):  # type: ignore[misc, valid-type]  # known at run time alone
        """vLLM's scheduler with a stopwatch."""

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            output = super().schedule(*args, **kwargs)
            times.parent_s += time.perf_counter() - start_s
            return output

    class Timed(SarathiScheduler, TimedParent):
        """Ours with a stopwatch; the timed parent is the next class that its `super()` finds."""

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            output = super().schedule(*args, **kwargs)
            times.all_s += time.perf_counter() - start_s
            return output

    return Timed


def measure_overhead(
    config: SarathiConfig, running: int, waiting: int, steps: int = MEASURED_STEPS
) -> Overhead:
    """Measure our share of `schedule()` with running and waiting requests."""
    times = _ParentTimes()
    max_tokens = steps + WARM_UP_STEPS + running + 16
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_config(
            config_folder(Path(folder)),
            max_model_len=32768,
            max_num_seqs=running,
            max_num_batched_tokens=2048,
            block_size=16,
            enable_prefix_caching=False,
            **config.engine_args(),
        )
        scheduler = build_scheduler(
            engine, num_blocks=200_000, scheduler_cls=_timed_class(times), log_stats=True
        )
    for i in range(running - 1):
        scheduler.add_request(
            build_request(f"running-{i}", range(8 + i % 32), max_tokens, arrival_s=float(i))
        )
    while len(scheduler.running) < running - 1 or any(r.is_prefill_chunk for r in scheduler.running):
        _step(scheduler)
    scheduler.add_request(build_request("long", range(32_000), 8, arrival_s=1e6))
    for i in range(waiting):
        scheduler.add_request(build_request(f"waiting-{i}", range(500), 8, arrival_s=1e6 + i))
    parent_s, ours_s = [], []
    for i in range(WARM_UP_STEPS + steps):
        times.parent_s = times.all_s = 0.0
        _step(scheduler)
        if i >= WARM_UP_STEPS:
            parent_s.append(times.parent_s)
            ours_s.append(times.all_s - times.parent_s)
    parent_us, ours_us = statistics.median(parent_s) * 1e6, statistics.median(ours_s) * 1e6
    return Overhead(running, waiting, parent_us, ours_us, ours_us / parent_us)


def _step(scheduler: Any) -> None:
    output = scheduler.schedule()
    sampled = {
        name: [] if scheduler.requests[name].is_prefill_chunk else [7] for name in output.num_scheduled_tokens
    }
    scheduler.update_from_output(output, build_output(sampled))


def overhead_table(result: Overhead) -> Table:
    """Return the result as a table of one row."""
    table = Table(title="schedule(), medians per step")
    for name in ("running", "waiting", "vLLM's own, us", "ours, us", "ratio"):
        table.add_column(name, justify="right")
    table.add_row(
        str(result.running),
        str(result.waiting),
        f"{result.parent_us:.0f}",
        f"{result.ours_us:.1f}",
        f"{result.ratio:.2%}",
    )
    return table
