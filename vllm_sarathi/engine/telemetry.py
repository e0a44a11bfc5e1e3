"""What the scheduler did, made visible (a log line, metrics, the step trace), and what it learnt, kept.

The scheduler hands over each finished step, which costs it one append. A thread of our own does the rest once a
second: a slow disk or a long line costs no stream a gap.
"""

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.controller import Controller
from vllm_sarathi.core.slo_watch import SloWatch
from vllm_sarathi.core.step_trace import StepSummary, TracedStep, summarise
from vllm_sarathi.core.types import ONE_STAGE, Pipeline, StepRecord
from vllm_sarathi.engine.memory import CalibrationMemory, open_memory
from vllm_sarathi.engine.metrics import leave_figures
from vllm_sarathi.engine.trace_file import StepTraceFile
from vllm_sarathi.engine.vllm.internals import logger

TICK_S = 1.0
WINDOW_S = 10.0
"""A log line so often, while there is work; the metrics follow it."""

MOST_PENDING = 100_000
LINES_AT_ONCE = 16
"""The thread lets go of the interpreter after so many lines: the engine's loop waits for no more than that."""

SAVE_EVERY_S = 10.0
"""What was learnt is kept so often, while there is work, and at the end: vLLM's server kills its engine's process the
moment after it has asked it to end, so that the end alone would keep nothing."""

JOIN_S = 5.0


class Telemetry:
    """Collects finished steps and tells of them.

    Args:
        controller: whose steps they are.
        rank: which of several data-parallel engines this is.
        pipeline: the stages of the device.
        log: whether to log a line and leave metrics, as vLLM does unless told `--disable-log-stats`.
        trace: the step trace, if there is to be one.
        memory: where the step model is kept for the next start, if it is to be.
        faults: tells how many errors of ours there have been.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        rank: int = 0,
        pipeline: Pipeline = ONE_STAGE,
        log: bool = True,
        trace: StepTraceFile | None = None,
        memory: CalibrationMemory | None = None,
        faults: Callable[[], int] = lambda: 0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.watch = SloWatch(controller.model, pipeline)
        self._controller = controller
        self._rank = rank
        self._pipeline = pipeline
        self._log = log
        self._trace = trace
        self._memory = memory
        self._next_save_s = time.monotonic() + SAVE_EVERY_S
        self._learnt: dict[str, Any] | None = None
        self._wall_clock = wall_clock
        self._pending: deque[tuple[float, StepRecord, float | None, int, int]] = deque(maxlen=MOST_PENDING)
        self._window: list[TracedStep] = []
        self._window_since_s = time.monotonic()
        self._faults = faults
        self._totals = {"steps": 0, "gaps": 0, "gaps_kept": 0}
        self._figures: dict[str, float | None] = {"faults": 0, **self._totals}
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_tick, args=(weakref.ref(self), self._stop), name="sarathi-telemetry", daemon=True
        )
        self._thread.start()

    def note(self, record: StepRecord, running: int, waiting: int) -> None:
        """Take in a finished step; called from the engine's loop."""
        slo_s = self._controller.tbt_slo_s
        if slo_s is not None:
            slo_s = self._pipeline.step_s(slo_s)
        self._pending.append((self._wall_clock(), record, slo_s, running, waiting))
        if self._memory is not None and time.monotonic() >= self._next_save_s:
            self._next_save_s = time.monotonic() + SAVE_EVERY_S
            # Taken here, in the thread that changes it, and written by the other.
            self._learnt = self._memory.snapshot(self._controller.model)

    def flush(self) -> None:
        """Write out what has come in, and sum it up when it is time; called from the thread."""
        lines: list[str] = []
        while self._pending:
            at_s, record, slo_s, running, waiting = self._pending.popleft()
            if not (math.isfinite(record.measured_s) and record.measured_s > 0):
                continue  # a broken clock
            step = TracedStep(
                at_s,
                record.shape,
                record.token_budget,
                record.reason,
                record.predicted_s,
                record.measured_s,
                slo_s,
                running,
                waiting,
            )
            if self._log:
                self._window.append(step)
            if self._trace is not None:
                lines.append(step.to_line())
            if len(lines) % LINES_AT_ONCE == 0:
                time.sleep(0)
        if self._trace is not None:
            self._trace.write(lines)
        if self._memory is not None and self._learnt is not None:
            learnt, self._learnt = self._learnt, None
            self._memory.save(learnt)
        if self._log and time.monotonic() - self._window_since_s >= WINDOW_S:
            self.tell()

    def tell(self) -> None:
        """Log what the window came to, if there was work in it, and begin a new one."""
        steps, self._window = self._window, []
        self._window_since_s = time.monotonic()
        faults = self._faults()
        if not steps and faults == self._figures["faults"]:
            return
        if steps:
            self._sum_up(steps)
        self._figures["faults"] = faults
        with suppress(OSError):  # a full disk, or the process that reads them is gone: the log has them
            leave_figures(self._rank, self._figures)

    def _sum_up(self, steps: list[TracedStep]) -> None:
        """Log what steps came to, and renew the figures."""
        summary = summarise(steps)
        logger.info("%s", log_line(summary, self._pipeline))
        if advice := self.watch.look(steps):
            logger.warning("%s", advice)
        for name in self._totals:
            self._totals[name] += getattr(summary, name)
        self._figures |= {
            "tbt_slo_seconds": None if summary.slo_s is None else self._pipeline.token_s(summary.slo_s),
            "promise_unkeepable": int(self.watch.unkeepable),
            "decode_step_seconds": summary.decode_step_s,
            "token_budget": summary.budget_tokens,
            "prediction_error_ratio": summary.error_p50,
            **self._totals,
        }

    def close(self) -> None:
        """Write out what is left and end the thread; calling it again does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(JOIN_S)
        if not self._thread.is_alive():
            if self._memory is not None:
                self._learnt = self._memory.snapshot(self._controller.model)
            self.flush()
            self.tell()


def _tick(telemetry_ref: "weakref.ref[Telemetry]", stop: threading.Event) -> None:
    """Flush once a second until told to stop, or until nobody holds the telemetry any more."""
    while not stop.wait(TICK_S):
        telemetry = telemetry_ref()
        if telemetry is None:
            return
        try:
            telemetry.flush()
        except Exception:
            logger.exception("Telemetry failed; the scheduler goes on without it.")
            return
        del telemetry


def log_line(summary: StepSummary, pipeline: Pipeline = ONE_STAGE) -> str:
    """Return a summary as a line of the log."""
    parts = [f"Sarathi: {summary.running} running, {summary.waiting} waiting, {summary.steps} steps"]
    if summary.budget_tokens is not None:
        parts.append(f"budget P50 {summary.budget_tokens} tokens")
    if summary.slo_s is not None and summary.attainment is not None:
        slo_ms = pipeline.token_s(summary.slo_s) * 1e3
        parts.append(f"{summary.attainment:.1%} of {summary.gaps} gaps within {slo_ms:.4g} ms")
    if summary.error_p50 is not None and summary.error_p90 is not None:
        parts.append(f"prediction error P50 {summary.error_p50:.1%}, P90 {summary.error_p90:.1%}")
    return ", ".join(parts)


def open_telemetry(
    vllm_config: Any,
    config: SarathiConfig,
    controller: Controller,
    log: bool,
    faults: Callable[[], int],
) -> Telemetry | None:
    """Return the telemetry of an engine, or None where nobody wants to see anything."""
    parallel = vllm_config.parallel_config
    rank = parallel.data_parallel_rank
    trace = None
    if config.step_trace is not None:
        path = Path(config.step_trace)
        if parallel.data_parallel_size > 1:
            path = path.with_stem(f"{path.stem}.{rank}")
        trace = StepTraceFile(path)
    memory = open_memory(vllm_config, config, controller.model)
    if not log and trace is None and memory is None:
        return None
    return Telemetry(
        controller,
        rank=rank,
        pipeline=controller.pipeline,
        log=log,
        trace=trace,
        memory=memory,
        faults=faults,
    )
