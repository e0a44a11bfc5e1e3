"""Several processes that train one model (torchrun, Ray Train): rank 0 decides, and all carry it out.

The only controller that decides is rank 0's: it has the only search, and sends each action to the others as JSON.
Controllers that decided for themselves from the same losses would agree on equal machines alone: a Gaussian process
that rounds differently in the last bit may ask for another learning rate, and the ranks would wait for each other for
ever. The controllers of the others repeat what they hear, so that everything else is the same code on every rank.

Every loss is the mean over the ranks, with the same bits on each of them, so that all end a probe at the same step.
Each rank keeps, and writes, its own part of the state: with FSDP2 snapshots stay sharded. Rank 0 writes the journal.

Where a rank fails alone in a probe the others wait for it, while they exchange gradients. It must not go on,
as a framework that tries again with a smaller batch would; it ends, which they notice, and end with its reason.
"""

import functools
import json
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from autolrs_plugin.core.actions import Action, Result
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import (
    Checkpoint,
    Journal,
    JournalError,
    action_from_mapping,
    action_to_mapping,
    parsed,
)
from autolrs_plugin.core.plans import PLANS
from autolrs_plugin.core.state import Candidate, Plan, RunState, Stage
from autolrs_plugin.training.loop import as_number
from autolrs_plugin.training.ports import OnStep, Port, Steps

RANK_SEEDS = 2**32
"""Probes draw from a seed of each rank's own: so far apart, with the same last 32 bits on all ranks."""

PATIENCE_S = 60.0
"""So long a rank that has failed in a probe waits for the others to fail as well, as when all run out of memory."""


class RankError(Exception):
    """A rank has failed alone; no RuntimeError, for which a framework may look for a lack of memory and try again."""


def ranks_of_job() -> "Ranks | None":
    """Return the processes that train together with this one, or None where it is alone.

    A collective call: all processes of the job make it, or none.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return Ranks() if distributed.get_world_size() > 1 else None


class Ranks:
    """The processes of a job. All methods that send anything are collective: every rank calls them in turn.

    Attributes:
        index: which of them this is, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.index = distributed.get_rank()
        self.count = distributed.get_world_size()
        # A group of our own, on the CPU: plain data needs no accelerator, and never mixes with the gradients' traffic.
        self._group = distributed.new_group(backend="gloo")
        self._store = distributed.PrefixStore(
            f"autolrs-{self.share(uuid.uuid4().hex)}", distributed.distributed_c10d._get_default_store()
        )
        self._agreements = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.index == 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, all ranks do the same; where it ends in an error on some of them alone, it does on all.

        Raises:
            RankError: this rank has failed alone, or another one has; the message says with what.
        """
        self._agreements += 1
        failed = [f"{self._agreements}-{rank}" for rank in range(self.count)]
        alone = f"{self._agreements}-alone"
        try:
            yield
        except Exception as error:
            reason = f"rank {self.index} has failed alone ({type(error).__name__}: {error})"
            try:
                if self._store.check([alone]):
                    reason = self._store.get(alone).decode()
                    raise RankError(f"{reason}, so that all processes end.") from error
                self._store.set(failed[self.index], "")
                self._store.wait(failed, timedelta(seconds=PATIENCE_S))
            except RuntimeError:
                with suppress(RuntimeError):  # whoever keeps the store may be the one that has ended
                    self._store.set(alone, reason)
                raise RankError(
                    f"{reason}, and the others wait for it; start all processes again."
                ) from error
            raise

    def share(self, message: Any = None) -> Any:
        """Return rank 0's `message` (plain data) on every rank."""
        data = json.dumps(message).encode() if self.leads else b""
        size = torch.tensor([len(data)])
        distributed.broadcast(size, src=0, group=self._group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.leads:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        distributed.broadcast(buffer, src=0, group=self._group)
        return json.loads(bytes(buffer.tolist()))

    def gather(self, message: Any) -> list[Any]:
        """Return every rank's `message` (plain data) on every rank, in their order."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        distributed.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = [torch.zeros_like(padded) for _ in range(self.count)]
        distributed.all_gather(rows, padded, group=self._group)
        return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, sizes, strict=True)]

    def mean(self, value: float) -> float:
        """Return the mean over the ranks, the same bits on each; a value that all have stays as it is."""
        rows = [torch.zeros(1, dtype=torch.float64) for _ in range(self.count)]
        distributed.all_gather(rows, torch.tensor([value], dtype=torch.float64), group=self._group)
        # Added up here in a fixed order: a reduction may add in another order on another rank.
        values = [float(row) for row in rows]
        return values[0] if len(set(values)) == 1 else sum(values) / self.count

    def any(self, condition: bool) -> bool:
        """Return whether a condition holds on any of the ranks."""
        rows = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        distributed.all_gather(rows, torch.tensor([int(condition)]), group=self._group)
        return any(map(bool, rows))

    def averaged(self, function: Callable[..., Any] | None, name: str) -> Callable[..., float] | None:
        """Return `function` (which returns a loss) so that it returns the mean over the ranks."""
        if not callable(function):
            return function

        @functools.wraps(function)
        def mean(*batch: Any) -> float:
            return self.mean(as_number(function(*batch), name))

        return mean

    def averaged_result(self, result: Result) -> Result:
        """Return a result with the means of its losses over the ranks, and all their tokens.

        Raises:
            ValueError: the ranks took different numbers of steps, or not all evaluated.
        """
        results = self.gather([list(result.losses), result.val_loss, result.tokens])
        if len({(len(losses), val_loss is None) for losses, val_loss, _ in results}) > 1:
            taken = ", ".join(str(len(losses)) for losses, _, _ in results)
            raise ValueError(
                f"result.losses: the ranks took {taken} steps; all must take and evaluate the same."
            )
        losses = tuple(self.mean(loss) for loss in result.losses)
        val_loss = None if result.val_loss is None else self.mean(result.val_loss)
        return replace(result, losses=losses, val_loss=val_loss, tokens=sum(t for _, _, t in results))

    def controller(self, config: AutoLRSConfig) -> Controller:
        """Return this rank's controller: the one that decides, or one that repeats what that decided."""
        return Controller(config, self._led(PLANS[config.mode]) if self.leads else self._followed)

    def identity(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return what tells the job of all ranks from others, given each one's own part."""
        owns = self.gather(dict(own))
        merged = {
            key: own[key] if all(o[key] == own[key] for o in owns) else [o[key] for o in owns] for key in own
        }
        return {**merged, "processes": self.count}

    def _led(self, plan: Callable[[RunState], Plan]) -> Callable[[RunState], Plan]:
        def course(state: RunState) -> Generator[Action, Result, None]:
            actions, told = plan(state), 0
            action = next(actions)
            while True:
                stages = [stage.to_mapping() for stage in state.stages[told:]]
                told = len(state.stages)
                self.share({"action": action_to_mapping(action), "stages": stages})
                action = actions.send((yield action))

        return course

    def _followed(self, state: RunState) -> Generator[Action, Result, None]:
        while True:
            heard = self.share()
            state.stages.extend(_stage(values) for values in heard["stages"])
            yield action_from_mapping(heard["action"])


def _stage(values: Mapping[str, Any]) -> Stage:
    """Return the stage that `Stage.to_mapping` gave, after JSON has made lists of its tuples."""

    def candidate(items: Mapping[str, Any]) -> Candidate:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in items.items()}
        return Candidate(**plain)

    candidates = tuple(candidate(items) for items in values["candidates"])
    return Stage(**{**values, "candidates": candidates})


class RankedPort:
    """A port of the session on one rank of several; its losses must already be those of all ranks.

    Args:
        port: this rank's part of the job.
        ranks: all of them.
    """

    def __init__(self, port: Port, ranks: Ranks) -> None:
        self._port = port
        self._ranks = ranks
        self.fingerprint, self.restore = port.fingerprint, port.restore
        self.asked = port.asked

    def train(self, lrs: Sequence[float], on_step: OnStep) -> Steps:
        """Take one step at each learning rate on this rank's part of the data."""
        return self._counted(self._port.train(lrs, on_step))

    def probe(self, lrs: Sequence[float], seed: int, abort_above: float, on_step: OnStep) -> Steps:
        """Take steps on minibatches of this rank's own."""
        own_seed = seed + self._ranks.index * RANK_SEEDS
        with self._ranks.together():
            return self._counted(self._port.probe(lrs, own_seed, abort_above, on_step))

    def evaluate(self) -> float:
        """Return the validation loss, the mean over the ranks."""
        with self._ranks.together():
            return self._port.evaluate()

    def snapshot(self) -> None:
        """Keep this rank's part of the state."""
        with self._ranks.together():
            self._port.snapshot()

    def write_state(self, path: Path) -> str:
        """Write this rank's part of the state beside `path`; return the SHA-256 of all parts, in their order."""
        with self._ranks.together():
            written = self._port.write_state(self._own(path))
        return " ".join(self._ranks.gather(written))

    def read_state(self, path: Path, sha256: str) -> None:
        """Go to the state whose part for this rank lies beside `path`."""
        self._port.read_state(self._own(path), sha256.split()[self._ranks.index])

    def keep_state(self, path: Path, sha256: str) -> None:
        """Make the state whose part for this rank lies beside `path` the kept one."""
        self._port.keep_state(self._own(path), sha256.split()[self._ranks.index])

    def _own(self, path: Path) -> Path:
        index = self._ranks.index
        return path.with_name(f"{path.stem}.rank-{index}{path.suffix}") if index else path

    def _counted(self, steps: Steps) -> Steps:
        return replace(steps, tokens=sum(self._ranks.gather(steps.tokens)))


class SharedJournals:
    """The journal of a run with several processes: rank 0's file; the others have its content alone.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def exists(self, path: Path) -> bool:
        """Tell whether there is a run already; the same answer on every rank."""
        return bool(self._ranks.share(path.exists()))

    def create(
        self, path: Path, config: Mapping[str, Any], run: Mapping[str, Any], checkpoint: Checkpoint
    ) -> Journal:
        """Begin a journal, as `Journal.create` does.

        Raises:
            JournalError: as there; or some rank does not see the folder that the others do.
        """
        return self._held(path, lambda: Journal.create(path, config, run, checkpoint))

    def open(self, path: Path) -> Journal:
        """Read a journal and hold it for writing, as `Journal.open` does.

        Raises:
            JournalError: as there; or some rank does not see the folder that the others do.
        """
        return self._held(path, lambda: Journal.open(path))

    def _held(self, path: Path, hold: Callable[[], Journal]) -> Journal:
        journal, problem, content = None, "", ""
        if self._ranks.leads:
            try:
                journal = hold()
                content = path.read_text(encoding="ascii")
            except JournalError as error:
                problem = str(error)
        # Whoever fails alone leaves the others waiting, so that rank 0's problem is everybody's.
        problem, content = self._ranks.share([problem, content])
        if problem:
            raise JournalError(problem)
        blind = [rank for rank, seen in enumerate(self._ranks.gather(path.exists())) if not seen]
        if blind:
            if journal is not None:
                journal.close()
            raise JournalError(
                f"{path}: the ranks {blind} do not see it; run_dir must be a folder that all processes share."
            )
        if journal is not None:
            return journal
        read, _ = parsed(path, content.encode("ascii"))
        return _Mirror(path, read.header, read.entries, "")


class _Mirror(Journal):
    """What a rank other than 0 knows of the journal: it goes along in memory, and leaves the files alone."""

    def keep_only(self, names: set[str]) -> None:
        """Leave it to rank 0."""

    def _append(self, body: dict[str, Any], sync: bool) -> None:
        """Leave it to rank 0."""
