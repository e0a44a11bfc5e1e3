"""What cannot work is refused with the argument's name, before anything is trained on it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Evaluate, Probe, Restore, Snapshot, Train
from tests.autolrs.jobs import Job, bits
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
        ({"train_step": 3}, "train_step: a int cannot be called"),
        ({"train_step": lambda batch: 1.0}, "train_step: takes a batch, so train_data= is needed"),
        ({"train_data": [1]}, "train_step: takes no batch, but train_data was given"),
        ({"train_step": lambda b: 1.0, "train_data": iter([1])}, "train_data: a list_iterator can be iterated only"),
        ({"train_step": lambda b: 1.0, "train_data": 3}, "train_data: a int is neither iterable nor a function"),
        ({"data": object()}, "data: a object has no state_dict"),
        ({"scaler": 3}, "scaler: a int has no state_dict"),
        ({"stateful": {"ema": 3}}, "ema: a int has no state_dict"),
        ({"generators": [3]}, "generators: a int is none"),
        ({"tensorboard": 3}, "tensorboard: a int is neither a folder"),
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_that_is_never_finite_is_said(bad: float) -> None:
    with (
        script(PROBING),
        pytest.raises(ValueError, match=f"validate: returned {bad} .* never returned a finite"),
    ):
        tuner(Job(), validate=lambda: bad).run()
    # Along the run of a plan of our own, too: it is the first evaluation that tells.
    probes = [Probe(0, i, (0.01,) * 2, math.inf, evaluate=True) for i in range(5)]
    with (
        script([Snapshot(), *probes, Restore(), Train(0, (0.1,))]),
        pytest.raises(ValueError, match="validate:"),
    ):
        tuner(Job(), validate=lambda: bad).run()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_search_by_a_validation_that_is_never_finite_says_that_and_nothing_else(bad: float) -> None:
    job = Job(optimizer_name="adamw")
    tuned = tuner(job, validate=lambda: bad, max_steps=300, eval_cost_steps=0.5)
    with pytest.raises(ValueError, match=f"validate: returned {bad} .* never returned a finite"):
        tuned.run()
    assert tuned.ledger.search.steps > 0


def test_a_validation_that_is_seldom_finite_is_a_divergence() -> None:
    left = [1.0, math.nan, math.nan, math.nan, math.nan, 0.5]
    probes = [Probe(0, i, (0.01,) * 2, math.inf, evaluate=True) for i in range(5)]
    with script([Snapshot(), *probes, Restore(), Train(0, (0.1,)), Evaluate(1)]):
        made = tuner(Job(), validate=lambda: left.pop(0))
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
