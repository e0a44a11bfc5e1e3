"""SloWatch: notices an SLO that no chunk size could keep, and says once what would help; one for each class."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from vllm_sarathi.core.classes import SloClasses
from vllm_sarathi.core.figures import DEFAULT_CLASS, FinishedStep
from vllm_sarathi.core.step_trace import TracedStep
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import ONE_STAGE, Pipeline, Reason

LEAST_STEPS = 16
STEPS_SEEN = 64
"""Steps with decodes that a judgement needs, one slow step being no proof; it looks at no more."""


CROWDED = (Reason.FULL, Reason.FLOOR)
CROWDED_SHARE = 0.5
"""Where more of the steps than that had prompts to prefill and no room for them, prompts wait for the gaps' sake."""


class SloWatch:
    """Compares the time that decodes alone take with the SLO.

    Args:
        model: tells the decodes' part of a step that also prefilled prompts.
        pipeline: the stages of the device.
        whose: the class whose SLO it is, as a sentence names it; empty where there are no classes.
        setting: what states the SLO.

    Attributes:
        unattainable: whether decodes alone took longer than the SLO, at the last look.
        decode_step_s: how long they took, seconds, the median; None before the first look.
    """

    def __init__(
        self,
        model: StepTimeModel,
        pipeline: Pipeline = ONE_STAGE,
        whose: str = "",
        setting: str = "--tbt-slo-ms",
    ) -> None:
        self.unattainable = False
        self.decode_step_s: float | None = None
        self._model = model
        self._pipeline = pipeline
        self._whose = whose
        self._setting = setting
        self._said = self._said_crowded = self._said_growing = False
        self._decoding: deque[TracedStep] = deque(maxlen=STEPS_SEEN)

    def look(self, steps: Sequence[TracedStep]) -> str | None:
        """Judge the SLO, with the steps since the last look.

        Returns:
            What to tell the operator, the first time that it is broken, the first time that keeping it leaves prompts
            no room, and the first time that it lets none in; else None.
        """
        decoding = self._decoding
        decoding.extend(step for step in steps if step.shape.decodes > 0 and step.slo_s is not None)
        if len(decoding) < LEAST_STEPS:
            return None
        self.decode_step_s = statistics.median(self._alone_s(step) for step in decoding)
        slo_s = decoding[-1].slo_s
        assert slo_s is not None
        self.unattainable = self.decode_step_s > slo_s
        if self.unattainable and not self._said:
            self._said = True
            return self._advice(decoding[-1], slo_s)
        crowded = sum(step.reason in CROWDED for step in decoding)
        if not self.unattainable and not self._said_crowded and crowded > CROWDED_SHARE * len(decoding):
            self._said_crowded = True
            return self._crowded_advice(decoding[-1], slo_s)
        growing = sum(step.reason == Reason.GROWTH for step in decoding)
        if not self._said_growing and growing > CROWDED_SHARE * len(decoding):
            self._said_growing = True
            return self._growing_advice(decoding[-1], slo_s)
        return None

    def rest(self) -> None:
        """Note that nobody waits for tokens under the SLO: nothing is broken then."""
        self.unattainable = False
        self._decoding.clear()

    def _alone_s(self, step: TracedStep) -> float:
        """Return how long the step's decodes take without the prompts beside them."""
        if step.shape.prefill_work == 0:
            return step.measured_s
        return self._seconds(step, step.shape.decodes)

    def _seconds(self, step: TracedStep, decodes: int) -> float:
        context = step.shape.decode_context_tokens * decodes // step.shape.decodes
        return self._model.seconds(decodes, decodes, context, 0.0, decodes)

    def _advice(self, step: TracedStep, slo_s: float) -> str:
        assert self.decode_step_s is not None
        margin = self._model.margin
        needed_ms = math.ceil(self._pipeline.token_s(self.decode_step_s) * margin * 1e3)
        fitting = [n for n in range(1, step.shape.decodes) if self._seconds(step, n) * margin <= slo_s]
        fewer = f", or fewer requests at once (--max-num-seqs of about {fitting[-1]})" if fitting else ""
        return (
            f"{self._slo(slo_s)} cannot be kept: {self._decodes_alone(step)}. "
            f"Prompts get a fifth of the time beside them. "
            f"What would help: {self._setting} {needed_ms} or more{fewer}."
        )

    def _crowded_advice(self, step: TracedStep, slo_s: float) -> str:
        return (
            f"{self._slo(slo_s)} leaves prompts no room: {self._decodes_alone(step)}, and any chunk beside them is "
            f"too long. Prompts give way: they are prefilled in the few steps that may be late, until one has waited "
            f"for --prefill-max-wait-s; then the gaps give way. A higher {self._setting} would help."
        )

    def _growing_advice(self, step: TracedStep, slo_s: float) -> str:
        return (
            f"{self._slo(slo_s)} leaves no room for more requests: {self._decodes_alone(step)}, and with one more "
            f"they would exceed it before their answers end. New requests wait for answers to end, for at most "
            f"--prefill-max-wait-s. A higher {self._setting} would help."
        )

    def _slo(self, slo_s: float) -> str:
        return f"The SLO of {self._pipeline.token_s(slo_s) * 1e3:g} ms between tokens{self._whose}"

    def _decodes_alone(self, step: TracedStep) -> str:
        assert self.decode_step_s is not None
        taken_ms = self._pipeline.token_s(self.decode_step_s) * 1e3
        return f"decodes alone take {taken_ms:.0f} ms with {step.shape.decodes} of them running"


class SloWatches:
    """A SloWatch for each class of requests; one where there are no classes.

    Args:
        model, pipeline: as in SloWatch.
        classes: the classes of the server, if it has any.
    """

    def __init__(self, model: StepTimeModel, pipeline: Pipeline, classes: SloClasses | None) -> None:
        self._watches = {DEFAULT_CLASS: SloWatch(model, pipeline)}
        if classes is not None:
            self._watches = {
                each.name: SloWatch(
                    model,
                    pipeline,
                    f" of class {each.name}",
                    "--tbt-slo-ms" if each.tbt_slo_ms is None else f"classes.{each.name}.tbt_slo_ms",
                )
                for each in classes.classes
            }

    @property
    def unattainable(self) -> dict[str, bool]:
        """As `SloWatch.unattainable`, by class."""
        return {name: watch.unattainable for name, watch in self._watches.items()}

    def look(self, steps: Sequence[FinishedStep]) -> list[str]:
        """Judge each class's SLO by the steps since the last look; return what to tell the operator."""
        said = []
        for name, watch in self._watches.items():
            if own := [traced for step in steps if (traced := _under_slo_of(step, name)) is not None]:
                said.append(watch.look(own))
            else:
                watch.rest()
        return [advice for advice in said if advice]


def _under_slo_of(step: FinishedStep, slo_class: str) -> TracedStep | None:
    """Return a step with the SLO that a class had in it; None where nobody of the class was under one."""
    own = [gaps.slo_s for gaps in step.gaps if gaps.slo_class == slo_class and gaps.slo_s is not None]
    if not own:
        return None
    # What a step had no room for is told of the SLO that bound it: the tightest.
    bound = min(own) == step.traced.slo_s
    return replace(step.traced, slo_s=min(own), reason=step.traced.reason if bound else Reason.NONE)
