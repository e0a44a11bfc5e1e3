"""The benchmark: what each method may spend, what a row says, and that a cut-off run goes on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from autolrs_plugin.benchmark import runner
from autolrs_plugin.benchmark.methods import Assignment, Outcome, cosine, wsd
from autolrs_plugin.benchmark.runner import METHODS, Options, measure_eval_cost, run_bench
from autolrs_plugin.benchmark.table import Run, rows, spread, steps_to, summary_table, targets, task_table
from autolrs_plugin.benchmark.tasks import IGNORED, TASKS, Problem, Task
from autolrs_plugin.cli import app

C = 200
EVAL_COST = 1.5


def build(seed: int) -> Problem:
    """A linear classifier of two noisy clouds."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 8)).astype(np.float32))
    y = (x[:, 0] + 0.5 * torch.from_numpy(rng.normal(size=200).astype(np.float32)) > 0).long()
    torch.manual_seed(seed)

    def draw(generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.from_numpy(generator.integers(0, 150, 8))
        return x[index], y[index]

    return Problem(torch.nn.Linear(8, 2), draw, [(x[150:], y[150:])])


TOY = Task("toy", C, build, kind="SGD, momentum 0.9", default_lr=1e-3, grid=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "greedylr"])
def test_a_method_spends_no_more_than_c(method: str) -> None:
    assert_within_budget(method)


@pytest.mark.slow
def test_greedylr_spends_no_more_than_c() -> None:
    assert_within_budget("greedylr")  # imports transformers


def assert_within_budget(method: str) -> None:
    taken: list[Any] = []
    outcome = METHODS[method](Assignment(TOY, 3, C, EVAL_COST, on_steps=taken.append))
    allowed = 5 * (C + EVAL_COST) if method == "oracle" else C
    # Successive halving begins no trial that it cannot finish.
    assert 0.7 * allowed <= outcome.steps_total <= allowed
    # Every training step is on the account, and the evaluations besides.
    assert sum(taken) <= outcome.steps_total + 1e-6
    assert 0 <= outcome.steps_search < outcome.steps_total
    assert math.isfinite(outcome.final_val_loss)
    assert [cost for cost, _ in outcome.curve] == sorted(cost for cost, _ in outcome.curve)


def test_ours_is_told_only_a_range_and_shares_seed_weights_and_data_with_the_peers() -> None:
    outcome = METHODS["autolrs"](Assignment(TOY, 0, C, EVAL_COST))
    assert outcome.steps_search / outcome.steps_total <= 0.25
    assert set(outcome.overheads) == {"deciding", "snapshot_steps"}
    again = METHODS["autolrs"](Assignment(TOY, 0, C, EVAL_COST))
    assert (again.lr, again.final_val_loss) == (outcome.lr, outcome.final_val_loss)


def test_the_oracle_keeps_the_best_of_its_cosines() -> None:
    outcome = METHODS["oracle"](Assignment(TOY, 0, C, EVAL_COST))
    assert outcome.lr in TOY.grid
    assert outcome.final_val_loss <= METHODS["cosine"](Assignment(TOY, 0, C, EVAL_COST)).final_val_loss


@pytest.mark.parametrize("shape", [cosine, wsd])
def test_schedules_warm_up_to_their_peak_and_decay(shape: Any) -> None:
    lr_at = shape(0.1, 100)
    lrs = [lr_at(t) for t in range(100)]
    assert lrs[0] < lrs[3] < max(lrs) == pytest.approx(0.1)
    assert lrs[-1] < 0.006
    assert lrs[5:] == sorted(lrs[5:], reverse=True)


def run_of(method: str, seed: int, loss: float, curve: list[list[float]] | None = None) -> Run:
    return Run("toy", method, seed, 0.1, loss, 100.0, 20.0, 1.0, curve or [], {})


def test_the_target_is_the_oracles_loss_of_the_same_seed_plus_five_percent() -> None:
    runs = [run_of("oracle", 0, 1.0), run_of("oracle", 1, 2.0), run_of("cosine", 1, 2.09)]
    assert targets(runs) == {("toy", 0): 1.05, ("toy", 1): 2.1}
    curve = [[10, 3.0], [20, 2.1], [30, 2.2]]
    made = rows([*runs, run_of("wsd", 1, 2.2, curve)])
    assert made[-1]["steps_to_target"] == 20
    assert made[-1]["target"] == 2.1
    assert set(made[-1]) == {
        "task",
        "method",
        "seed",
        "lr",
        "final_val_loss",
        "steps_total",
        "steps_search",
        "seconds",
        "steps_to_target",
        "target",
        "first_val_loss",
        "regret",
    }
    assert steps_to(curve, 0.5) is None
    assert steps_to(curve, None) is None


def test_a_run_that_diverged_is_null_in_json_and_last_in_the_table() -> None:
    runs = [run_of("constant", 0, math.inf), run_of("autolrs", 0, 0.5)]
    assert rows(runs)[0]["final_val_loss"] is None
    table = task_table("toy", 100, runs)
    assert list(table.columns[0].cells) == ["autolrs", "constant"]
    assert list(table.columns[2].cells) == ["0.5000", "diverged (1 of 1)"]
    assert spread([1.0, 2.0]) == "1.5000 ± 0.7071"


def options(tmp_path: Path, seeds: int = 2, quick: bool = False) -> Options:
    return Options((TOY,), ("fake", "oracle"), seeds, quick, tmp_path / "out", tmp_path / "rows.json")


def test_the_summary_has_the_worst_run_beside_the_mean() -> None:
    runs = [
        replace(run_of(method, seed, loss), task=task, first_val_loss=2.0)
        for method, losses in {"oracle": (1.0, 1.0), "ours": (1.1, 1.3), "lost": (math.inf, 1.0)}.items()
        for seed, loss in enumerate(losses)
        for task in ("toy", "other")
    ]
    columns = {column.header: list(column.cells) for column in summary_table(runs).columns}
    assert columns["method"] == ["oracle", "ours", "lost"]
    assert columns["mean regret"] == ["0.000", "0.200", "inf"]
    assert columns["worst run"] == ["0.000", "0.300", "inf"]
    assert columns["which"][1] == "toy, seed 1"
    assert columns["runs"] == ["4"] * 3


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def fake(a: Assignment) -> Outcome:
        ran.append((a.seed, a.steps))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return Outcome(0.1, 0.5 + a.seed, a.steps, 0, [(a.steps, 0.5)])

    monkeypatch.setattr(runner, "METHODS", {"fake": fake, "oracle": fake})
    with pytest.raises(KeyboardInterrupt):
        run_bench(options(tmp_path), Console(quiet=True))
    assert len(ran) == 3
    runs = run_bench(options(tmp_path), Console(quiet=True))
    assert len(ran) == 5  # the two that were missing
    assert [(r.method, r.seed) for r in runs] == [("fake", 0), ("oracle", 0), ("fake", 1), ("oracle", 1)]
    told = json.loads((tmp_path / "rows.json").read_text())
    assert told["schema"] == 1
    assert len(told["rows"]) == 4
    assert (tmp_path / "out" / "toy.png").stat().st_size > 0
    # Another C is another result.
    run_bench(replace(options(tmp_path), quick=True), Console(quiet=True))
    assert ran[-1] == (1, 50)


def test_a_cost_that_was_half_written_is_not_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure_eval_cost", lambda task, problem: EVAL_COST)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            runner._eval_cost_steps(tmp_path, TOY)
    assert runner._eval_cost_steps(tmp_path, TOY) == EVAL_COST


def test_the_cost_of_an_evaluation_is_measured() -> None:
    problem = build(0)
    step_like = replace(problem, validation=[(torch.zeros(8, 8), torch.zeros(8, dtype=torch.long))])
    large = replace(
        problem, validation=[(torch.zeros(20_000, 8), torch.zeros(20_000, dtype=torch.long))] * 20
    )
    assert measure_eval_cost(TOY, large) > 3 * measure_eval_cost(TOY, step_like)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "mnist"], "mnist-resnet"),
        (["--task", "stdlib-gpt", "--methods", "cosine,adamax"], "schedule-free"),
        (["--task", ","], "nothing"),
        (["--task", "stdlib-gpt", "--seeds", "0"], "greater than or equal to 1"),
    ],
)
def test_the_command_refuses_unknown_names(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 2
    assert said in result.output.replace("\n", " ")
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize("command", ["bench", "bench-find", "bench-parallel"])
def test_a_folder_in_place_of_the_file_of_rows_is_told_of_first(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(app, [command, "--json", str(tmp_path)])
    assert result.exit_code == 2
    words = result.output.replace("│", " ").split()
    assert "is a folder; give the name of a file" in " ".join(words)


@pytest.mark.parametrize("name", ["mnist-resnet", "stdlib-gpt", "bert-mlm"])
def test_a_task_is_real_data_with_targets_that_count(name: str) -> None:
    problem = TASKS[name].build(0)
    inputs, goals = problem.draw(np.random.default_rng(0))
    assert len(inputs) == len(goals)
    untrained, loss = problem.validate(), problem.loss((inputs, goals)).item()
    classes = problem.model(inputs).shape[-1]
    assert 0.5 * math.log(classes) < loss < 2 * math.log(classes)  # untrained: about a guess
    held_out = torch.cat([x.flatten(1) for x, _ in problem.validation])
    assert not any((row == held_out).all(1).any() for row in inputs.flatten(1))
    if name == "bert-mlm":
        assert 0.05 < float((goals != IGNORED).float().mean()) < 0.25
    assert TASKS[name].build(0).validate() == untrained != TASKS[name].build(1).validate()
    assert problem.model.training


def test_the_command_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ["bench", "--task", "stdlib-gpt", "--methods", "constant", "--quick"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(path), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.read_text())["rows"]
    assert row["method"] == "constant"
    assert row["target"] is None
    assert 2 < row["final_val_loss"] < 5


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("optuna is not installed"), FileNotFoundError("no model")]
)
def test_what_is_missing_is_a_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As the reference says of every error that a user can cause."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(runner, "run_bench", fails)
    done = CliRunner().invoke(app, ["bench", "--task", "lee-gru", "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 2
    assert done.output.strip() == f"error: {error}"
