"""What docs/how-to says works as it stands there, with stand-ins for what it uses of the packages.

They call the callback as LLaMA-Factory 0.9.5 (`run_exp`) and Axolotl 0.19.0 (`get_callbacks` of its builders, and
`post_train` of its plugins) do.
"""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from autolrs_plugin.cli import app
from tests.autolrs.integrations import task
from tests.test_house import ROOT

STEPS = 160
"""Enough for a search."""


def code_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to" / page).read_text(), flags=re.DOTALL)
    return code


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    """Make a module, and the packages that it is in, importable."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(names)


def train(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": STEPS, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(folder), disable_tqdm=True, **settings, **options)
    trainer = Trainer(task.Net(), args, train_dataset=task.Pictures(), callbacks=callbacks)
    trainer.train()
    return trainer


def shown(run: Path) -> str:
    done = CliRunner().invoke(app, ["show", str(run)])
    assert done.exit_code == 0, done.output
    assert "stage 0 (planned)" in done.output
    return done.output


def test_the_page_on_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_exp(args: Any = None, callbacks: list[Any] | None = None) -> None:
        train(tmp_path, callbacks or [])

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    monkeypatch.chdir(tmp_path)
    exec(code_of("llama-factory.md"), {"__name__": "__main__"})
    assert f"{STEPS} of {STEPS} steps, complete" in shown(tmp_path / "runs/llama-factory")


def test_the_page_on_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names: dict[str, Any] = {}
    exec(code_of("axolotl.md"), names)
    plugin, cfg = names["AutoLRSPlugin"](), SimpleNamespace(output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="lr_scheduler_type='cosine': conflicts with AutoLRS"):
        train(tmp_path, plugin.add_callbacks_pre_trainer(cfg, None), lr_scheduler_type="cosine")
    train(tmp_path, plugin.add_callbacks_pre_trainer(cfg, None), lr_scheduler_type="constant")
    plugin.post_train(cfg, None)
    assert f"{STEPS} of {STEPS} steps, complete" in shown(tmp_path / "out/autolrs")


def test_the_settings_on_the_page_are_those_that_are_needed() -> None:
    page = (ROOT / "docs/how-to/axolotl.md").read_text()
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert "lr_scheduler: constant\n" in settings
    assert "  - autolrs_axolotl.AutoLRSPlugin\n" in settings
    assert "# autolrs_axolotl.py\n" in code_of("axolotl.md")
