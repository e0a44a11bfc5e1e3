"""When a request would have its first token, from what has to be prefilled before it: one pure function.

The engine's gate asks it for each request that arrives, the control endpoint for a router, and a simulated router for
its replicas.

Times are seconds from now. Requests with an SLO are prefilled by deadline. A newcomer takes the place that its own
deadline gives it, or, if that would make one behind it late, the first place at which it does not:

    end_i   = lead + sum of the prefill times up to i      when i has its first token
    slack_i = least of (due_j - end_j) over protected j >= i
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vllm_sarathi.core.types import chunk_work

ROUNDING_S = 1e-9
"""A job that is given up is long enough but for this, which sums of floating-point numbers are off by."""


class Job(NamedTuple):
    """A prompt that is to be prefilled.

    Attributes:
        due_s: when its first token is due, seconds from now.
        prefill_s: how long prefilling what is left of it takes, seconds.
        protected: whether it must not be made late for others: it was let in under an SLO that is kept or refused.
        stays: whether it is prefilled in its place even where it is late.
        loss: what giving it up costs; of those before one that would be late, that with the least goes.
    """

    due_s: float
    prefill_s: float
    protected: bool = False
    stays: bool = False
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class QueueView:
    """What is to be prefilled, and how fast.

    Attributes:
        jobs: the prompts with an SLO that is being kept, in any order.
        token_s: seconds of prefill per prompt token.
        work_s: seconds of attention per token pair, on top of that.
        lead_s: seconds before the first of them can be prefilled, and between prefill and answering.
        rest_s: seconds to prefill those without an SLO that is being kept; they are prefilled after all others.
    """

    jobs: tuple[Job, ...]
    token_s: float
    work_s: float = 0.0
    lead_s: float = 0.0
    rest_s: float = 0.0

    def prefill_s(self, tokens: int, done_tokens: int = 0) -> float:
        """Return the seconds to prefill `tokens` after `done_tokens`."""
        return tokens * self.token_s + self.work_s * chunk_work(done_tokens, tokens)

    def slower(self, factor: float) -> "QueueView":
        """Return the same at a pace that is slower by a factor; the jobs in it take what they take."""
        return replace(self, token_s=factor * self.token_s, work_s=factor * self.work_s)


def when_first_token(
    queue: QueueView, tokens: int, due_s: float = math.inf, done_tokens: int = 0, batch: bool = False
) -> float:
    """Return in how many seconds a prompt that arrives now would have its first token.

    Args:
        queue: what is to be prefilled.
        tokens: of the prompt that are not in the prefix cache.
        due_s: its SLO for the time to first token, seconds; infinite for none.
        done_tokens: of the prompt that are in the prefix cache.
        batch: whether it takes only what all others leave.
    """
    own_s = queue.prefill_s(tokens, done_tokens)
    jobs = [queue.jobs[index] for index in keep(queue.jobs, queue.lead_s)]
    end_s = queue.lead_s + sum(job.prefill_s for job in jobs)
    if due_s == math.inf:
        return end_s + (queue.rest_s if batch else 0.0) + own_s
    slack_s = math.inf
    for job in reversed(jobs):  # from the end of the line forward, as far as it may and can go
        if job.protected and job.due_s > 0:
            slack_s = min(slack_s, job.due_s - end_s)
        if job.due_s <= due_s or slack_s < own_s:
            break
        end_s -= job.prefill_s
    return end_s + own_s


def keep(jobs: Sequence[Job], lead_s: float) -> list[int]:
    """Return those of the jobs, by index and by deadline, that are prefilled in their place.

    Earliest deadline first keeps all where all can be kept; where one would be late, giving up the longest so far saves
    the most (Moore, 1968: it minimises the number of late jobs on one machine); with weights, that which takes the most
    time for its weight. Jobs that stay are never given up.
    """
    kept: dict[int, None] = {}
    losable: list[tuple[float, int, int]] = []
    end_s = lead_s
    for index in by_deadline(jobs):
        job = jobs[index]
        if not job.stays and end_s > job.due_s:
            continue  # it is late whoever is given up for it now: those before it are in time, and stay so
        end_s += job.prefill_s
        kept[index] = None
        if not job.stays:
            heapq.heappush(losable, (job.loss, -len(kept), index))  # of equals, the one that is due last
        if end_s <= job.due_s or (job.stays and job.due_s <= 0):
            continue
        given_up = _pop_long(losable, jobs, end_s - job.due_s - ROUNDING_S)
        if given_up is not None:  # else it is late in any case: nobody is given up for it
            end_s -= jobs[given_up].prefill_s
            del kept[given_up]
    return list(kept)


def _pop_long(losable: list[tuple[float, int, int]], jobs: Sequence[Job], needed_s: float) -> int | None:
    """Take out the job of the least loss whose prefill takes at least `needed_s`; None where none does."""
    passed = []
    found = None
    while losable and found is None:
        entry = heapq.heappop(losable)
        if jobs[entry[2]].prefill_s >= needed_s:
            found = entry[2]
        else:
            passed.append(entry)
    for entry in passed:
        heapq.heappush(losable, entry)
    return found


def by_deadline(jobs: Sequence[Job]) -> Iterable[int]:
    """Return the indices of the jobs, the earliest deadline first and the shortest first among equals."""
    return sorted(range(len(jobs)), key=lambda i: (jobs[i].due_s, jobs[i].prefill_s))
