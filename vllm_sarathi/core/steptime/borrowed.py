"""How much slower prefill is assumed to be because steps of decodes alone have become slower.

While no prompt is prefilled, decodes are all that shows the speed of the device. If they become slower, prefill is
assumed to be slower, too; if they are as fast as before, so is prefill, however often that changes, and whether or not
the change was recognised as one. Prefill is never assumed to be faster than when the last prompt was prefilled.

With the next prompt prefill speaks for itself. What was assumed by then stays if it was a change. It is taken back if
noise may have been all of it: each pause between two prompts would leave a little of it otherwise, and never less.
"""

from collections import deque
from statistics import median

from vllm_sarathi.core.steptime.drift import CHANGE_FACTOR
from vllm_sarathi.core.steptime.features import Curve
from vllm_sarathi.core.types import StepShape

STEPS = 3
"""Steps of decodes alone that tell how slow they are; as many as show that a device is slower (see `drift`)."""

STEADY_STEPS = 32
"""As many of the latest tell it while no change shows: the median of three is off by most of the noise of one."""


class Borrowed:
    """Compares steps of decodes alone with what they took when the last prompts were prefilled."""

    def __init__(self) -> None:
        self._reference: Curve | None = None
        self._ratios: deque[float] = deque(maxlen=STEADY_STEPS)
        self._factor = 1.0

    def saw_prefill(self) -> float:
        """Note a step with prefill; return the factor by which what was assumed of the others is taken back."""
        assumed = self._factor
        self._reference = None
        self._factor = 1.0
        self._ratios.clear()
        return 1.0 / assumed if assumed < CHANGE_FACTOR else 1.0

    def saw_decodes(self, curve: Curve, shape: StepShape, measured_s: float) -> None:
        """Note a step of decodes alone; `curve` is the model's at present."""
        if self._reference is None:
            self._reference = curve
        context, sequences = shape.decode_context_tokens, shape.sequences
        expected_s = self._reference.seconds(shape.tokens, shape.decodes, context, 0.0, sequences)
        if expected_s > 0:
            self._ratios.append(measured_s / expected_s)

    def follow(self, changed: bool) -> float:
        """Return the factor by which steps with prefill are now to be held slower than they were held so far.

        Args:
            changed: whether the latest steps have shown a change, so that those before it tell nothing.
        """
        while changed and len(self._ratios) > STEPS:
            self._ratios.popleft()
        wanted = max(1.0, median(self._ratios)) if len(self._ratios) >= STEPS else self._factor
        step, self._factor = wanted / self._factor, wanted
        return step
