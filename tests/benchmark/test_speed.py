"""The measurement of the simulator's speed runs; how fast it is, is for `vllm-sarathi bench simulator` to say."""

from vllm_sarathi.benchmark.speed import SCHEDULERS, measure_speed, speed_table


def test_a_row_for_each_scheduler() -> None:
    rows = measure_speed(chat_requests=8, steps=300)
    assert [row["scheduler"] for row in rows] == list(SCHEDULERS)
    assert all(row["steps_per_s"] > 0 and row["chat_s"] > 0 and row["running"] == 64 for row in rows)
    assert speed_table(rows).row_count == len(SCHEDULERS)
