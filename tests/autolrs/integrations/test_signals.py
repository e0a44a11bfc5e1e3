"""A handler of a signal that comes in a probe inside of a framework: it sees the real step, and what it sets stays."""

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer

from autolrs_plugin.integrations.accelerate import AutoLRS
from tests.autolrs.integrations.test_transactions import (
    CALLS,
    PLAN,
    STEPS,
    CallsAt,
    Module,
    Net,
    Numbered,
    X,
    Y,
    arguments,
    fit,
    loader,
    tuned,
)
from tests.autolrs.scripted import script

ASKED = signal.SIGUSR1


@pytest.fixture
def install() -> Iterator[Callable[[Any], Any]]:
    """Installs a handler, and puts the one before it back."""
    CALLS.held.clear()
    before = signal.getsignal(ASKED)
    yield lambda handler: signal.signal(ASKED, handler)
    signal.signal(ASKED, before)


def ask(module: Any) -> None:
    signal.raise_signal(ASKED)


def test_what_a_handler_asks_a_trainer_for_in_a_probe_is_done(tmp_path: Path, install: Any) -> None:
    class Sent(Trainer):
        sent = CallsAt(3, ask)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.sent(self.model)
            return loss

    def handler(number: int, frame: Any) -> None:
        trainer.control.should_save = trainer.control.should_training_stop = True
        cast(Any, trainer.model).stop = True
        trainer.accelerator.save_state(str(tmp_path / "state"))

    model, tuner = Net(), tuned()
    options = {"save_strategy": "steps", "save_steps": 1000}
    trainer = Sent(model, arguments(tmp_path, **options), train_dataset=Numbered(), callbacks=[tuner])
    install(handler)
    with script(PLAN):
        trainer.train()
    assert model.stop
    saved = load_file(tmp_path / "state" / "model.safetensors")["layer.weight"]
    assert torch.equal(saved, Net().layer.weight)
    assert trainer.state.global_step == 1
    assert (tmp_path / "checkpoint-1").is_dir()
    assert tuner.ledger.search.steps == 3 + 5
    assert signal.getsignal(ASKED) is handler


@pytest.mark.parametrize("number", [1, 3])
def test_what_a_handler_sets_on_a_lightning_module_in_a_probe_stays(
    number: int, tmp_path: Path, install: Any
) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or pl_module.stop

    def handler(number: int, frame: Any) -> None:
        module.stop = True
        torch.save(module.state_dict(), tmp_path / "saved.pt")

    module = Module(CallsAt(number, ask))
    module.stop = False
    weight = module.layer.weight.detach().clone()
    install(handler)
    with pytest.raises(AssertionError):  # `fit` counts the steps of the search, which was left
        fit(tmp_path, module, loader(), True, None, Stops())
    assert module.stop
    assert torch.equal(torch.load(tmp_path / "saved.pt", weights_only=True)["layer.weight"], weight)
    assert module.trainer.global_step == 1


def test_what_a_handler_sets_beside_an_accelerator_in_a_probe_stays(tmp_path: Path, install: Any) -> None:
    def run(sends: bool) -> tuple[Net, bool, int]:
        CALLS.held.clear()
        accelerator, model = Accelerator(cpu=True), Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer, batches = accelerator.prepare(
            model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=8)
        )
        model.stop = False
        send = CallsAt(3 if sends else 0, ask)

        def handler(number: int, frame: Any) -> None:
            model.stop = True
            torch.save(model.state_dict(), tmp_path / "saved.pt")

        def step(batch: Any) -> torch.Tensor:
            loss = model(*batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            send(model)
            return loss

        install(handler)
        limits: dict[str, Any] = {"max_steps": STEPS, "lr_range": (1e-3, 1.0)}
        with script(PLAN):
            tuner = AutoLRS(accelerator, model, optimizer, batches, step, progress=False, **limits)
            for _, batch in zip(range(STEPS), itertools.chain(batches, batches), strict=False):
                tuner.step(batch)
        return model, model.stop, tuner.ledger.search.steps

    whole, stopped, _ = run(False)
    assert not stopped
    asked, stopped, taken = run(True)
    assert stopped
    assert taken == 3 + 5
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)["layer.weight"]
    assert torch.equal(saved, Net().layer.weight)
    assert torch.equal(asked.layer.weight, whole.layer.weight)
