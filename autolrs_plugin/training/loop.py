"""The session's port for a plain PyTorch loop: a step, a validation, and the data that they draw from."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autolrs_plugin.core.actions import ends
from autolrs_plugin.training.arguments import check_step, whole_number
from autolrs_plugin.training.checking import named
from autolrs_plugin.training.data import BatchStream, ProbeBatches, generators_of
from autolrs_plugin.training.fingerprint import weights_digest, weights_fingerprint
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.keeper import Keeper
from autolrs_plugin.training.lost import SHOWN, check_same
from autolrs_plugin.training.lr import GroupRates
from autolrs_plugin.training.ports import OnStep, Steps
from autolrs_plugin.training.resuming import ADVICE, shown, warn_of_buckets
from autolrs_plugin.training.rng import seed_all
from autolrs_plugin.training.signals import SIGNALS
from autolrs_plugin.training.snapshot import JobState
from autolrs_plugin.training.threads import check_threads, owned_by_threads, warn_of_threads
from autolrs_plugin.training.tree import Copier

logger = logging.getLogger("autolrs_plugin")

POSITION = "the position in train_data"
"""The name of the run's own stream of data among what is rolled back."""

WEIGHTS = "parameters["
"""What the digests of weights begin with."""

NOTHING_TRAINED = 10
"""Of first steps that change no weight, and whose losses are all not finite, more than this are told of."""


class TorchLoop:
    """The session's port for a plain PyTorch loop.

    Args:
        job: what is trained, and how.

    Attributes:
        driven: whether somebody else has a turn between two actions.
        agreed: returns of a condition whether it holds in any of the processes that train together.

    Raises:
        ValueError: a part of the job that cannot be used; the message names it. TypeError: one of a wrong type.
    """

    def __init__(self, job: Job) -> None:
        check_step(job.train_step, job.train_data, job.probe_data, "data" in job.stateful)
        self._train_step, self._count_tokens = job.train_step, job.count_tokens
        self._validate, self._is_users = job.validate, job.validate is not None
        found = [g for source in (job.train_data, job.probe_data) for g in generators_of(source)]
        all_generators = list({id(g): g for g in (*job.generators, *found)}.values())
        self._stream: BatchStream | None = None
        self._probe_batches: ProbeBatches | None = None
        stateful = dict(job.stateful)
        if job.train_data is not None:
            self._stream = BatchStream(
                job.train_data, "train_data", all_generators, lambda: self._job.trainable()
            )
            stateful[POSITION] = self._stream
            drawn = "train_data" if job.probe_data is None else "probe_data"
            self._probe_batches = ProbeBatches(getattr(job, drawn), drawn, all_generators)
        self._job = JobState(job.model, job.optimizer, stateful, all_generators, job.parts(), last=POSITION)
        self._keeper = Keeper(self._job, job.keep)
        # What there is in the kept state, whole and as far as it costs little; and the logs that were named.
        self._before: tuple[dict[str, str], dict[str, str]] | None = None
        self._named: set[str] = set()
        self._warned_of_made = self._warned_of_lr = False
        # The weights of the kept state; and the rates of its probes, by their seed and the weights that they came to.
        self._kept_weights = ""
        self._ends: dict[tuple[int, str], tuple[float, ...]] = {}
        self._probed = self._verified = self._in_probe = self._evaluated = self.driven = False
        # The losses of the first steps, as long as none has changed a weight.
        self._untrained: list[float] | None = []
        self._schedules = "scheduler" not in job.stateful
        self.rates = GroupRates(job.optimizer)
        self.agreed: Callable[[bool], bool] = bool

    def train(self, lrs: Sequence[float], on_step: OnStep) -> Steps:
        """Take one step at each learning rate on the run's own stream of data."""
        stream = self._stream
        return self._steps(lrs, on_step, stream.next if stream is not None else None)

    def probe(self, lrs: Sequence[float], seed: int, abort_above: float, on_step: OnStep) -> Steps:
        """Take steps on minibatches drawn with `seed`; end where `ends` of `core.actions` says so."""
        self._begin_probe(seed)
        if self._probe_batches is None:
            return self._compared(seed, lrs, self._steps(lrs, on_step, None, abort_above))
        batches = self._probe_batches.draw(seed)
        return self._compared(seed, lrs, self._steps(lrs, on_step, lambda: next(batches), abort_above))

    def _compared(self, seed: int, lrs: Sequence[float], steps: Steps) -> Steps:
        """Warn where a probe has come to the weights that one at other rates has come to: the rate has no effect.

        Both began at the kept state and with the same batches; and one that has changed no weight says nothing.
        """
        if self._warned_of_lr:
            return steps
        rates, end = tuple(lrs[: len(steps.losses)]), weights_fingerprint(self._job.trainable(), {})
        other = self._ends.setdefault((seed, end), rates)
        if len(other) == len(rates) and other != rates and end != self._kept_weights:
            self._warned_of_lr = True
            logger.warning(
                "optimizer: probes at learning rates up to %.3g and %.3g have come to the same weights, so %s trains "
                "at another rate than the lr of its param_groups, and no schedule has an effect; read group['lr'] "
                "there, and no attribute such as self.lr.",
                *(max(other), max(rates), named(self._job.optimizer)),
            )
        return steps

    def _begin_probe(self, seed: int) -> None:
        """Take the fingerprints of the kept state, which the job is in, and seed all generators."""
        if self._before is None:  # only now: most states are kept before a piece of the run, which needs none
            self._before = self._job.digests(), self._job.watched()
            warn_of_threads(self._job.found.slots.values())
            check_threads(self._job.found, self._train_step)
        if not self._probed:
            self._kept_weights, self._ends = weights_fingerprint(self._job.trainable(), {}), {}
        self._probed = self._in_probe = True
        seed_all(seed, self._job.generators)

    def asked(self) -> bool:
        """Tell whether a signal has come, in any of the processes, for which the search is to be left."""
        SIGNALS.watch()  # handlers that have come since
        return self.agreed(SIGNALS.asked)

    def evaluate(self) -> float:
        """Return the validation loss; afterwards the job is what it was before, whatever the evaluation has changed.

        Raises:
            RuntimeError: it has changed something that cannot be set back; the message names it.
        """
        if self._validate is None:
            raise ValueError("validate: is missing; give it, or evaluate yourself and tell() the result.")
        with SIGNALS.held():  # what a handler sets is none of the evaluation's
            if self._in_probe:  # its end takes back what an evaluation in it has changed, and sees to it
                return self._looked()
            return self._looked_again() if self._evaluated else self._looked_first()

    def _looked(self) -> float:
        with self._job.looked_at():
            return as_number(self._validate(), "validate")  # type: ignore[misc]  # `evaluate` has seen to it

    def _looked_first(self) -> float:
        """Evaluate, and see that all that was changed could be set back; warn of records."""
        before = self._job.digests()
        with self._job.looked_at():
            records = self._job.records() if self._is_users else {}
            loss = as_number(self._validate(), "validate")  # type: ignore[misc]
            if self._is_users:
                self._warn_of_records(records)
        self._check_evaluation(before, self._job.digests())
        self._evaluated = True
        return loss

    def _looked_again(self) -> float:
        """Evaluate, and see to what nobody can set back."""
        with self._job.looked_at():
            before = self._job.unheld()
            loss = as_number(self._validate(), "validate")  # type: ignore[misc]
        self._check_evaluation(before, self._job.unheld())
        return loss

    def _check_evaluation(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """See that nothing differs but the weights: whoever asks for an evaluation sees to those."""
        before, after = ({k: v for k, v in d.items() if not k.startswith(WEIGHTS)} for d in (before, after))
        self._named |= check_same(before, after, self._named, "an evaluation")

    def snapshot(self) -> None:
        """Keep the whole state, in place of the one kept before."""
        self._job.leave(owned_by_threads(self._job.found, self._train_step))
        self._keeper.save()
        self._before, self._probed, self._verified = None, False, False
        if self.driven:
            self._before = self._job.digests(), self._job.watched()

    def restore(self) -> None:
        """Go back to the kept state; after a search's first probe, and at its end, see that this was all.

        Raises:
            RuntimeError: a probe has changed something that cannot be set back; the message names it.
        """
        self._keeper.restore()
        in_probe, self._in_probe = self._in_probe, False
        if self._before is None or not self._probed:
            return
        if self._verified and in_probe:
            self._check_same(self._before[1], self._job.watched())
        else:
            self._verified = True
            self._check_same(self._before[0], self._job.digests())

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """Inside, even during a probe, the job is as it is between probes; afterwards the probe goes on."""
        probed = self._job.capture(Copier())
        self._keeper.restore()
        try:
            yield
        finally:
            self._job.restore(probed)

    def as_trained(self) -> AbstractContextManager[None]:
        """Inside, the job is that of the real step; outside of probes it is that anyway."""
        return self.as_kept() if self._in_probe else nullcontext()

    def fingerprint(self) -> str:
        """Return a value that changes when a weight does."""
        self._job.look()  # a step may have made weights, or given them other names
        return self._job.fingerprint()

    def write_state(self, path: Path) -> str:
        """Write the state to a file; return its SHA-256. Warn, once, of what a resume cannot make anew."""
        written = self._keeper.write(path)
        if not self._warned_of_made and (made := self._job.made()):
            self._warned_of_made = True
            logger.warning(
                "run_dir: steps have made %s, which a resume cannot create, so this run cannot be resumed as it is; "
                "%s, or keep its values in what there is then (stateful= takes a module, or an object with "
                "state_dict() and load_state_dict()).",
                *(shown(made), ADVICE),
            )
        return written

    def read_state(self, path: Path, sha256: str) -> None:
        """Go to the state that a file holds."""
        self._keeper.read(path, sha256)

    def keep_state(self, path: Path, sha256: str) -> None:
        """Make the state that a file holds the kept one."""
        self._keeper.keep_file(path, sha256)

    def kept_state(self) -> bytes:
        """Return the kept state as the content of a file."""
        return self._keeper.kept()

    def only_probe(self) -> None:
        """Make this a replica: it takes probes alone, from states that it is sent, and never follows the run's data."""
        self._stream = None
        self._job.stateful.pop(POSITION, None)

    def receive(self, state: bytes) -> None:
        """Make the state that `kept_state` gave in another process the kept one."""
        self._keeper.keep(state)
        self._before, self._probed, self._verified = None, False, False

    def identity(self) -> dict[str, Any]:
        """Return what tells this job from others, as plain values."""
        return {
            **self.kind(),
            "frozen_weights": weights_digest(self._job.frozen())[:16],
            "initial": weights_digest(self._job.trainable())[:16],
        }

    def warn_of_buckets(self) -> None:
        """Warn of what a process that resumes the run will make otherwise."""
        warn_of_buckets(self._job.model)

    def kind(self) -> dict[str, Any]:
        """Return the part of `identity` that no weight is read for."""
        shapes = "".join(f"{n} {p.dtype} {tuple(p.shape)}\n" for n, p in self._job.parameters.items())
        return {
            "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
            "optimizer": type(self._job.optimizer).__name__,
            "group_ratios": list(self.rates.ratios),
        }

    def check_rollback(self) -> None:
        """Take a step from the same state twice; a rollback that forgets something shows in the losses.

        Raises:
            ValueError: the losses differ.
        """
        check_threads(self._job.found, self._train_step)
        keeper = Keeper(self._job)
        losses = []
        with SIGNALS.held():
            keeper.save()
            for _ in range(2):
                try:
                    losses.append(self._take(None))
                finally:
                    keeper.restore()
        # Kernels of some accelerators round differently each time; another batch differs by far more.
        if not math.isclose(*losses, rel_tol=1e-5) and all(map(math.isfinite, losses)):
            raise ValueError(
                f"train_step: from the same state it gave the losses {losses[0]:.7g} and {losses[1]:.7g}: it draws "
                "from something that cannot be rolled back, such as an iterator. Give the batches as train_data= and "
                "let train_step take one, or what it draws from as data=, generators= or stateful=."
            )

    def _check_same(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        self._named |= check_same(before, after, self._named)

    def _warn_of_records(self, before: Mapping[str, str]) -> None:
        after = self._job.records()
        if changed := [path for path in {**before, **after} if before.get(path) != after.get(path)]:
            logger.warning(
                "%s: was changed by validate, and is set back after each evaluation, for AutoLRS evaluates at times of "
                "its own: a file that it saves as the best is the last one evaluated. The losses along the run are in "
                "val_losses; keep a record in observers=, or evaluate and save by yourself.",
                ", ".join(changed[:SHOWN]),
            )

    def _warn_untrained(self, losses: list[float], lr: float) -> list[float] | None:
        """Warn of first steps that have changed no weight; return their losses where it is too early to tell."""
        skipped = sum(not math.isfinite(loss) for loss in losses)
        # Some optimizers gather statistics first (RAdam), and have a state by then.
        if len(losses) < NOTHING_TRAINED and (skipped == len(losses) or self._job.optimizer.state):
            return losses
        also = f"; {skipped} of their losses are not finite, and a step may skip those" if skipped else ""
        logger.warning(
            "train_step: has changed no weight of the model in its first %d steps, at learning rates up to %.3g%s; "
            "unless it skips steps (a gradient scaler that looks for its scale does), see that it calls backward() and "
            "optimizer.step(), on this model and this optimizer.",
            *(len(losses), lr, also),
        )
        return None

    def _warn_of_schedulers(self, lr: float) -> None:
        """Warn, once, of a rate that the step has set for its next one: it has no effect."""
        if self._schedules and not self.rates.are(lr):
            self._schedules = False
            logger.warning(
                "train_step: has set the learning rate after its step, as a scheduler does, which has no effect: "
                "AutoLRS sets the rate of each step; leave the scheduler out."
            )

    def _steps(
        self,
        lrs: Sequence[float],
        on_step: OnStep,
        draw: Callable[[], Any] | None,
        abort_above: float | None = None,
    ) -> Steps:
        losses: list[float] = []
        tokens, stopped = 0, False
        untrained = None if self._untrained is None else self._job.fingerprint()
        self.rates.look()
        try:
            for lr in lrs:
                if abort_above is not None and (stopped := self.asked()):
                    break
                self.rates.set(lr)
                batch = draw() if draw is not None else None
                self.rates.watch(closely=not losses)
                losses.append(self._take(batch, with_batch=draw is not None))
                self._warn_of_schedulers(lr)
                self.rates.check(going_on=True)
                if self._count_tokens is not None and draw is not None:
                    tokens += whole_number(self._count_tokens(batch), "count_tokens")
                on_step(lr, losses[-1])
                if abort_above is not None and ends(losses, abort_above):
                    break
        finally:
            self.rates.unwatch()
        if untrained is not None and self._untrained is not None:
            changed = untrained != self._job.fingerprint()
            self._untrained = None if changed else self._warn_untrained([*self._untrained, *losses], max(lrs))
        return Steps(tuple(losses), tokens, stopped)

    def _take(self, batch: Any, with_batch: bool = False) -> float:
        if self._train_step is None:
            raise ValueError(
                "train_step: is missing; give it, or carry out the action yourself and tell() the result."
            )
        return as_number(self._train_step(batch) if with_batch else self._train_step(), "train_step")


def as_number(value: Any, source: str) -> float:
    """Return what a user's function returned as a float.

    Raises:
        ValueError: it has several elements, or none; the message says its shape.
        TypeError: it is no number, or a complex one.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        if math.prod(value.shape) != 1:
            raise ValueError(
                f"{source}: returned an array of shape {tuple(value.shape)}; it must return one number."
            )
        value = value.item()
        if not isinstance(value, complex):
            return float(value)
    if isinstance(value, complex):
        raise TypeError(
            f"{source}: returned {value}, a complex number; it must return a real one as the loss."
        )
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(
            f"{source}: returned {str(value)[:40]} ({type(value).__name__}); it must return the loss."
        )
    return float(value)
