"""The `vllm-sarathi` command: a thin door, with errors in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.test_house import BLOCKER
from vllm_sarathi import __version__
from vllm_sarathi.benchmark.live import demo
from vllm_sarathi.cli import app
from vllm_sarathi.cli.errors import clear_errors

runner = CliRunner()


def test_the_door_is_thin() -> None:
    heavy = "{'vllm', 'torch', 'transformers', 'matplotlib', 'httpx'}"
    code = f"import sys, vllm_sarathi.cli; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_version() -> None:
    assert runner.invoke(app, ["version"]).output.strip() == __version__


@pytest.mark.parametrize("budget", ["0", "-3"])
def test_a_bad_budget_is_refused_by_name_and_value_before_a_server_starts(budget: str) -> None:
    result = runner.invoke(app, ["demo", "--model", "m", "--token-budget", budget])
    assert result.exit_code == 1
    assert f"error: --token-budget {budget}" in result.output


def test_a_budget_that_is_no_number_is_refused_by_name() -> None:
    result = runner.invoke(app, ["demo", "--model", "m", "--token-budget", "many"])
    assert result.exit_code == 2
    assert "--token-budget" in result.output


def test_what_a_user_can_cause_is_one_sentence_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the server died while starting")

    monkeypatch.setattr(demo, "run_demo", fail)
    result = runner.invoke(app, ["demo", "--model", "m", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: the server died while starting" in result.output


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_sarathi.benchmark.live.demo")
    monkeypatch.delitem(sys.modules, "vllm_sarathi.benchmark.live.timeline", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    result = runner.invoke(app, ["demo", "--model", "m"])
    assert result.exit_code == 1
    assert "pip install 'vllm-sarathi[bench]'" in result.output


def test_a_missing_vllm_is_one_sentence() -> None:
    code = BLOCKER.format(blocked={"vllm"}, names=[]) + "from vllm_sarathi.cli import main\nmain()"
    words = ["simulate", "--deployment", "mistral-7b/a100", "--rate", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this command needs vLLM, which is not installed: pip install ")
    assert len(done.stderr.splitlines()) == 1


def test_an_import_error_of_another_kind_keeps_its_traceback() -> None:
    with pytest.raises(ImportError, match="cannot import name"), clear_errors():
        raise ImportError("cannot import name 'LLM' from 'vllm'")
