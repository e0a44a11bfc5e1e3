"""The rules of a step: what holds of vLLM's scheduler whatever happens, and whoever plans.

The conformance kit, the property tests and the fuzz check the same ones; what is particular to a policy or to a feature
is checked where it is tested.
"""

from typing import Any

from vllm_sarathi.engine.vllm.internals import request_status
from vllm_sarathi.engine.vllm.limits import save_limits
from vllm_sarathi.engine.vllm.queues import waiting_requests
from vllm_sarathi.testing.modelled import Step


class StepRules:
    """Checks a scheduler after each step, and at the end.

    Args:
        scheduler: the scheduler, ours or vLLM's own, before anybody has come.
        most_tokens: the most tokens of a step.
    """

    def __init__(self, scheduler: Any, most_tokens: int) -> None:
        self._scheduler = scheduler
        self._most_tokens = most_tokens
        self._limits = save_limits(scheduler)
        self._free_blocks = self._blocks()

    def check_step(self, step: Step) -> None:
        """Check a step that has just been scheduled.

        Raises:
            AssertionError: a rule is broken; the message says which.
        """
        scheduler, output = self._scheduler, step.output
        taken = sum(step.scheduled.values())
        assert taken == output.total_num_scheduled_tokens, "the tokens of a step do not add up"
        assert taken <= self._most_tokens, f"over budget: {taken} tokens in a step of {self._most_tokens}"
        assert save_limits(scheduler) == self._limits, "limits are not restored"
        assert len(scheduler.running) <= scheduler.max_num_running_reqs, (
            "more requests run than max_num_seqs allows"
        )
        places = [*scheduler.running, *waiting_requests(scheduler)]
        assert len(places) == len({id(request) for request in places}), "a request is in two places"
        alive = {name for name, request in scheduler.requests.items() if not request.is_finished()}
        assert alive == {request.request_id for request in places}, "a request is lost"
        running = request_status().RUNNING
        assert all(request.status == running for request in scheduler.running), (
            "a request in `running` does not run"
        )
        told = [data.req_id for data in output.scheduled_new_reqs] + output.scheduled_cached_reqs.req_ids
        assert sorted(told) == sorted(step.scheduled), "the output names other requests than were scheduled"
        if hasattr(scheduler, "faults"):
            assert scheduler.faults.total == 0, (
                f"the policy has raised an error: {dict(scheduler.faults.counts)}"
            )

    def check_end(self) -> None:
        """Check the end, when every request has finished or was aborted.

        Raises:
            AssertionError: something is left; the message says what.
        """
        scheduler = self._scheduler
        assert not scheduler.requests, "vLLM still knows requests after the end"
        assert not scheduler.running, "requests still run after the end"
        assert not list(waiting_requests(scheduler)), "requests still wait after the end"
        assert self._blocks() == self._free_blocks, "KV blocks are still held after the end"

    def _blocks(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
