"""Kill -9 at any moment: the run resumes to the same bits, and repeats at most the action that it was killed in.

`python -m tests.autolrs.killing FOLDER --moments 50 --writes 400` tries 50 random moments and every write.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autolrs_plugin.report import load_run


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    arguments = ["--moments", "6", "--again", "1", "--writes", "8", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.autolrs.killing", str(tmp_path / "runs"), *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
        check=False,
    )
    assert done.returncode == 0
    whole = load_run(tmp_path / "runs" / "trial-0" / "run")
    # Whether there is a climb, or a chunk that is taken back, too, goes by the last bits of a CPU's arithmetic.
    assert "planned" in {stage.kind for stage in whole.stages}
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == 15
    assert sum(trial["kills"] for trial in trials) >= 15
    for trial in trials:
        assert trial["same"], trial
        assert trial["in_order"], trial
        assert 0 <= trial["repeated"] <= trial["kills"], trial


@pytest.mark.slow
def test_a_rank_that_is_killed_at_any_moment_costs_no_bit(tmp_path: Path) -> None:
    """`python -m tests.autolrs.killing_ranks FOLDER --moments 50` tries 50 moments."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.autolrs.killing_ranks", str(tmp_path / "runs"), "--moments", "3"],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
        check=False,
    )
    assert done.returncode == 0
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == 3
    assert all(trial["same"] for trial in trials), trials
