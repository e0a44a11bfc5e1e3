"""Shares of tenants: nobody who has work gets less than the bound allows."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sarathi.core.order.shares import CREDIT_S, MOST_TENANTS, Shares

LENGTHS = st.lists(st.floats(0.05, 1.0), min_size=30, max_size=60)


@settings(deadline=None, derandomize=True, database=None)
@given(LENGTHS, LENGTHS, st.integers(0, 20))
def test_of_two_with_work_neither_is_read_for_much_longer_than_the_other(
    mine: list[float], yours: list[float], head_start: int
) -> None:
    shares = Shares()
    queues = {"me": list(mine), "you": list(yours)}
    waiting = [(shares.tag("you", length), "you", length) for length in queues["you"]]
    for _ in range(min(head_start, len(waiting) - 20)):  # who floods is alone at first
        shares.seen(min(waiting)[0])
        waiting.remove(min(waiting))
    waiting += [(shares.tag("me", length), "me", length) for length in queues["me"]]
    read = {"me": 0.0, "you": 0.0}
    while {tenant for _, tenant, _ in waiting} == {"me", "you"}:
        shares.seen(min(waiting)[0])
        tag, tenant, length = min(waiting)
        waiting.remove((tag, tenant, length))
        read[tenant] += length
        assert abs(read["me"] - read["you"]) <= CREDIT_S + max(mine) + max(yours) + 1e-9


def test_who_comes_back_goes_first_for_its_credit_and_no_longer() -> None:
    shares = Shares()
    flood = [shares.tag("flood", 1.0) for _ in range(100)]
    shares.seen(flood[50])
    back = [shares.tag("light", 1.0) for _ in range(4)]
    assert back[0] == flood[50] - CREDIT_S
    assert sum(tag < flood[50] for tag in back) == CREDIT_S
    assert not any(map(shares.is_beyond, back))
    assert shares.is_beyond(flood[60])


def test_who_is_kept_out_pays_for_the_time_and_is_remembered_so() -> None:
    shares = Shares()
    flood = [shares.tag("flood", 1.0) for _ in range(10)]
    shares.seen(min(shares.place("flood", tag) for tag in flood))
    light = [shares.tag("light", 1.0) for _ in range(6)]
    assert light[5] > flood[0]
    shares.pay("flood", 6.0)
    assert shares.place("flood", flood[0]) == flood[0] + 6.0 > light[5] == shares.place("light", light[5])
    assert shares.place("flood", shares.tag("flood", 1.0)) == flood[9] + 1.0 + 6.0
    shares.pay("nobody", 4.0)
    assert shares.place("nobody", 1.0) == 1.0
    shares.seen(1000.0)
    assert shares.place("flood", shares.tag("flood", 1.0)) == 1000.0 - CREDIT_S


def test_time_never_goes_back_and_what_is_remembered_is_bounded() -> None:
    shares = Shares()
    shares.seen(10.0)
    shares.seen(3.0)
    assert shares.now_s == 10.0
    for i in range(2 * MOST_TENANTS):
        shares.tag(f"tenant {i}", 5.0)
    assert len(shares._ends) <= MOST_TENANTS
    assert math.isfinite(shares.tag("tenant 1", 1.0))
