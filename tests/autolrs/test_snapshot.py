"""Rolling back is bit-exact: in memory and from a file."""

import random
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autolrs_plugin.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from autolrs_plugin.training.fingerprint import weights_digest
from autolrs_plugin.training.lr import GroupRates, ReplayLR
from autolrs_plugin.training.rng import rng_kept, seed_all
from autolrs_plugin.training.snapshot import JobState
from autolrs_plugin.training.tree import Copier, Restorer
from tests.autolrs.jobs import OPTIMIZERS, Job, Net, bits


def probe(job: Job, steps: int = 4, lr: float = 3.0) -> None:
    """Do what a probe does: other batches, a high rate, dropout; and what users do to the state in passing."""
    seed_all(99)
    GroupRates(job.optimizer).set(lr)
    for _ in range(steps):
        job.step()
        random.random()
        np.random.rand()
    job.model.eval()


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_probed_continues_like_one_that_never_did(
    name: str, dtype: torch.dtype, before: int, tmp_path: Path
) -> None:
    if name == "adafactor-transformers":
        pytest.importorskip("transformers")
    plain = Job(name, dtype, micro_batches=2)
    for _ in range(before + 4):
        plain.step()
    drawn = torch.rand(()).item(), random.random(), float(np.random.rand())

    probed = Job(name, dtype, micro_batches=2)
    random_state, numpy_state = random.getstate(), np.random.get_state()
    for _ in range(before):
        probed.step()
    state = JobState(probed.model, probed.optimizer)
    identities = [id(p) for p in probed.model.parameters()]
    memory = [p.data_ptr() for p in probed.model.parameters()]
    kept = state.capture(Copier(torch.device("cpu")))
    sha256 = write_checkpoint(state.capture(Copier(share=True)), tmp_path / "state.safetensors")
    random.setstate(random_state)
    np.random.set_state(numpy_state)
    for source in (kept, kept, read_checkpoint(tmp_path / "state.safetensors", sha256)):
        probe(probed)
        state.restore(source)
    for _ in range(4):
        probed.step()

    assert probed.bits() == plain.bits()
    assert [id(p) for p in probed.model.parameters()] == identities
    assert [p.data_ptr() for p in probed.model.parameters()] == memory
    assert torch.rand(()).item() == drawn[0]
    if before == 0:
        assert not kept["optimizers"]["optimizer"]["state"]


def test_state_made_by_a_probe_is_gone() -> None:
    job = Job("adam")
    state = JobState(job.model, job.optimizer)
    kept = state.capture(Copier())
    probe(job)
    job.model.register_buffer("made", torch.ones(1))
    job.optimizer.param_groups[0]["made"] = 1
    job.optimizer.made = 1
    state.restore(kept)
    assert not job.optimizer.state
    assert all(p.grad is None for p in job.model.parameters())
    assert not hasattr(job.model, "made")
    assert "made" not in job.optimizer.param_groups[0]
    assert not hasattr(job.optimizer, "made")
    assert next(iter(job.optimizer.param_groups[0])) == "params"
    assert job.model.training


def test_a_fresh_process_continues_from_the_file(tmp_path: Path) -> None:
    def job() -> tuple[Job, JobState, torch.Generator]:
        made = Job("adam", seed=5)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(made.optimizer, [2, 3, 3])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        generator = torch.Generator()
        made.scheduler = scheduler
        stateful: dict[str, Any] = {"scheduler": scheduler, "scaler": scaler}
        own: list[Any] = [generator, np.random.default_rng(3), np.random.RandomState(3), random.Random(3)]
        return made, JobState(made.model, made.optimizer, stateful, own), generator

    state: Any
    first, state, generator = job()
    for _ in range(3):
        first.step()
        first.scheduler.step()
    generator.manual_seed(77)
    scaler: Any = state.stateful["scaler"]
    scaler.scale(torch.ones(()))
    path = tmp_path / "state.safetensors"
    sha256 = write_checkpoint(state.capture(Copier(share=True)), path)
    expected_draws = [torch.rand((), generator=generator).item(), *(g.random() for g in state.generators[1:])]
    for _ in range(3):
        first.step()
        first.scheduler.step()

    second, state, generator = job()
    torch.manual_seed(1234)
    for parameter in second.model.parameters():
        nn.init.zeros_(parameter)
    state.restore(read_checkpoint(path, sha256))
    draws = [torch.rand((), generator=generator).item(), *(g.random() for g in state.generators[1:])]
    for _ in range(3):
        second.step()
        second.scheduler.step()
    assert second.bits() == first.bits()
    assert draws == expected_draws
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()
    assert state.stateful["scaler"].state_dict()["scale"] == 8.0


def test_a_scaler_and_a_scheduler_go_back() -> None:
    job = Job("sgd")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(job.optimizer, 1.0, total_steps=50)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    state = JobState(job.model, job.optimizer, {"scheduler": scheduler, "scaler": scaler})
    kept = state.capture(Copier())
    before = scheduler.get_last_lr()
    for _ in range(3):
        loss = scaler.scale(job.model(job.inputs).sum())
        loss.backward()
        scaler.step(job.optimizer)
        scaler.update()
        scheduler.step()
    assert scaler.get_scale() == 32.0
    state.restore(kept)
    assert scaler.get_scale() == 4.0
    assert scheduler.get_last_lr() == before
    assert scheduler.last_epoch == 0


def test_frozen_parameters_are_neither_copied_nor_touched() -> None:
    job = Job("adamw", groups=False)
    job.model.conv.weight.requires_grad_(False)
    job.optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad])
    state = JobState(job.model, job.optimizer)
    kept = state.capture(Copier())
    assert "conv.weight" not in kept["parameters"]
    assert "norm.running_mean" in {f"norm.{n}" for n in kept["buffers"]["norm"]}
    version = job.model.conv.weight._version
    probe(job)
    state.restore(kept)
    assert job.model.conv.weight._version == version


def test_unfinished_gradients_come_back() -> None:
    job = Job("sgd")
    state = JobState(job.model, job.optimizer)
    job.model(job.inputs).sum().backward()
    before = {n: bits(p.grad) for n, p in job.model.named_parameters()}
    kept = state.capture(Copier())
    job.optimizer.zero_grad()
    state.restore(kept)
    assert {n: bits(p.grad) for n, p in job.model.named_parameters()} == before


def test_the_memory_of_the_copy_before_is_used_again() -> None:
    job = Job("adam")
    job.step()
    state = JobState(job.model, job.optimizer)
    first = state.capture(Copier(torch.device("cpu")))
    memory = first["parameters"]["out.weight"].data.data_ptr()
    job.step()
    second = state.capture(Copier(torch.device("cpu")), old=first)
    assert second["parameters"]["out.weight"].data.data_ptr() == memory
    assert bits(second["parameters"]["out.weight"].data) == bits(job.model.out.weight)


def test_lbfgs_and_its_lists_of_tensors_go_back() -> None:
    def run(with_probe: bool) -> bytes:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=2)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
        if with_probe:
            state = JobState(model, optimizer)
            kept = state.capture(Copier())
            for _ in range(3):
                optimizer.param_groups[0]["lr"] = 1.0
                optimizer.step(closure)
            state.restore(kept)
        optimizer.step(closure)
        optimizer.step(closure)
        return bits(model.weight)

    assert run(with_probe=True) == run(with_probe=False)


def test_an_optimizer_inside_another_is_followed() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner
            self.slow = [p.detach().clone() for g in inner.param_groups for p in g["params"]]
            super().__init__([p for g in inner.param_groups for p in g["params"]], {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            self.inner.step()
            for slow in self.slow:
                slow.mul_(0.5)

    job = Job("adam", groups=False)
    job.optimizer = Wrapper(job.optimizer)
    job.step()
    state = JobState(job.model, job.optimizer)
    kept = state.capture(Copier())
    before = [bits(s) for s in job.optimizer.slow]
    inner = job.optimizer.inner
    first = {k: v.clone() for k, v in next(iter(inner.state.values())).items()}
    probe(job)
    state.restore(kept)
    assert [bits(s) for s in job.optimizer.slow] == before
    assert all(torch.equal(first[k], v) for k, v in next(iter(inner.state.values())).items())


def test_tensors_that_were_one_are_one_again_and_others_are_not_mixed_up() -> None:
    shared, other = torch.ones(2), torch.zeros(2)
    kept = Copier().copy({"a": shared, "b": shared, "c": other})
    assert kept["a"] is kept["b"]
    # Since then "c" has become the tensor that "a" is: writing both in place would lose one.
    live = {"a": shared, "b": torch.full((2,), 5.0), "c": shared}
    restored = Restorer().restored(live, kept)
    assert restored["a"] is restored["b"]
    assert restored["c"] is not restored["a"]
    assert restored["a"].tolist() == [1, 1]
    assert restored["c"].tolist() == [0, 0]


def test_one_tensor_that_has_become_two_is_copied_twice() -> None:
    """The memory of the earlier, single copy can serve only one of them."""
    shared = torch.ones(2)
    old = Copier().copy({"a": shared, "b": shared})
    memory = old["a"].data.data_ptr()
    kept = Copier().copy({"a": torch.full((2,), 5.0), "b": torch.full((2,), 7.0)}, old)
    assert kept["a"].data.tolist() == [5, 5]
    assert kept["b"].data.tolist() == [7, 7]
    assert kept["a"].data.data_ptr() == memory


def test_a_copy_can_be_restored_again_and_again() -> None:
    """Without live state to write into, nothing of the copy may become part of what was restored from it."""
    value = {
        "list": [torch.ones(2), [1, 2]],
        "dict": {"a": torch.zeros(1), "b": {"c": [torch.ones(1)]}},
        "n": 1,
    }
    kept = Copier().copy(value)
    for _ in range(3):
        restored = Restorer().restored(None, kept)
        assert repr(restored) == repr(value)
        restored["list"][0].add_(5)
        restored["list"][1].append(3)
        restored["dict"]["b"]["c"][0].add_(5)
        restored["dict"]["b"]["new"] = 1
        del restored["dict"]["a"]


def test_plain_data_survives_the_file(tmp_path: Path) -> None:
    strided = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    flat = torch.arange(4)
    value: dict[str, Any] = {
        "plain": [None, True, 3, 2**100, 0.1, float("inf"), -float("inf"), "ä"],
        "nan": float("nan"),
        "keys": {1: "a", (2, "b"): None, "3": [1]},
        "kinds": [(1, 2), {3, 4}, deque([1, 2], 3), OrderedDict(a=1), Counter({7: 2}), torch.bfloat16],
        "arrays": [np.arange(3, dtype=np.uint32), np.float64(0.1)],
        "views": [flat, flat[1:3]],
        "strided": strided,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.empty(0),
    }
    sha256 = write_checkpoint(Copier().copy(value), tmp_path / "x.safetensors")
    back = Restorer().restored(None, read_checkpoint(tmp_path / "x.safetensors", sha256))
    for key in ("plain", "keys", "kinds"):
        assert back[key] == value[key]
        assert [type(v) for v in back[key]] == [type(v) for v in value[key]]
    assert np.isnan(back["nan"])
    assert back["arrays"][0].dtype == np.uint32
    assert back["arrays"][0].tolist() == [0, 1, 2]
    assert type(back["arrays"][1]) is np.float64
    assert [v.tolist() for v in back["views"]] == [[0, 1, 2, 3], [1, 2]]
    assert back["strided"].stride() == strided.stride()
    assert torch.equal(back["strided"], strided)
    assert back["scalar"].item() == 3
    assert back["half"].dtype == torch.bfloat16
    assert back["empty"].numel() == 0


def test_what_would_need_pickle_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\['optimizer'\]\['x'\]: a .*object.* cannot be written"):
        write_checkpoint({"optimizer": {"x": object()}}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_one_byte_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sha256 = write_checkpoint(Copier().copy({"a": torch.ones(3)}), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        read_checkpoint(path, sha256)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_the_fingerprint_sees_one_bit(dtype: torch.dtype) -> None:
    model = nn.Linear(7, 3).to(dtype)
    job = JobState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = job.fingerprint(), weights_digest(job.parameters)
    assert (job.fingerprint(), weights_digest(job.parameters)) == before
    with torch.no_grad():
        model.weight.data.view(torch.uint8)[1, 3] ^= 1  # .data: torch's own count of writes does not see it
    assert job.fingerprint() != before[0]
    assert weights_digest(job.parameters) != before[1]


def test_the_fingerprint_sees_a_write_to_a_frozen_weight() -> None:
    model = Net()
    model.conv.weight.requires_grad_(False)
    job = JobState(model, torch.optim.SGD(model.out.parameters(), lr=0.1))
    before = job.fingerprint()
    with torch.no_grad():
        model.conv.weight.mul_(1.5)
    assert job.fingerprint() != before


def test_generators_are_left_as_they_were() -> None:
    own = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    expected = torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with rng_kept([own]):
        seed_all(7, [own])
        first = torch.rand(()).item(), torch.rand((), generator=own).item()
    with rng_kept([own]):
        seed_all(7, [own])
        assert (torch.rand(()).item(), torch.rand((), generator=own).item()) == first
    assert torch.equal(torch.rand(2), expected[0])
    assert torch.equal(torch.rand(2, generator=own), expected[1])


def test_groups_keep_their_ratios() -> None:
    a, b, c = (torch.zeros(1, requires_grad=True) for _ in range(3))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(
        [{"params": [a], "lr": rate}, {"params": [b], "lr": 0.05}, {"params": [c], "lr": 0.0}], lr=0.1
    )
    rates = GroupRates(optimizer)
    rates.set(0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.025)
    assert optimizer.param_groups[2]["lr"] == 0
    rates.set(0.0)
    rates.set(1.0)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1)


def test_a_scheduler_in_warm_up_does_not_hide_the_ratios() -> None:
    a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.3}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert GroupRates(optimizer).ratios == pytest.approx((1, 3))


def test_an_optimizer_without_a_rate_is_refused() -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"optimizer: the lr of param_groups\[0\] is 0"):
        GroupRates(torch.optim.SGD([weight], lr=0.0))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"optimizer: the lr of param_groups\[0\] is None"):
        GroupRates(optimizer)


def test_a_schedule_replays_as_an_ordinary_scheduler() -> None:
    a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
    lrs = [0.1, 0.3, 0.7, 0.0]
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.02}], lr=0.1)
    scheduler = ReplayLR(optimizer, lrs)
    seen = []
    for _ in range(6):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [s[0] for s in seen] == [*lrs, 0.0, 0.0]  # bit for bit, then the last one stays
    assert [s[1] for s in seen[:3]] == pytest.approx([0.02, 0.06, 0.14])
    with pytest.raises(ValueError, match="lrs: is empty"):
        ReplayLR(optimizer, [])
