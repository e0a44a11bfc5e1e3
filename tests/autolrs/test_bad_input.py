"""What cannot work is refused with the argument's name, before anything is trained on it."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Evaluate, Probe, Restore, Snapshot, Train
from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.journal import JournalError
from autolrs_plugin.core.plans.finite import NotFiniteError
from autolrs_plugin.training.loop import as_number
from tests.autolrs.jobs import Job, bits, outside
from tests.autolrs.scripted import PROBING, script


def tuner(job: Job, **changes: Any) -> AutoLRS:
    arguments = {
        "max_steps": 7,
        "lr_range": (1e-3, 1.0),
        "train_step": job.step,
        "validate": job.validate,
        "progress": False,
    }
    return AutoLRS(job.model, job.optimizer, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr_range": (1.0, 1e-3)}, "lr_range=.*: is reversed"),
        ({"lr_range": (0.1, 0.1)}, "lr_range=.*: is empty"),
        ({"lr_range": ()}, "lr_range="),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"search_budget": 0.0}, "search_budget=0.0"),
        ({"search_budget": 1.5}, "search_budget=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"warm_up": 0.1}, "unknown setting 'warm_up'; did you mean 'warmup'"),
        ({"keep": "tape"}, "keep='tape': unknown; valid: host, device, disk"),
        ({"resume": "yes"}, "resume='yes': must be 'auto', True or False"),
        ({"probe_data": [1]}, "probe_data: was given without train_data"),
        ({"train_data": [1], "data": object()}, "data: was given together with train_data"),
        ({"run_dir": ""}, "run_dir='': is empty; give the path of a folder"),
        ({"run_dir": "~no-such-user/run"}, "run_dir='~no-such-user/run': that user has no home folder"),
        ({"resume": [1, 2]}, r"resume=\[1, 2\]: must be 'auto', True or False"),
        ({"resume": torch.ones(2)}, r"resume=tensor\(.*: must be 'auto', True or False"),
        ({"progress": "x"}, "progress='x': must be True or False"),
        ({"progress": 3}, "progress=3: must be True or False"),
        ({"warm_start": ""}, "warm_start='': is empty; give the folder of an earlier run"),
        ({"resume": 1}, "resume=1: must be 'auto', True or False"),
        ({"prior": 50.0}, r"prior=50.0: is outside of lr_range=\(0.001, 1\); give a rate in it, or None"),
        (
            {"prior": torch.ones(2)},
            r"prior=\[1.0, 1.0\]: must be 'optimizer', a learning rate above 0, or None",
        ),
        (
            {"count_tokens": len},
            "count_tokens: was given without train_data, so there are no batches to count",
        ),
    ],
)
def test_a_bad_value_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    job = Job()
    before = job.bits()
    with pytest.raises(ValueError, match=says):
        tuner(job, **changes)
    assert job.bits() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_step": 3}, "train_step: an int cannot be called"),
        ({"train_step": lambda batch: 1.0}, "train_step: takes a batch, so train_data= is needed"),
        ({"train_data": [1]}, "train_step: takes no batch, but train_data was given"),
        ({"train_step": lambda b: 1.0, "train_data": iter([1])}, "train_data: a list_iterator can be iterated only"),
        ({"train_step": lambda b: 1.0, "train_data": 3}, "train_data: an int is neither iterable nor a function"),
        ({"train_step": lambda b: 1.0, "train_data": {"a": [1]}}, "train_data: a dict gives its keys, and no batches"),
        ({"train_step": lambda b: 1.0, "train_data": {1, 2}}, "train_data: a set has no order that lasts; give"),
        ({"data": object()}, "data: an object has no state_dict"),
        ({"scaler": 3}, "scaler: an int has no state_dict"),
        ({"stateful": {"ema": torch.zeros(1)}}, "ema: a Tensor has no state_dict.* so leave it out"),
        ({"stateful": {"ema": 3}}, "ema: an int has no state_dict"),
        ({"generators": [3]}, "generators: an int is none"),
        ({"tensorboard": 3}, "tensorboard: an int is neither a folder"),
        ({"validate": lambda model: 1.0}, "validate: needs an argument, and is called without any; give a function"),
        ({"train_step": lambda a, b: 1.0, "train_data": [1]}, "train_step: needs more than a batch"),
        ({"train_step": lambda b: 1.0, "train_data": "data.txt"}, "train_data: 'data.txt' is a text, and no batches"),
        ({"train_step": lambda b: 1.0, "train_data": DataLoader}, "train_data: the class DataLoader is neither"),
        ({"train_step": lambda b: 1.0, "train_data": lambda epoch: [1]}, "train_data: is a function that needs an arg"),
        ({"run_dir": 3}, "run_dir=3: is an int; give the path of a folder, a string or a Path"),
        ({"run_dir": b"run"}, "run_dir=b'run': is a bytes; give the path of a folder"),
        ({"stateful": [nn.Linear(1, 1)]}, "stateful: a list has no names; give a dictionary"),
        ({"stateful": {1: nn.Linear(1, 1)}}, "stateful: the name 1 is an int; give each object a name, a string"),
        ({"stateful": {"ema": nn.Linear}}, "ema: the class Linear has no state_dict"),
        ({"generators": torch.Generator()}, r"generators: a Generator is not a list; give generators=\[...\]"),
        ({"observers": print}, r"observers: a builtin_function_or_method is not a list; give observers=\[...\]"),
        ({"observers": [print]}, r"observers: a builtin_function_or_method has no on_action\(\); it needs"),
        ({"probes": int}, r"probes: the class int has no attach\(\); it needs the methods attach, probe, forget"),
        ({"train_step": lambda b: 1.0, "train_data": [1], "count_tokens": 5}, "count_tokens: an int cannot be called"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        tuner(Job(), **changes)


def test_an_optimizer_that_cannot_train_the_model_is_refused() -> None:
    job = Job()
    for optimizer, says in (
        (
            torch.optim.SGD([{"params": []}], lr=0.1),
            "optimizer: has no parameters; there is nothing to train",
        ),
        (
            torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
            "none of its parameters belongs to the model",
        ),
        (torch.optim.SGD(job.model.parameters(), lr=0.0), r"the lr of param_groups\[0\] is 0"),
    ):
        job.optimizer = optimizer
        with pytest.raises(ValueError, match=says):
            tuner(job)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="'weight' is uninitialised; pass one batch"):
        AutoLRS(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1), max_steps=7, lr_range=(0.1, 1.0))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2).requires_grad_(False), "model: none of the parameters that the optimizer has requires a grad"),
        (nn.Linear(2, 2, device="meta"), "model: the parameter 'weight' is on the meta device, where it has no values"),
    ],
)  # fmt: skip
def test_a_model_that_no_step_can_train_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AutoLRS(model, torch.optim.SGD(model.parameters(), lr=0.1), max_steps=7, lr_range=(0.1, 1.0))


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (lambda: None, TypeError, "train_data: returned a NoneType; it must return the batches of an epoch"),
        (functools.partial(iter, iter([])), ValueError, "has no batches; the function must return a new iterator each"),
    ],
)  # fmt: skip
def test_a_function_that_returns_no_epoch_is_named(source: Any, error: type[Exception], says: str) -> None:
    job = Job()
    with script([Train(0, (0.1,))]), pytest.raises(error, match=says):
        tuner(job, train_step=lambda batch: job.step(), train_data=source).run()


@pytest.mark.parametrize(
    ("value", "counted"), [(5, 5), (np.int64(5), 5), (torch.tensor(5), 5), (5.5, 0), ("5", 0)]
)
def test_tokens_are_whole_numbers(value: object, counted: int) -> None:
    job = Job()
    with script([Train(0, (0.1,) * 7)]):
        made = tuner(
            job, train_step=lambda batch: job.step(), train_data=[1], count_tokens=lambda batch: value
        )
        if counted:
            made.run()
            assert made.ledger.train.tokens == 7 * counted
            return
        with pytest.raises(TypeError, match=r"count_tokens: returned 5.* it must return a whole number"):
            made.run()


@pytest.mark.parametrize("prior", [torch.tensor(0.25), np.float32(0.25), np.array(0.25)])
def test_a_prior_may_be_a_scalar_of_torch_or_numpy(prior: Any) -> None:
    assert tuner(Job(), prior=prior)._controller.config.prior_lr == 0.25


def test_a_folder_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tuner(Job(), run_dir="~/run").close()
    assert (tmp_path / "run" / "journal.jsonl").is_file()


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 1), torch.empty(0)])
def test_a_loss_of_several_elements_is_refused_with_its_shape(value: torch.Tensor) -> None:
    shape = str(tuple(value.shape)).replace("(", r"\(").replace(")", r"\)")
    job = Job()
    with (
        script([Evaluate(0)]),
        pytest.raises(ValueError, match=f"validate: returned an array of shape {shape}"),
    ):
        tuner(job, validate=lambda: value).run()
    with pytest.raises(
        ValueError, match=f"train_step: returned an array of shape {shape}; it must return one"
    ):
        tuner(job, train_step=lambda: value).run()


@pytest.mark.parametrize("value", [None, "1.0", True, [1.0]])
def test_a_loss_that_is_no_number_is_refused(value: object) -> None:
    with script([Evaluate(0)]), pytest.raises(TypeError, match=r"validate: returned .* must return the loss"):
        tuner(Job(), validate=lambda: value).run()
    with pytest.raises(TypeError, match=r"train_step: returned .* must return the loss"):
        tuner(Job(), train_step=lambda: value).run()


@pytest.mark.parametrize(
    "value", [1, 1.0, torch.ones(()), torch.ones(1, 1), torch.ones(1, dtype=torch.bfloat16)]
)
def test_any_single_number_will_do(value: object) -> None:
    with script([Evaluate(0), Train(0, (0.1,))]):
        assert tuner(Job(), validate=lambda: value).run().lrs == (0.1,)


@pytest.mark.filterwarnings("error")
def test_a_validation_that_is_never_finite_is_said_and_the_training_loss_decides(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedules = []
    for value in (1.0, math.nan, math.inf):  # one that is always the same decides nothing either
        tuned = tuner(
            Job(optimizer_name="adamw"), validate=lambda v=value: v, max_steps=300, eval_cost_steps=0.5
        )
        with caplog.at_level("WARNING", "autolrs_plugin"):
            schedules.append(tuned.run())
        assert tuned.ledger.search_evaluation.times > 0
    assert schedules[0] == schedules[1] == schedules[2]
    assert len(schedules[1]) == 300
    for bad in ("nan", "inf"):
        assert caplog.text.count(f"validate: returned {bad} although the training loss is finite") == 1


def test_a_rate_outside_of_the_range_is_said_not_to_be_used(caplog: pytest.LogCaptureFixture) -> None:
    says = "learning rate of 0.1 is outside of lr_range=(0.001, 0.01), so it is not used"
    with caplog.at_level("WARNING", "autolrs_plugin"):
        tuner(Job(), lr_range=(1e-3, 1e-2), prior=None)
        tuner(Job(), lr_range=(1e-3, 1.0))
        assert says not in caplog.text
        tuner(Job(), lr_range=(1e-3, 1e-2))
    assert says in caplog.text


def test_a_validation_that_is_seldom_finite_is_a_divergence() -> None:
    values, calls = (1.0, math.nan, math.nan, math.nan, math.nan, 0.5), outside([])

    def validate() -> float:
        calls.held.append(1)
        return values[len(calls.held) - 1]

    probes = [Probe(0, i, (0.01,) * 2, math.inf, evaluate=True) for i in range(5)]
    with script([Snapshot(), *probes, Restore(), Train(0, (0.1,)), Evaluate(1)]):
        made = tuner(Job(), validate=validate)
    made.run()
    assert made.val_losses == ((1, 0.5),)


def double_in_place(job: Job) -> None:
    with torch.no_grad():
        job.model.out.weight.mul_(2)


def one_bit(job: Job) -> None:
    job.model.out.weight.data.view(torch.uint8)[0, 0] ^= 1


def load(job: Job) -> None:
    job.model.load_state_dict(Job(seed=9).model.state_dict())


@pytest.mark.parametrize("change", [double_in_place, one_bit, load])
@pytest.mark.parametrize("after", range(1, 6))
def test_weights_changed_behind_its_back_are_noticed(change: Callable[[Job], None], after: int) -> None:
    """Between any two actions: after training, a snapshot, a probe, a restore."""
    job = Job()
    with script(PROBING):
        made = tuner(job)
    for _ in range(after):
        made.tell(made.perform(made.next_action()))
    change(job)
    with pytest.raises(RuntimeError, match="model: its weights were changed between two actions"):
        made.next_action()


def test_a_validation_that_changes_weights_is_refused() -> None:
    job = Job()

    def validate() -> float:
        double_in_place(job)
        return 1.0

    with (
        script([Evaluate(0)]),
        pytest.raises(RuntimeError, match="validate: changed the weights of the model"),
    ):
        tuner(job, validate=validate).run()


def test_a_validation_in_training_mode_leaves_the_running_statistics() -> None:
    """Forgetting model.eval() is a mistake, but then the run goes on as if it had not been looked at."""
    job = Job()

    def validate() -> torch.Tensor:
        return job.model(job.inputs).sum()

    before = {name: bits(buffer) for name, buffer in job.model.named_buffers()}
    identity = job.model.norm.running_mean
    with script([Evaluate(0)]):
        tuner(job, validate=validate).run()
    assert {name: bits(buffer) for name, buffer in job.model.named_buffers()} == before
    assert job.model.norm.running_mean is identity


def test_a_warm_start_from_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"warm_start='.*': .*journal.jsonl: cannot be read"):
        tuner(Job(), warm_start=tmp_path)
    with pytest.raises(
        JournalError, match=r"warm_start='.*/missing': is no folder; give that of an earlier run"
    ):
        tuner(Job(), warm_start=tmp_path / "missing")


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_rate_of_the_optimizer_that_cannot_be_is_the_optimizers(rate: float) -> None:
    job = Job()
    job.optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(
        ConfigError, match=f"optimizer: the learning rate of its first parameter group is {rate:g}"
    ):
        tuner(job)


def test_what_is_told_is_a_result() -> None:
    made = tuner(Job())
    made.next_action()
    with pytest.raises(TypeError, match=r"tell: a NoneType is no Result; give what perform\(\) returned"):
        made.tell(None)  # type: ignore[arg-type]


def test_a_picture_is_not_drawn_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder '.*/missing'; make it"):
        tuner(Job()).plot(tmp_path / "missing" / "run.png")
    assert not (tmp_path / "missing").exists()


def test_losses_too_great_to_be_squared_are_said_to_count_as_infinite() -> None:
    job = Job()
    with pytest.raises(
        NotFiniteError, match=r"is finite \(learning rate .*; a loss beyond 1e\+100 counts as"
    ):
        tuner(job, max_steps=300, train_step=lambda: 1e200 * job.step()).run()


def test_actions_are_taken_in_turn() -> None:
    with script(PROBING):
        made = tuner(Job())
    action = made.next_action()
    with pytest.raises(RuntimeError, match=r"tell\(\) the result of Train before asking"):
        made.next_action()
    result = made.perform(action)
    made.tell(result)
    with pytest.raises(RuntimeError, match="no action to tell a result of"):
        made.tell(result)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_accelerator_that_accumulates_is_refused_in_the_plain_loop(steps: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    job, accelerator = Job(), accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)

    def train_step() -> torch.Tensor:
        with accelerator.accumulate(job.model):
            return job.step()

    if steps == 1:
        tuner(job, train_step=train_step).close()
        return
    with pytest.raises(
        ValueError, match=r"train_step: uses an Accelerator with gradient_accumulation_steps=3, .*"
    ):
        tuner(job, train_step=train_step)


def test_a_model_of_torch_jit_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"has a RecursiveScriptModule of torch\.jit, .* give the module that it was"
    ):
        AutoLRS(model, optimizer, max_steps=9, lr_range=(0.1, 1.0), train_step=lambda b: 1.0, train_data=[1])


def test_a_complex_loss_is_named() -> None:
    for loss in (torch.tensor(1 + 2j), 1 + 2j):
        with pytest.raises(
            TypeError, match=r"train_step: returned \(1\+2j\), a complex number; .* a real one"
        ):
            as_number(loss, "train_step")


@pytest.mark.parametrize("trains", [True, False])
def test_a_step_that_trains_nothing_is_told_of_once(trains: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().sum()
        loss.backward()
        if trains:
            optimizer.step()
        return loss

    with script([Train(0, (0.1, 0.2)), Train(2, (0.1,))]):
        AutoLRS(
            model, optimizer, max_steps=3, lr_range=(0.1, 1.0), train_step=step, train_data=[torch.ones(2)],
            progress=False,
        ).run()  # fmt: skip
    told = [r.getMessage() for r in caplog.records if "has changed no weight" in r.getMessage()]
    assert len(told) == (not trains)
    assert trains or "in its first 2 steps, at learning rates up to 0.2" in told[0]
