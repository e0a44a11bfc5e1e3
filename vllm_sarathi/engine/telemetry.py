"""What the scheduler did, made visible (a log line, metrics, the step trace), and what it learnt, kept.

The scheduler hands over each finished step, which costs it one append. A thread of our own does the rest once a
second: a slow disk or a long line costs no stream a gap.
"""

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.figures import (
    DEFAULT_CLASS,
    ClassGaps,
    Figures,
    FinishedStep,
    KeptGaps,
    Queues,
    TokenWait,
    kept_gaps,
)
from vllm_sarathi.core.headroom import claim, headroom_tokens_per_s, mean_claim
from vllm_sarathi.core.slo_watch import SloWatches
from vllm_sarathi.core.step_trace import StepSummary, TracedStep, summarise_steps
from vllm_sarathi.core.types import ONE_STAGE, Pipeline, StepRecord
from vllm_sarathi.engine.memory import CalibrationMemory, open_memory
from vllm_sarathi.engine.metrics import FiguresFiles, figures_folder
from vllm_sarathi.engine.trace_file import StepTraceFile
from vllm_sarathi.engine.vllm.internals import engine_rank, logger
from vllm_sarathi.engine.vllm.protocols import VllmConfig

TICK_S = 1.0
WINDOW_S = 10.0
"""The interval of log lines while there is work; the figures that are medians follow it, the others come every tick."""

MOST_PENDING = 100_000
LINES_AT_ONCE = 16
"""Lines after which the thread lets go of the interpreter: the engine's loop waits for no more than that."""

SAVE_EVERY_S = 10.0
"""What was learnt is saved at this interval while there is work, and at the end: vLLM's server kills its engine's
process the moment after it has asked it to end, so that the end alone would keep nothing."""

JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class _Noted:
    """A finished step as it was handed over."""

    at_s: float
    record: StepRecord
    slo_s: float | None
    running: int
    waiting: int
    gaps: Iterable[ClassGaps]
    first_tokens: tuple[TokenWait, ...]
    resumed: tuple[TokenWait, ...]
    batch_tokens: int
    trace: StepTraceFile | None

    def finished(self) -> FinishedStep:
        record, slo_s, gaps = self.record, self.slo_s, tuple(self.gaps)
        if gaps:  # the step was allowed what the tightest of those in it allows
            slo_s = min([each.slo_s for each in gaps if each.slo_s is not None], default=None)
        traced = TracedStep(
            self.at_s,
            record.shape,
            record.token_budget,
            record.reason,
            record.predicted_s,
            record.measured_s,
            slo_s,
            self.running,
            self.waiting,
        )
        return FinishedStep(
            traced,
            gaps or (ClassGaps(DEFAULT_CLASS, record.shape.decodes, self.slo_s),),
            self.first_tokens,
            self.resumed,
            self.batch_tokens,
        )


class Telemetry:
    """Collects finished steps and tells of them.

    Args:
        controller: whose steps they are.
        rank: which of several data-parallel engines this is.
        pipeline: the stages of the device.
        log: whether to log a line and leave metrics, as vLLM does unless told `--disable-log-stats`.
        trace: the step trace, if there is to be one.
        memory: where the step-time model is kept for the next start, if it is to be.
        faults: tells how many errors of ours there have been.
        queues: returns the requests that run and wait; called from the telemetry thread.
        most_tokens: the most tokens that the engine takes in one step.
        wall_clock: seconds since the epoch.

    Attributes:
        trace: as the argument; another may be put in its place, or None.
    """

    def __init__(
        self,
        controller: StepController,
        *,
        rank: int = 0,
        pipeline: Pipeline = ONE_STAGE,
        log: bool = True,
        trace: StepTraceFile | None = None,
        memory: CalibrationMemory | None = None,
        faults: Callable[[], int] = lambda: 0,
        queues: Callable[[], Queues] = lambda: Queues(0, {}),
        most_tokens: int = 0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.watches = SloWatches(controller.model, pipeline, controller.config.slo_classes)
        classes = controller.config.slo_classes
        listed = () if classes is None else classes.classes
        self.figures = Figures(
            [each.name for each in listed] or (DEFAULT_CLASS,), {each.name for each in listed if each.batch}
        )
        self._controller = controller
        self._pipeline = pipeline
        self._log = log
        self.trace = trace
        self._memory = memory
        self._next_save_s = time.monotonic() + SAVE_EVERY_S
        self._learnt: dict[str, Any] | None = None
        self._wall_clock = wall_clock
        self._pending: deque[_Noted] = deque(maxlen=MOST_PENDING)
        self._counted: deque[tuple[str, str]] = deque()
        self._window: list[FinishedStep] = []
        self._window_since_s = time.monotonic()
        self._faults = faults
        self._queues = queues
        self._most_tokens = most_tokens
        self._files = _figures_files(rank) if log else None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_tick, args=(weakref.ref(self), self._stop), name="sarathi-telemetry", daemon=True
        )
        self._thread.start()

    def note(
        self,
        record: StepRecord,
        running: int,
        waiting: int,
        gaps: Iterable[ClassGaps] = (),
        first_tokens: tuple[TokenWait, ...] = (),
        resumed: tuple[TokenWait, ...] = (),
        batch_tokens: int = 0,
    ) -> None:
        """Take in a finished step; called from the engine's loop.

        Args:
            record: what came of it.
            running, waiting: as in TracedStep.
            gaps: the gaps that it ended, where there are classes; else all are of one class, under the one SLO. They
                are looked at later, in the thread.
            first_tokens, resumed, batch_tokens: as in FinishedStep.
        """
        slo_s = self._controller.tbt_slo_s
        if slo_s is not None:
            slo_s = self._pipeline.step_s(slo_s)
        at_s = self._wall_clock()
        figures = (gaps, first_tokens, resumed, batch_tokens)
        self._pending.append(_Noted(at_s, record, slo_s, running, waiting, *figures, self.trace))
        if self._memory is not None and time.monotonic() >= self._next_save_s:
            self._next_save_s = time.monotonic() + SAVE_EVERY_S
            # Taken here, in the thread that changes it, and written by the other.
            self._learnt = self._memory.snapshot(self._controller.model)

    def reconfigured(self) -> None:
        """Judge the SLO anew: it is another one."""
        controller = self._controller
        self.watches = SloWatches(controller.model, self._pipeline, controller.config.slo_classes)

    def count(self, name: str, slo_class: str = DEFAULT_CLASS) -> None:
        """Raise a counter by class, `relegated_requests` or `refused_requests`; called from the engine's loop."""
        self._counted.append((name, slo_class))

    def flush(self) -> None:
        """Write out what has come in, and sum it up when it is time; called from the thread."""
        lines: dict[StepTraceFile, list[str]] = {}  # a trace has the steps from its start to its end
        steps: list[FinishedStep] = []
        count = 0
        while self._pending:
            count += 1
            noted = self._pending.popleft()
            if not (math.isfinite(noted.record.measured_s) and noted.record.measured_s > 0):
                continue  # a broken clock
            step = noted.finished()
            if self._log:
                steps.append(step)
            if noted.trace is not None:
                lines.setdefault(noted.trace, []).append(step.traced.to_line())
            if count % LINES_AT_ONCE == 0:
                time.sleep(0)
        for trace, of_trace in lines.items():
            trace.write(of_trace)
        if self._memory is not None and self._learnt is not None:
            learnt, self._learnt = self._learnt, None
            self._memory.save(learnt)
        if self._log:
            self._window += steps
            self._show(steps)
            if time.monotonic() - self._window_since_s >= WINDOW_S:
                self.tell()

    def _show(self, steps: list[FinishedStep]) -> None:
        """Renew the figures that are counted, and leave all where /metrics finds them."""
        figures, config = self.figures, self._controller.config
        figures.take(steps)
        while self._counted:
            figures.count(*self._counted.popleft())
        figures.counters["faults", ""] = float(self._faults())
        figures.look(self._queues())
        figures.set("tbt_slo_seconds", self._controller.tbt_slo_s)
        figures.set("ttft_slo_seconds", None if config.ttft_slo_ms is None else config.ttft_slo_ms / 1e3)
        if self._files is not None:
            self._files.renew(figures.samples(), self._wall_clock())

    def tell(self) -> None:
        """Log what the window came to, if there was work in it, and begin a new one."""
        steps, self._window = self._window, []
        taken_s = time.monotonic() - self._window_since_s
        self._window_since_s = time.monotonic()
        self.figures.set("headroom_tokens_per_second", self._headroom(steps, max(taken_s, 1e-3)))
        self._sum_up(steps)
        self._show([])

    def _sum_up(self, steps: list[FinishedStep]) -> None:
        """Log what steps came to, and renew the figures that are medians: of no steps there are none."""
        summary = summarise_steps([step.traced for step in steps]) if steps else None
        if summary is not None:
            kept, by_class = kept_gaps(steps, self._pipeline), self._controller.config.slo_classes is not None
            logger.info("%s", log_line(summary, kept, self._pipeline, by_class))
        for advice in self.watches.look(steps):
            logger.warning("%s", advice)
        if summary is not None or "slo_unattainable" in {name for name, _ in self.figures.gauges}:
            for name, unattainable in self.watches.unattainable.items():
                self.figures.set("slo_unattainable", int(unattainable), name)
        self.figures.set("decode_step_seconds", None if summary is None else summary.decode_step_s)
        self.figures.set("token_budget", None if summary is None else summary.budget_tokens)
        self.figures.set("prediction_error_ratio", None if summary is None else summary.error_p50)

    def _headroom(self, steps: list[FinishedStep], taken_s: float) -> float | None:
        """Return the headroom beside the decodes of the window; None where no SLO or no device is known."""
        slo_s, model = self._step_slo_s(steps), self._controller.model
        if slo_s is None or not model.ready or not self._most_tokens:
            return None
        decodes, context, read = mean_claim([claim(step, self.figures.batch) for step in steps])
        return headroom_tokens_per_s(model, decodes, context, slo_s, self._most_tokens, read / taken_s)

    def _step_slo_s(self, steps: list[FinishedStep]) -> float | None:
        """Return how long a step may take, seconds: for the tightest of those that generated, else the tightest class.

        None without an SLO.
        """
        classes, slo_s = self._controller.config.slo_classes, self._controller.tbt_slo_s
        if classes is not None:
            own = [
                gaps.slo_s for step in steps for gaps in step.gaps if gaps.slo_s is not None and gaps.decodes
            ]
            if own:
                return min(own)
            slo_s = min(classes.least("tbt_slo_s"), math.inf if slo_s is None else slo_s)
        return None if slo_s is None or slo_s == math.inf else self._pipeline.step_s(slo_s)

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
            if self._window:
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


def log_line(
    summary: StepSummary, kept: Sequence[KeptGaps], pipeline: Pipeline = ONE_STAGE, by_class: bool = False
) -> str:
    """Return a summary as a line of the log, and how the SLOs of each class were kept.

    Where there are no classes, one SLO is named: the last one in force.
    """
    parts = [f"Sarathi: {summary.running} running, {summary.waiting} waiting, {summary.steps} steps"]
    if summary.budget_tokens is not None:
        parts.append(f"budget P50 {summary.budget_tokens} tokens")
    last_s = None if summary.slo_s is None else pipeline.token_s(summary.slo_s)
    for own in kept if by_class or last_s is not None else ():
        slo_s, whose = (own.slo_s, f"{own.slo_class} ") if by_class else (last_s, "")
        slo = "their SLOs" if slo_s is None else f"{slo_s * 1e3:.4g} ms"
        parts.append(f"{whose}{own.kept / own.gaps:.1%} of {own.gaps} gaps within {slo}")
    if summary.error_p50 is not None and summary.error_p90 is not None:
        parts.append(f"prediction error P50 {summary.error_p50:.1%}, P90 {summary.error_p90:.1%}")
    return ", ".join(parts)


def aim_of(config: SarathiConfig) -> str:
    """Return what the scheduler goes by, for the log of a server that starts."""
    if config.slo_classes is not None:
        return f"SLOs of {len(config.slo_classes.classes)} classes, prompts by their SLOs"
    order = f", prefill order {config.prefill_order}"
    if config.token_budget is not None:
        return f"a budget of {config.token_budget} tokens" + order
    if config.scheduler != "sarathi":
        return f"the policy {config.scheduler}" + order
    slo = (
        f"{config.tbt_slo_ms:g} ms"
        if config.tbt_slo_ms is not None
        else f"{config.tbt_slo_factor:g} decode steps"
    )
    return f"at most {slo} between two tokens" + order


def open_telemetry(
    vllm_config: VllmConfig,
    config: SarathiConfig,
    controller: StepController,
    log: bool,
    faults: Callable[[], int],
    queues: Callable[[], Queues],
    most_tokens: int,
) -> Telemetry | None:
    """Return the telemetry of an engine, or None where nobody wants to see anything."""
    rank = engine_rank(vllm_config)
    trace = None
    if config.step_trace is not None:
        path = Path(config.step_trace)
        if rank or vllm_config.parallel_config.data_parallel_size > 1:
            path = path.with_stem(f"{path.stem}.{rank}")
        trace = StepTraceFile(path)
    memory = open_memory(vllm_config, config, controller.model)
    if log:
        logger.info("Sarathi is on: %s.", aim_of(config))
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
        queues=queues,
        most_tokens=most_tokens,
    )


def _figures_files(rank: int) -> FiguresFiles | None:
    """Return where this engine leaves its figures; None where nobody looks for them, or not on this machine."""
    folder = figures_folder()
    if folder is None:
        return None
    if not folder.is_dir():
        logger.warning(
            "The figures of engine %d are not at /metrics: the API server that started it is on another machine. "
            "They are in this engine's log.",
            rank,
        )
        return None
    return FiguresFiles(folder, rank, os.getpid())
