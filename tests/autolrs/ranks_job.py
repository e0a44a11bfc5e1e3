"""A job of two real processes: `python -m torch.distributed.run ... -m tests.autolrs.ranks_job KIND:SCENE... FOLDER`.

Each rank leaves what it found in FOLDER/rank-N.json. All scenes share the processes, whose start takes longest.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.training.lr import GroupRates
from autolrs_plugin.training.sharded import reshard
from autolrs_plugin.training.tree import local
from tests.autolrs.jobs import Net, bits, outside
from tests.autolrs.scripted import PROBING, RATES, script

SEARCH = {"max_steps": 160, "lr_range": (1e-4, 1.0), "progress": False}
"""As short a run as a search has room in."""

SCRIPTED = {"max_steps": 7, "lr_range": (1e-3, 1.0), "progress": False}


DRAWN = outside([])
"""What tells each batch, those of probes included: an attribute of the job would be rolled back."""


class RanksJob:
    """A model on one rank of `ranks`, its share of 96 pictures, and a step on 16 of them over all ranks."""

    def __init__(self, kind: str, rank: int, ranks: int, plain_net: bool = False) -> None:
        torch.manual_seed(0)
        body: nn.Module = Net()
        if plain_net:
            # What a step of two halves of a batch gives is what a step of the whole batch gives: no batch statistics.
            body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        inputs = torch.randn(96, 1, 8, 8)
        targets = (inputs.flatten(1)[:, :10] * 3).argmax(1)
        data = TensorDataset(inputs, targets)
        self.sampler = DistributedSampler(data, num_replicas=ranks, rank=rank, seed=5)
        self.loader = DataLoader(data, batch_size=16 // ranks, sampler=self.sampler)
        self.held_out = inputs[rank::ranks], targets[rank::ranks]
        self.model: Any = body
        if kind == "ddp":
            self.model = DistributedDataParallel(body)
        elif kind == "fsdp":
            fully_shard(body, mesh=init_device_mesh("cpu", (ranks,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        # Dropout differs between ranks, as it does where each is seeded for itself.
        torch.manual_seed(100 + rank)
        self.seen: list[float] = []
        self.kill_after: int | None = None
        self.ask_after, self.asked, self.stop = 0, threading.Event(), False

    def step(self, batch: Any) -> torch.Tensor:
        if self.kill_after is not None and len(self.seen) == self.kill_after and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        inputs, targets = batch
        self.seen.append(float(inputs.sum()))
        if len(self.seen) == self.ask_after and not self.asked.is_set():
            self.asked.set()
            signal.raise_signal(signal.SIGUSR1)
        DRAWN.held.append(self.seen[-1])
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss

    def validate(self) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(self.model(self.held_out[0]), self.held_out[1])
        self.model.train()
        return loss.item()

    def tuner(self, **options: Any) -> AutoLRS:
        arguments = {"train_step": self.step, "validate": self.validate, "train_data": self.loader}
        return AutoLRS(self.model, self.optimizer, **{**arguments, **options})

    def train_plainly(self, rates: tuple[float, ...]) -> None:
        """Train in the loop that a user would write."""
        left, group_rates, epoch = list(rates), GroupRates(self.optimizer), 0
        while left:
            self.sampler.set_epoch(epoch)
            epoch += 1
            for batch in self.loader:
                if not left:
                    return
                group_rates.set(left.pop(0))
                self.step(batch)

    def digests(self) -> dict[str, str]:
        """Return digests of every bit of this rank's weights, optimizer state and buffers."""
        reshard(self.model)  # an evaluation leaves the gathered weights in place of the parameters
        weights = hashlib.sha256()
        for name, value in self.model.named_parameters():
            weights.update(name.encode() + bits(local(value.detach())))
        state = hashlib.sha256()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state.update(b"".join(bits(local(v)) for v in self.optimizer.state[p].values()))
        for name, value in self.model.named_buffers():
            state.update(name.encode() + bits(value))
        return {"weights": weights.hexdigest(), "state": state.hexdigest()}

    def sizes(self) -> list[int]:
        reshard(self.model)
        return [local(p.detach()).numel() for p in self.model.parameters()]


def told(tuner: AutoLRS) -> dict[str, Any]:
    return {
        "lrs": tuner.schedule.lrs,
        "losses": tuner.losses,
        "val_losses": tuner.val_losses,
        "stages": [stage.to_mapping() for stage in tuner.stages],
        "search_steps": tuner.ledger.search.steps,
    }


def search(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    """A whole search, and a plain loop with the schedule that it found."""
    job = RanksJob(kind, rank, 2)
    tuner = job.tuner(**SEARCH)
    probed: list[tuple[int, list[float]]] = []
    while not isinstance(action := tuner.next_action(), Done):
        drawn = len(DRAWN.held)
        tuner.tell(tuner.perform(action))
        if isinstance(action, Probe):
            probed.append((len(tuner.schedule), DRAWN.held[drawn:]))
    again = RanksJob(kind, rank, 2)
    again.train_plainly(tuner.schedule.lrs)
    at, batches = probed[0]
    return {
        **told(tuner),
        "digests": job.digests(),
        "plain_digests": again.digests(),
        "sizes": job.sizes(),
        "probe_batches": batches,
        "batches": again.seen[at : at + len(batches)],
    }


def scripted(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    """Everything that a controller may ask for, evaluations in between; and the same by the user's own loop."""
    with script():
        job = RanksJob(kind, rank, 2)
        tuner = job.tuner(**SCRIPTED)
        tuner.run()
        driven = RanksJob(kind, rank, 2)
        hands = driven.tuner(**SCRIPTED)
        while not isinstance(action := hands.next_action(), Done):
            if isinstance(action, Probe):
                hands.restore()
                hands.tell(Result(losses=(1.0,) * len(action.lrs), val_loss=1.0))
            elif isinstance(action, Evaluate):
                hands.tell(Result(val_loss=float(rank)))  # of one rank alone; the mean is 0.5
            else:
                hands.tell(hands.perform(action))
    # What an evaluation leaves behind must not be trained on: nothing is between it, the way back and the next step.
    with script([Snapshot(), PROBING[2], Restore(), Train(0, RATES), Evaluate(7)]):
        direct = RanksJob(kind, rank, 2)
        direct.tuner(**SCRIPTED).run()
    plain = RanksJob(kind, rank, 2)
    plain.train_plainly(RATES)
    return {
        **told(tuner),
        "digests": job.digests(),
        "driven_digests": driven.digests(),
        "direct_digests": direct.digests(),
        "plain_digests": plain.digests(),
        "driven_val_losses": hands.val_losses,
    }


def alone(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    """The search on a model whose step is the same for one process with the whole batch."""
    job = RanksJob(kind, rank, 2, plain_net=True)
    tuner = job.tuner(**SEARCH)
    tuner.run()
    return told(tuner)


def killed(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    """A run that loses rank 1 in the middle, unless it has a journal already: then it goes on."""
    job = RanksJob(kind, rank, 2)
    if not (folder / "run" / "journal.jsonl").exists():
        job.kill_after = 90
    distributed.barrier()
    tuner = job.tuner(run_dir=folder / "run", **SEARCH)
    left_at = len(tuner.schedule)
    tuner.run()
    states = sorted(path.name for path in (folder / "run").glob("state-*"))
    return {**told(tuner), "digests": job.digests(), "resumed_at": left_at, "states": states}


def asked(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    """A signal that rank 1 alone is sent in a probe, and whose handler sets a flag."""
    job = RanksJob(kind, rank, 2)
    job.ask_after = 5 * rank
    seen: list[dict[str, str]] = []

    def handler(number: int, frame: Any) -> None:
        job.stop = True
        seen.append(job.digests())

    before = signal.signal(signal.SIGUSR1, handler)
    with script():
        tuner = job.tuner(**SCRIPTED)
        tuner.run()
    signal.signal(signal.SIGUSR1, before)
    with script([Train(0, RATES[:2])]):
        real = RanksJob(kind, rank, 2)
        real.tuner(**SCRIPTED).run()
    return {
        **told(tuner),
        "digests": job.digests(),
        "stop": job.stop,
        "seen": [digests["weights"] for digests in seen],
        "real": real.digests()["weights"],
    }


SCENES: dict[str, Callable[[str, int, Path], dict[str, Any]]] = {
    "search": search,
    "scripted": scripted,
    "alone": alone,
    "killed": killed,
    "asked": asked,
}


def main() -> None:
    *chosen, folder = sys.argv[1:]
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found: dict[str, Any] = {}
    for name in chosen:
        kind, _, scene = name.partition(":")
        found[name] = SCENES[scene](kind, rank, Path(folder))
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
