"""The order of a fixed-budget step: decodes first, then partial prefills, then new requests; not read off our code."""

from vllm_sarathi.testing.modelled import ModelledEngine, Step


def rank(engine: ModelledEngine, request: object) -> tuple[float, float]:
    """Return a request's place in the queue."""
    by_priority = engine.scheduler.scheduler_config.policy == "priority"
    return (request.priority if by_priority else 0, request.arrival_time)  # type: ignore[attr-defined]


def check_step(engine: ModelledEngine, step: Step, budget: int) -> None:
    """Assert what holds for a single step with a fixed budget."""
    scheduled = step.scheduled
    check_stall_free(engine, step, budget)
    check_hybrid(engine, step, budget)
    assert scheduled or step.preempted or not (step.decodes_allowed or step.partial_before), "no progress"


def check_stall_free(engine: ModelledEngine, step: Step, budget: int) -> None:
    """Every decode that stock would run is in the step, unless blocks or the budget itself ran out."""
    missed = {
        name for name, need in step.decodes_allowed.items() if step.scheduled.get(name, 0) < need
    } - step.preempted
    if step.preempted:
        # Out of blocks: the youngest go first, so a prefill may run only if every decode does.
        if engine.scheduler.scheduler_config.policy == "fcfs" and (
            missed or step.preempted & set(step.decodes_allowed)
        ):
            assert not step.partial_before.keys() & step.scheduled.keys(), (
                "a prefill ran while a decode stood"
            )
    elif sum(step.decodes_allowed.values()) <= budget:
        assert not missed, f"stalled: {missed}"
    else:
        assert sum(step.scheduled.values()) == budget, "budget left while a decode stood"
        assert not step.partial_before.keys() & step.scheduled.keys(), "a prefill ran while a decode stood"


def check_hybrid(engine: ModelledEngine, step: Step, budget: int) -> None:
    """The rest of the budget goes to partial prefills in arrival order, then to waiting requests."""
    partial = [
        r
        for r in step.running_before
        if r.request_id in step.partial_before and r.request_id not in step.preempted
    ]
    # With priorities, those that are less urgent than one that was let in have yielded their turn to it.
    urgent = min([request.priority for request in step.admitted], default=1 << 30)
    partial = [r for r in partial if r.priority <= urgent]
    partial.sort(key=lambda r: rank(engine, r))
    most = engine.scheduler.scheduler_config.long_prefill_token_threshold or budget
    cut = False
    for request in partial:
        got = step.scheduled.get(request.request_id, 0)
        assert not (cut and got), "a later prefill was served before an earlier one was done"
        cut = cut or got < min(most, step.partial_before[request.request_id])
    if cut and not step.preempted:
        assert sum(step.scheduled.values()) == budget, "budget left while a prefill stood"
    assert not (cut and step.admitted), "a new request was let in before a partial prefill was done"
