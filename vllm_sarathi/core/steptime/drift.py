"""When a device has become slower or faster than it was: several steps in a row agree on it.

Slower is believed quickly, since SLOs are being missed. Faster is believed after more steps, and after twice as many
each time that it soon turned out wrong. With a neighbour that comes and goes, the device therefore counts as slow as it
is beside the neighbour: the budget is what the device can give at the quantile that the SLO is about, not in its best
seconds.
"""

from collections import deque

CHANGE_FACTOR = 1.2
FASTER_STEPS = 8
SLOWER_STEPS = 3
SLOWER_FACTOR = 1.3
"""The device has changed where steps in a row are off by a factor, all to the same side: faster, or slower."""

MOST_FASTER_STEPS = 512
RELAPSE_STEPS = 2000
"""Slower again within this number of steps after faster: then the next faster needs twice the steps."""


class DriftDetector:
    """Watches the ratio of measured to predicted times.

    Attributes:
        change_steps: how many steps the change seen last took to be seen.
    """

    def __init__(self) -> None:
        self._high: deque[float] = deque(maxlen=SLOWER_STEPS)
        self._low: deque[float] = deque(maxlen=FASTER_STEPS)
        self._low_count = 0
        self._faster_steps = FASTER_STEPS
        self._since_faster = RELAPSE_STEPS
        self.change_steps = 0

    def look(self, ratio: float, doubted: bool = False) -> float | None:
        """Take in a step, and return the factor by which the device has changed; None where it has not.

        Args:
            ratio: the measured over the predicted time, of a kind of step that is known.
            doubted: whether such steps are held slower because others were: a few that are not take that back.
        """
        self._since_faster += 1
        if ratio > SLOWER_FACTOR:
            self._high.append(ratio)
        else:
            self._high.clear()
        if ratio < 1 / CHANGE_FACTOR:
            self._low.append(ratio)
            self._low_count += 1
        else:
            self._low_count = 0
        if len(self._high) == SLOWER_STEPS:
            factor = sorted(self._high)[SLOWER_STEPS // 2]
            self.change_steps = SLOWER_STEPS
            if self._since_faster < RELAPSE_STEPS:
                self._faster_steps = min(MOST_FASTER_STEPS, 2 * self._faster_steps)
            self._clear()
            return factor
        if doubted and self._low_count >= SLOWER_STEPS:
            factor = sorted(self._low)[len(self._low) // 2]
            self.change_steps = self._low_count
            self._clear()
            return factor
        if self._low_count >= self._faster_steps:
            factor = sorted(self._low)[len(self._low) // 2]
            if self._since_faster >= 4 * RELAPSE_STEPS:
                self._faster_steps = max(FASTER_STEPS, self._faster_steps // 2)
            self._since_faster = 0
            self.change_steps = self._low_count
            self._clear()
            return factor
        return None

    def passes_over(self, ratio: float) -> bool:
        """Tell whether a step says nothing: a quick one, where that has soon turned out wrong before.

        A neighbour is away, and the device is to count as slow as it is beside him.
        """
        return ratio < 1 / CHANGE_FACTOR and self._faster_steps > FASTER_STEPS

    def _clear(self) -> None:
        self._high.clear()
        self._low.clear()
        self._low_count = 0
