"""Delayed requests: those that wait for a step, and those that will come before the queue is empty again.

Time that a step spends on anything but prefill delays not only the prompts that wait now. While there is a queue, it
delays all that join it, until there is nothing left to prefill (in queueing theory, until the busy period ends). Near
saturation those are many more than can be seen.
"""

FORGOTTEN = 0.95
"""What remains of an earlier busy period's weight after each one."""

KNOWN_PERIODS = 4
"""Busy periods after which the prompts of one are known."""


class Backlog:
    """Counts the prompts of busy periods."""

    def __init__(self) -> None:
        self._prefilled = 0
        self._periods = 0
        self._sum = self._square_sum = 0.0

    def planned(self, prefilled: int, left: int) -> None:
        """Note a step.

        Args:
            prefilled: prompts whose last token it prefills.
            left: prompts that are to be prefilled after it, as far as they are there.
        """
        if prefilled or left:
            self._prefilled += prefilled
        elif self._prefilled:
            self._periods += 1
            self._sum = FORGOTTEN * self._sum + self._prefilled
            self._square_sum = FORGOTTEN * self._square_sum + self._prefilled**2
            self._prefilled = 0

    def delayed(self, left: int) -> float:
        """Return how many prompts are put off by one more step now, where `left` are there that it does not prefill.

        A step is more likely to be one of a long period than of a short one: the mean length is weighted by itself. One
        that has lasted longer than that, or before any are known, is taken to be at its half.
        """
        expected = 0.0
        if self._periods >= KNOWN_PERIODS:
            expected = self._square_sum / self._sum - self._prefilled
        return max(left, expected if expected > 0 else self._prefilled)
