"""The command `autolrs`, on journals of previewed runs: what it prints, writes and refuses."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from autolrs_plugin.cli import app
from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.journal import FILE_NAME, Checkpoint, Journal
from autolrs_plugin.core.plans import PLANS
from autolrs_plugin.core.preview import Preview, preview_run
from autolrs_plugin.core.schedule import Schedule, phases, run_curve
from autolrs_plugin.core.state import Candidate, Stage
from autolrs_plugin.report import stage_table

CONFIG = AutoLRSConfig(max_steps=300, lr_range=(1e-5, 1.0))
RUNNER = CliRunner()


def journal_of(preview: Preview, folder: Path, actions: int | None = None) -> Path:
    """Write the journal that a run would have; of its first `actions` only, if given."""
    folder.mkdir()
    config = preview.controller.config.to_mapping()
    journal = Journal.create(folder / FILE_NAME, config, {}, Checkpoint("0", "0"))
    for action, result in preview.actions[:actions]:
        journal.intend(action, {"deciding_s": 0.5, "bookkeeping_s": 0.25})
        losses = result.losses
        eval_s = 0.5 if result.val_loss is not None else 0.0
        journal.complete(Result(losses, result.val_loss, 0.1 * len(losses) + eval_s + 0.05, eval_s))
    if actions is None:
        journal.intend(preview.controller.next(), {"deciding_s": 1.5, "bookkeeping_s": 2.5})
    journal.close()
    return folder


@pytest.fixture(scope="module")
def preview() -> Preview:
    return preview_run(CONFIG)


@pytest.fixture
def run(preview: Preview, tmp_path: Path) -> Path:
    return journal_of(preview, tmp_path / "run")


def output(*arguments: object, code: int = 0) -> str:
    done = RUNNER.invoke(app, [str(a) for a in arguments], terminal_width=200)
    assert done.exit_code == code, done.output + repr(done.exception)
    return " ".join(done.output.split())


def test_show_prints_stages_candidates_forecasts_and_costs(run: Path, preview: Preview) -> None:
    printed, played = output("show", run), preview.controller
    assert "300 of 300 steps, complete; lr_range 1e-05 to 1, mode staged" in printed
    assert f"search: {played.ledger.search.steps} steps on top" in printed
    left = 0.25 * 300 - played.state.search_cost_steps
    assert f"{left:.0f} of its budget of 75 steps are left" in printed
    assert "forecast: the loss that the search went by, with its standard deviation" in printed
    for stage in played.stages:
        assert (
            f"stage {stage.index} ({stage.kind}) at step {stage.first_step}: {stage.chosen_lr:.3g}" in printed
        )
        for candidate in stage.candidates:
            forecast = "diverged" if candidate.diverged else f"{candidate.forecast:.4f} {candidate.std:.4f}"
            assert f"{candidate.lr:.3g} {len(candidate.losses)} {candidate.losses[-1]:.4f}" in printed
            assert forecast in printed
    assert f"training {played.ledger.train.times} 300" in printed
    # Deciding and bookkeeping are those of the run as it was, not those of reading it again.
    assert "deciding 1.5" in printed
    assert "bookkeeping 2.5" in printed
    assert "of a training step, an evaluation" in printed


@pytest.mark.parametrize("chosen", [0, 1, None], ids=["first", "second", "none of them"])
def test_show_marks_the_rate_that_was_chosen_and_no_other(chosen: int | None) -> None:
    candidates = tuple(Candidate(lr, (lr,), (1.0,), None, 1.0, 0.1) for lr in (0.01, 0.1))
    lr = 0.05 if chosen is None else candidates[chosen].lr
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(stage_table(Stage(0, 0, "planned", candidates, lr, 2, "")))
    lines = [line.strip() for line in console.export_text().splitlines()]
    marked = [line.split()[1] for line in lines if line.startswith(">")]
    assert marked == [f"{lr:.3g}"]


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_the_phases_are_those_of_the_curve(steps: int, decay: bool, warmup: float) -> None:
    config = AutoLRSConfig(max_steps=steps, lr_range=(1e-5, 1.0), warmup=warmup, final_decay=decay)
    curve = [run_curve(t, config) for t in range(steps)]
    lengths = phases(config)
    first, last = lengths["warm-up"], lengths["warm-up"] + lengths["plateau"]
    assert sum(lengths.values()) == steps
    assert all(a < b for a, b in itertools.pairwise(curve[: first + 1]))
    assert set(curve[first : last + 1]) <= {1.0}  # the first step of the decay still has all of it
    assert all(a > b for a, b in itertools.pairwise(curve[last:]))


def test_a_run_that_is_going_on_can_be_looked_at(preview: Preview, tmp_path: Path) -> None:
    run = journal_of(preview, tmp_path / "half", actions=len(preview.actions) // 2)
    assert "not complete" in output("show", run)
    assert "so far" in output("export", run, "-o", tmp_path / "half.json")
    output("plot", run, "-o", tmp_path / "half.png")
    first = journal_of(preview, tmp_path / "first", actions=1)
    assert "0 of 300 steps, not complete" in output("show", first)
    assert "no training step yet" in output("export", first, "-o", tmp_path / "none.json", code=2)
    output("plot", first, "-o", tmp_path / "first.png")
    assert not (tmp_path / "none.json").exists()


def test_plot_draws_a_picture(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    assert str(picture) in output("plot", run, "-o", picture)
    assert picture.read_bytes()[1:4] == b"PNG"
    for name in ("out", "out.xyz"):
        assert f"{name}': must have the extension of a picture; valid: " in output(
            "plot", run, "-o", tmp_path / name, code=2
        )


def test_export_writes_the_schedule_bit_for_bit(run: Path, preview: Preview, tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    output("export", run, "-o", out)
    assert Schedule.load(out) == preview.controller.schedule
    assert json.loads(out.read_text())["lrs"] == list(preview.controller.schedule.lrs)


def test_a_folder_in_the_place_of_a_file_is_named(run: Path, tmp_path: Path) -> None:
    for arguments in (["export", run], ["plot", run], ["export", run, "-o", tmp_path / "s.json", "--fields"]):
        last = [tmp_path] if arguments[-1] == "--fields" else ["-o", tmp_path]
        assert f"error: {str(tmp_path)!r}: is a folder; give a file in it." in output(
            *arguments, *last, code=2
        )
    assert not (tmp_path / "s.json").exists()


def test_a_missing_folder_is_not_made(run: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command, file in (("export", "s.json"), ("plot", "run.png")):
        said = output(command, run, "-o", missing / file, code=2)
        assert f"there is no folder {str(missing)!r}; make it, or give another." in said
    fields = output("export", run, "-o", tmp_path / "s.json", "--fields", missing / "four.json", code=2)
    assert "there is no folder" in fields
    assert not missing.exists()
    assert not (tmp_path / "s.json").exists()


def test_a_run_that_was_decided_otherwise_can_still_be_exported(
    run: Path, preview: Preview, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version decides otherwise: its stages are refused, its schedule is what it is."""
    monkeypatch.setitem(PLANS, "staged", lambda state: iter([Probe(0, 0, (0.123,), 9.0, False)]))
    assert "would now be" in output("show", run, code=2)
    output("export", run, "-o", tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == preview.controller.schedule


@pytest.mark.parametrize("mode", ["staged", "paper"])
def test_preview_says_what_a_run_would_do(mode: str, tmp_path: Path) -> None:
    picture = tmp_path / "preview.png"
    printed = output("preview", "--max-steps", 300, "--lr-range", "1e-5,1", "--mode", mode, "-o", picture)
    played = preview_run(AutoLRSConfig(max_steps=300, lr_range=(1e-5, 1.0), mode=mode)).controller
    assert f"300 steps, lr_range 1e-05 to 1, mode {mode}" in printed
    assert printed.count("search: ") == len(played.stages)
    assert f"{300 + played.ledger.search.steps} steps in all" in printed
    assert f"{played.ledger.search_share:.1%} of them for the search" in printed
    if mode == "staged":
        assert "warm-up 0 0 15" in printed
        # The plateau is what lies between: its last step is that before the rate falls.
        assert "plateau 15 4 225" in printed
        assert "decay 240 1 60" in printed
    assert picture.read_bytes()[1:4] == b"PNG"


def test_preview_takes_the_settings() -> None:
    printed = output(
        "preview", "--max-steps", 200, "--lr-range", "1e-3,0.1", "--no-final-decay", "--no-validation",
        "--warmup", 0, "--search-budget", 0.5, "--best-lr", 0.02, "--seed", 3,
    )  # fmt: skip
    assert "warm-up 0 0 0" in printed
    assert "plateau 0 0 200" in printed
    assert "decay 200 0 0" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nowhere"], "nowhere/journal.jsonl: cannot be read (No such file or directory)"),
        (["plot", "nowhere", "-o", "x.png"], "cannot be read"),
        (["export", "nowhere", "-o", "x.json"], "cannot be read"),
        (["preview", "--max-steps", 0, "--lr-range", "1e-5,1"], "max_steps=0: must be a whole number"),
        (["preview", "--max-steps", -5, "--lr-range", "1e-5,1"], "max_steps=-5"),
        (["preview", "--max-steps", 10, "--lr-range", "1,1e-5"], "lr_range=[1.0, 1e-05]: is reversed"),
        (["preview", "--max-steps", 10, "--lr-range", "1,1"], "is empty"),
        (["preview", "--max-steps", 10, "--lr-range", "a,b"], "lr_range='a,b': must be two numbers"),
        (["preview", "--max-steps", 10, "--lr-range", "1e-5"], "two finite numbers"),
        (["preview", "--max-steps", 10, "--lr-range", "1e-5,1", "--search-budget", 1.5], "search_budget=1.5"),
        (["preview", "--max-steps", 10, "--lr-range", "1e-5,1", "--mode", "x"], "mode='x': unknown"),
        (["preview", "--max-steps", 10, "--lr-range", "1e-5,1", "--best-lr", 2], "best_lr=2.0: must lie"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_and_code_2(
    arguments: list[object], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = output(*arguments, code=2)
    assert printed.startswith("error: ")
    assert says in printed
    assert not list(tmp_path.iterdir())


def test_a_corrupted_journal_is_refused(run: Path, tmp_path: Path) -> None:
    data = bytearray((run / FILE_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (run / FILE_NAME).write_bytes(data)
    for arguments in (
        ["show", run],
        ["plot", run, "-o", tmp_path / "x"],
        ["export", run, "-o", tmp_path / "x"],
    ):
        assert "is corrupted; nothing of this journal is used" in output(*arguments, code=2)
    assert not (tmp_path / "x").exists()


def test_no_command_needs_torch(run: Path, tmp_path: Path) -> None:
    commands = [
        ["show", str(run)],
        ["plot", str(run), "-o", str(tmp_path / "a.png")],
        ["export", str(run), "-o", str(tmp_path / "a.json")],
        ["preview", "--max-steps", "200", "--lr-range", "1e-4,1"],
        ["version"],
    ]
    code = (
        "import sys\nfrom autolrs_plugin.cli import app\n"
        f"for words in {commands!r}:\n    app(words, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "a.json").exists()
