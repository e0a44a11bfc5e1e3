"""A turn that was not taken is not given again at once."""

import itertools

from vllm_sarathi.engine.turns import MOST_PASS_STEPS, RefusedTurns


def test_who_did_not_run_is_passed_over_for_longer_each_time() -> None:
    turns, step, given = RefusedTurns(), 0, []
    while step < 2000:
        if not turns.is_passed_over("a", step):
            given.append(step)
            turns.note("a", ran=False, step=step)
        step += 1
    waits = [later - earlier for earlier, later in itertools.pairwise(given)]
    assert waits[:7] == [2, 4, 8, 16, 32, 64, 128]
    assert set(waits[7:]) == {MOST_PASS_STEPS}
    assert not turns.is_passed_over("b", 0)


def test_who_ran_is_asked_at_once_again() -> None:
    turns = RefusedTurns()
    turns.note("a", ran=False, step=5)
    turns.note("a", ran=False, step=7)
    assert turns.is_passed_over("a", 10)
    turns.note("a", ran=True, step=10)
    assert not turns.is_passed_over("a", 10)
    turns.note("a", ran=False, step=11)
    assert [step for step in range(11, 16) if turns.is_passed_over("a", step)] == [11, 12]


def test_those_that_have_ended_are_forgotten() -> None:
    turns = RefusedTurns()
    for name in "ab":
        turns.note(name, ran=False, step=0)
    turns.forget("a")
    assert not turns.is_passed_over("a", 1)
    assert turns.is_passed_over("b", 1)
