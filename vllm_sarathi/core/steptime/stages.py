"""How long a batch keeps a stage of a pipeline busy, from when it went in and when it came out.

Between two completions of a pipeline lies the time of a stage only where no stage waited for work. Beside batches of
other sizes there are bubbles (Sarathi-Serve, section 3.3), and the same batch shows once its own time and once nearly
twice as much: a step-time model that learns from that sees a device that changes all the time.
"""

from collections.abc import Sequence

from vllm_sarathi.core.types import InFlight

LONGEST_WITHIN = 1e-3
"""How exactly the longest time is found, as a share of the SLO."""


class StageClock:
    """Tells the time of a stage, where all stages take equally long.

    A batch enters stage k when it has left stage k - 1 and the batch before it has left stage k. With e[k] for when the
    one before left stage k, and t for the time of a stage, it comes out at

        max(started + stages t, max over k of e[k] + (stages - k + 1) t),

    which rises with t, so that t follows from when it came out.

    Args:
        stages: how many there are.
    """

    def __init__(self, stages: int) -> None:
        self._left_s = [float("-inf")] * stages

    def seconds(self, started_s: float, completed_s: float) -> float:
        """Return the seconds that the batch took in each stage; batches are told in the order of their completion."""
        left_s, stages = self._left_s, len(self._left_s)
        stage_s = min(
            (completed_s - started_s) / stages,
            *((completed_s - left) / (stages - k) for k, left in enumerate(left_s)),
        )
        self._pass(left_s, started_s, stage_s)
        return stage_s

    @staticmethod
    def _pass(left_s: list[float], started_s: float, stage_s: float) -> float:
        """Let a batch pass, and return when it comes out."""
        at_s = started_s
        for k, left in enumerate(left_s):
            at_s = left_s[k] = max(at_s, left) + stage_s
        return at_s

    def longest_s(self, now_s: float, due_s: float, tbt_slo_s: float, in_flight: Sequence[InFlight]) -> float:
        """Return the longest time in a stage that a batch may take for all that are behind one another to be in time.

        A short batch before a long one lets that one start early, and who comes after it waits for both of its stages:
        so the batches that follow, up to the next one with the same requests, are taken to be as long as this one, each
        handed out when one comes out and due `tbt_slo_s` after that.

        Args:
            now_s: when it is handed out.
            due_s: when it has to be out; infinite where none of its requests generates.
            tbt_slo_s: the SLO for the time between tokens.
            in_flight: the batches inside, oldest first.
        """
        left_s = list(self._left_s)
        out_s = [self._pass(left_s, batch.started_s, batch.stage_s) for batch in in_flight]

        def in_time(stage_s: float) -> bool:
            passed_s = list(left_s)
            if self._pass(passed_s, now_s, stage_s) > due_s:
                return False
            return all(self._pass(passed_s, out, stage_s) <= out + tbt_slo_s for out in out_s)

        low, high = 0.0, tbt_slo_s / len(left_s)
        if in_time(high):
            return high
        while high - low > LONGEST_WITHIN * tbt_slo_s:
            middle = (low + high) / 2
            low, high = (middle, high) if in_time(middle) else (low, middle)
        return low
