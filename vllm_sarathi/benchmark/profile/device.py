"""Fills the calibration ahead of time: a short grid of real steps on the real engine, then a test on others.

Each level keeps some streams decoding, and reads random prompts beside them in chunks of the sizes of the grid. The
steps held out afterwards have sizes of their own; nothing is learnt from them before all are predicted.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.step_trace import quantile, relative_error
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Reason, StepPlan, StepRecord, StepView
from vllm_sarathi.engine.inprocess import InProcessEngine, engine_in_process

LEVELS = (1, 4, 16, 64, 256)
"""Streams that decode at a time."""

CHUNKS = (0, 0, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
"""Prefill tokens of a step of the grid; the decodes' own time is wanted twice."""

HELD_OUT_LEVELS = (2, 8)
HELD_OUT_STEPS = 24
CONTEXTS = (16, 64, 256)
PROMPT_TOKENS = 2048
MOST_STEP_S = 2.0
"""A chunk is left out where the model, so far, predicts more."""

GRID_S = 90.0
"""No level begins later than this."""


class GridPolicy:
    """Gives each step the next chunk of a list; while the list is empty, as much as the engine takes."""

    waiting_seen = 1
    needs_decode_views = False
    needs_tbt_slos = False
    learns = True
    longest_step_s = math.inf
    tbt_slo_s = None
    decode_step_s = 0.0

    def __init__(self, model: StepTimeModel) -> None:
        self.chunks: deque[int] = deque()
        self.learning = True
        self.records: list[StepRecord] = []
        self._model = model

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        tokens = view.max_tokens
        if self.chunks:
            tokens = min(tokens, max(1, view.decode_tokens + self.chunks.popleft()))
        return turn.plan(view, tokens, Reason.PROFILE)

    def observe(self, record: StepRecord) -> None:
        """Note a finished step, and learn from it unless it is held out."""
        self.records.append(record)
        if self.learning:
            self._model.observe(record.shape, record.measured_s)

    def arrived(self, request_id: str, most_answer_tokens: int) -> None:
        """The lengths of requests do not matter here."""

    def ended(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Nor do they here."""


@dataclass(frozen=True)
class Profile:
    """What came of it.

    Attributes:
        learnt: steps that the model was learnt from.
        held_out: steps that it predicted without having learnt from them.
    """

    learnt: tuple[StepRecord, ...]
    held_out: tuple[StepRecord, ...]

    @property
    def hybrid(self) -> list[StepRecord]:
        """Those held out in which decodes and prefill shared the step."""
        return [r for r in self.held_out if r.shape.decodes and r.shape.prefill_work > 0]


def profile_model(
    model: str, flags: Sequence[str], calibration_dir: str | None, progress: Progress, seed: int = 0
) -> Profile:
    """Run the grid on the engine of `vllm serve model flags`; what it learns is kept when the engine ends.

    Raises:
        SystemExit: vLLM refuses a flag.
    """
    ours = ["--scheduler", "sarathi"]
    if calibration_dir is not None:
        ours += ["--calibration-dir", calibration_dir]
    task = progress.add_task("the engine starts", total=None)
    with engine_in_process(["--model", model, *ours, *flags]) as engine:
        return run_grid(engine, progress.update, task, seed)


def run_grid(engine: InProcessEngine, update: Callable[..., None], task: object, seed: int = 0) -> Profile:
    """Run the grid, then the steps held out; `update` is that of a rich Progress."""
    rng = random.Random(seed)
    controller = engine.scheduler.controller
    # What an earlier run left is not to be improved but replaced.
    learnt = controller.model = StepTimeModel()
    policy = controller.policy = GridPolicy(learnt)
    most = min(engine.max_num_seqs, engine.kv_tokens // (2 * max(CONTEXTS)))
    levels = sorted({min(level, most) for level in LEVELS})
    steps = len(levels) * 2 * len(CHUNKS) + len(HELD_OUT_LEVELS) * HELD_OUT_STEPS
    update(task, description="the grid", total=steps)
    started_s = time.monotonic()
    for level in levels * 2:
        if time.monotonic() - started_s < GRID_S:
            chunks = _chunks_that_fit(learnt, level, CHUNKS)
            rng.shuffle(chunks)
            _run_level(engine, policy, level, chunks, rng)
        update(task, advance=len(CHUNKS))
    count = len(policy.records)
    policy.learning = False
    update(task, description="the steps held out")
    for level in HELD_OUT_LEVELS:
        largest = max(_chunks_that_fit(learnt, level, CHUNKS))
        sizes = [round(16 * (largest / 16) ** rng.random()) if largest else 0 for _ in range(HELD_OUT_STEPS)]
        begin = len(policy.records)
        _run_level(engine, policy, min(level, most), sizes, rng)
        del policy.records[begin : len(policy.records) - HELD_OUT_STEPS]  # those that set the scene
        update(task, advance=HELD_OUT_STEPS)
    held_out = policy.records[count:]
    for record in held_out:
        learnt.observe(record.shape, record.measured_s)
    return Profile(tuple(policy.records[:count]), tuple(held_out))


def _chunks_that_fit(model: StepTimeModel, level: int, chunks: Sequence[int]) -> list[int]:
    """Return the chunks whose step is not predicted to take too long; a model that knows nothing passes all."""
    return [c for c in chunks if model.seconds(level + c, level, 0, 0.5 * c * c, level + 1) <= MOST_STEP_S]


def _run_level(
    engine: InProcessEngine, policy: GridPolicy, level: int, chunks: Sequence[int], rng: random.Random
) -> None:
    """Let a number of streams decode, and take a step for each chunk beside them."""

    def prompt(tokens: int) -> list[int]:
        return rng.choices(range(engine.vocabulary // 8, engine.vocabulary), k=tokens)

    room = engine.max_model_len
    most_steps = len(chunks) + 3 * level + 16
    names = []
    for _ in range(level):
        context = min(rng.choice(CONTEXTS), max(1, room // 4))
        names.append(engine.add(prompt(context), min(room - context, most_steps)))
    scheduler = engine.scheduler
    while scheduler.waiting or any(request.is_prefill_chunk for request in scheduler.running):
        engine.step()
    length = min(PROMPT_TOKENS, room - 1, engine.kv_tokens // 4)
    # All are queued before: the time to queue one would count as a step's.
    names += [engine.add(prompt(length), 1) for _ in range(sum(chunks) // length + 1)]
    policy.chunks.extend(chunks)
    while policy.chunks and scheduler.has_requests():
        engine.step()
    policy.chunks.clear()
    engine.abort(names)


def profile_table(profile: Profile) -> Table:
    """Return how well the model predicted the steps held out."""
    table = Table(title=f"learnt from {len(profile.learnt)} steps; {len(profile.held_out)} held out")
    for name in ("decodes", "steps", "ms, P50", "error, P50", "error, P90"):
        table.add_column(name, justify="right")
    groups = {str(n): [r for r in profile.hybrid if r.shape.decodes == n] for n in HELD_OUT_LEVELS}
    for name, records in {**groups, "all hybrid": profile.hybrid}.items():
        errors = [e for r in records if (e := relative_error(r.predicted_s, r.measured_s)) is not None]
        if errors:
            times_ms = [record.measured_s * 1e3 for record in records]
            table.add_row(
                name,
                str(len(records)),
                f"{quantile(times_ms, 0.5):.1f}",
                f"{quantile(errors, 0.5):.1%}",
                f"{quantile(errors, 0.9):.1%}",
            )
    return table


def draw_profile(profile: Profile, out: Path) -> None:
    """Save a picture of predicted against measured times of the steps held out."""
    # Imported here: it takes a second.
    from matplotlib.figure import Figure

    predicted = [(r.measured_s * 1e3, r.predicted_s * 1e3) for r in profile.held_out if r.predicted_s]
    figure = Figure(figsize=(6, 6), dpi=110, layout="constrained")
    panel = figure.subplots()
    if predicted:
        ends = [min(map(min, predicted)) / 1.3, max(map(max, predicted)) * 1.3]
        panel.plot(ends, ends, color="black", linewidth=1, label="as predicted")
        panel.fill_between(
            ends, [0.85 * e for e in ends], [1.15 * e for e in ends], alpha=0.15, label="within 15%"
        )
        panel.plot(
            *zip(*predicted, strict=True), ".", color="#1f5fa8", label=f"{len(predicted)} steps held out"
        )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.legend(frameon=False)
    panel.set_xlabel("measured, ms")
    panel.set_ylabel("predicted, ms")
    panel.grid(alpha=0.25)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
