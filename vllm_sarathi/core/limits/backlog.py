"""Delayed requests: those that wait for a step, and those that will come before the queue is empty again.

Time that a step spends on anything but prefill delays not only the prompts that wait now. While there is a queue, it
delays all that join it, until there is nothing left to prefill (in queueing theory, until the busy period ends). Near
saturation those are many more than can be seen: if s prompts come for each that is prefilled, a queue of n is empty
after n / (1 - s) of them.
"""

FORGOTTEN = 0.95
"""What remains of an earlier busy period's weight after each one."""

KNOWN_PERIODS = 4
"""Busy periods after which the prompts of one are known."""

DOUBTED_PROMPTS = 4
MOST_SHARE = 0.98
"""The first prompts of a busy period tell little of how many come for each, so this many are taken to have been
prefilled while none came. And the most that is believed to come, as a share of those that are prefilled."""


class Backlog:
    """Counts the prompts of busy periods."""

    def __init__(self) -> None:
        self._prefilled = self._came = self._left = 0
        self._periods = 0
        self._weight = 0.0
        self._sum = self._square_sum = 0.0

    def planned(self, prefilled: int, left: int) -> None:
        """Note a step.

        Args:
            prefilled: prompts whose last token it prefills.
            left: prompts that are to be prefilled after it, as far as they are there.
        """
        if self._prefilled or self._left:  # those that a busy period begins with have not come during it
            self._came += max(0, prefilled + left - self._left)
        self._left = left
        if prefilled or left:
            self._prefilled += prefilled
        elif self._prefilled:
            self._periods += 1
            self._weight = FORGOTTEN * self._weight + 1
            self._sum = FORGOTTEN * self._sum + self._prefilled
            self._square_sum = FORGOTTEN * self._square_sum + self._prefilled**2
            self._prefilled = self._came = 0

    def delayed(self, left: int) -> float:
        """Return how many prompts are put off by one more step now, where `left` are there that it does not prefill.

        A step is more likely to be one of a long period than of a short one: the mean length is weighted by itself. One
        that has lasted longer than that, or before any are known, is taken to be at its half. Nor are there fewer than
        those that wait and those that come while these are prefilled.
        """
        expected = 0.0
        if self._periods >= KNOWN_PERIODS:
            expected = self._square_sum / self._sum - self._prefilled
        share = min(MOST_SHARE, self._came / (self._prefilled + DOUBTED_PROMPTS))
        # Of a long period one sees that it goes on, so the mean of all periods bounds what the present one shows.
        each = min(1 / (1 - share), (self._sum + self._prefilled) / (self._weight + 1))
        return max(left * max(1.0, each), expected if expected > 0 else self._prefilled)
