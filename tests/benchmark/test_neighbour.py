"""The neighbour of the live benchmark: busy, then quiet, and gone at the end."""

import itertools
import os
import time

import psutil
import pytest

from vllm_sarathi.benchmark.live.neighbour import busy_neighbour


def test_it_works_and_rests_by_turns_and_ends_with_the_context() -> None:
    with busy_neighbour(0.4) as pid:
        process, used_s = psutil.Process(pid), []
        for _ in range(20):
            time.sleep(0.2)
            used_s.append(sum(process.cpu_times()[:2]))
        steps = [later - earlier for earlier, later in itertools.pairwise(used_s)]
        assert sum(step > 0.02 for step in steps) >= 3
        assert sum(step < 0.02 for step in steps) >= 3
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
