"""How much slower one kind of step is assumed to be because those of the other kind have become slower.

The kinds are steps with prefill, and steps of decodes alone. While there are only steps of one kind, they are all that
shows the speed of the device. If they become slower, the others are assumed to be slower, too; if they are as fast as
before, so are the others, however often that changes, and whether or not the change was recognised as one. The others
are never assumed to be faster than when they were last seen.

With the next step of its own a kind speaks for itself. What was assumed by then stays if it was a change. It is taken
back if noise may have been all of it: each pause between two prompts would leave a little of it otherwise, and never
less.
"""

from collections import deque
from statistics import median

from vllm_sarathi.core.steptime.drift import CHANGE_FACTOR
from vllm_sarathi.core.steptime.features import Curve
from vllm_sarathi.core.types import StepShape

STEPS = 3
"""Steps that tell how slow they are; as many as show that a device is slower (see `drift`)."""

STEADY_STEPS = 32
"""As many of the latest tell it while no change shows: the median of three is off by most of the noise of one."""


class Borrowed:
    """Compares the steps of one kind with what they took when the other kind was last seen."""

    def __init__(self) -> None:
        self._reference: Curve | None = None
        self._ratios: deque[float] = deque(maxlen=STEADY_STEPS)
        self._factor = 1.0

    def saw_own(self) -> float:
        """Note a step of the kind that is assumed; return the factor by which what was assumed is taken back."""
        assumed = self._factor
        self._reference = None
        self._factor = 1.0
        self._ratios.clear()
        return 1.0 / assumed if assumed < CHANGE_FACTOR else 1.0

    def saw_other(self, curve: Curve, tile_tokens: int, shape: StepShape, measured_s: float) -> None:
        """Note a step of the other kind; `curve` and the tile are the model's at present."""
        if self._reference is None:
            self._reference = curve
        expected_s = self._reference.predict(shape, tile_tokens)
        if expected_s > 0:
            self._ratios.append(measured_s / expected_s)

    def follow(self, changed: bool) -> float:
        """Return the factor by which steps of the kind are now to be held slower than they were held so far.

        Args:
            changed: whether the latest steps have shown a change, so that those before it tell nothing.
        """
        while changed and len(self._ratios) > STEPS:
            self._ratios.popleft()
        wanted = max(1.0, median(self._ratios)) if len(self._ratios) >= STEPS else self._factor
        step, self._factor = wanted / self._factor, wanted
        return step
