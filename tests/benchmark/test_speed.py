"""The measurement of the simulator's speed runs; how fast it is, is for `vllm-sarathi bench simulator` to say."""

import pytest

from vllm_sarathi.benchmark.profile.speed import (
    QUERIED,
    SCHEDULERS,
    measure_queries,
    measure_speed,
    query_table,
    speed_table,
)
from vllm_sarathi.simulation.devices.package import known_models


def test_a_row_for_each_scheduler() -> None:
    rows = measure_speed(chat_requests=8, steps=300)
    assert [row["scheduler"] for row in rows] == list(SCHEDULERS)
    assert all(row["steps_per_s"] > 0 and row["chat_s"] > 0 and row["running"] == 64 for row in rows)
    assert speed_table(rows).row_count == len(SCHEDULERS)


@pytest.mark.skipif(not known_models(), reason="needs the extra devices")
def test_queries_are_timed_for_each_deployment() -> None:
    rows = measure_queries(queries=50)
    assert [row["deployment"] for row in rows] == list(QUERIED)
    assert all(row["decodes_query_us"] > 0 and row["chunk_query_us"] > 0 for row in rows)
    assert query_table(rows).row_count == len(QUERIED)
