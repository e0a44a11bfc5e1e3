"""AutoLRS on a plain PyTorch loop."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from autolrs_plugin.core.actions import Action, Result
from autolrs_plugin.core.config import SEARCH_BUDGET, AutoLRSConfig, ConfigError, is_number
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.finding import Finding, finding
from autolrs_plugin.core.ledger import Ledger
from autolrs_plugin.core.schedule import Schedule
from autolrs_plugin.core.state import Stage
from autolrs_plugin.report import draw_run
from autolrs_plugin.training.arguments import (
    check_callables,
    check_collections,
    check_result,
    checked_folder,
    checked_resume,
)
from autolrs_plugin.training.checking import check_accumulation, check_job, plain_numbers
from autolrs_plugin.training.data import Batches
from autolrs_plugin.training.distributed import RankedPort, Ranks, SharedJournals, ranks_of_job
from autolrs_plugin.training.earlier import earlier_run
from autolrs_plugin.training.finding_only import FoundError as FoundError
from autolrs_plugin.training.finding_only import finding_only as finding_only
from autolrs_plugin.training.finding_only import share_to_find, to_find
from autolrs_plugin.training.inventory import Stateful
from autolrs_plugin.training.job import Job, TrainStep
from autolrs_plugin.training.loop import TorchLoop
from autolrs_plugin.training.lr import ReplayLR, checked_prior, prior_lr
from autolrs_plugin.training.ports import Observer, Prober
from autolrs_plugin.training.progress import observers_for, warn_beforehand
from autolrs_plugin.training.rng import Generator
from autolrs_plugin.training.session import Session

FIND_SHARE = 0.03
"""Share of the run's steps that `find` takes."""


class AutoLRS:
    """Trains a model with a learning rate that is found while training.

    `run()` does everything. Or drive it yourself: `next_action()` gives an action; carry it out (`set_lr` before each
    step), or have it carried out by `perform(action)`; `tell(result)`; until the action is `Done`.

    Every probe is undone bit for bit, so the run is the one that a plain loop with the found schedule gives. However a
    probe ends, even by Ctrl-C, the job is then what it was before it. What is undone is all that `train_step` and
    the other arguments reach: modules with their buffers and attributes (a teacher, a metric), optimizers wherever they
    are held, LR schedulers, scalers, random number generators, tensors and objects of your own. Each search is checked:
    what it changed for good is named in an error before the run goes on. Files and other processes are out of reach.
    Signals that a handler of yours takes end a search at its next step; the handler is called after that.
    Probes call `train_step`, too: what it logs, they log; a list of numbers in a variable to which it only adds is
    a log, which stays, and a warning names it. An evaluation leaves no trace either: what `validate` changes is set
    back, and the losses along the run are in `val_losses`.

    The position in the data is undone as well, given in one of three ways:

    * `train_data`, with `train_step(batch)` (recommended): a DataLoader, a list of batches, or a function that returns
      an epoch's batches. Probes draw their own batches from it, or from `probe_data`. A loader's position in another
      process is found by skipping batches, from what its samplers looked at when the epoch began; where batches depend
      on what steps change during an epoch, that is an error. Generators inside of persistent
      workers are out of reach: random augmentation there is not rolled back.
    * `data`, with `train_step()`: the object that the step draws from, with `state_dict()` and `load_state_dict()`.
      Probes read ahead in it, and it is rewound.
    * Neither, with `train_step()`: a step that draws at random (`torch.randint` and the like), or uses all data.
      Two steps are taken at the start and undone, to see that they give the same loss; a step that draws from a
      hidden iterator does not, and is refused.

    In a job of several processes (DistributedDataParallel or FSDP2 under torchrun, Ray Train) every rank makes one and
    calls the same methods; rank 0 decides, losses are means over the ranks, and `run_dir` is a folder that all share.

    Args:
        model: the model; its frozen parameters are not copied.
        optimizer: any optimizer; its groups keep the ratios of their learning rates.
        max_steps: training steps of the run; the search comes on top.
        lr_range: the lowest and the highest learning rate to try, of the first parameter group.
        train_step: takes one optimizer step and returns the training loss (a number or a tensor of one element).
            Gradient accumulation, clipping and scaling belong into it. May be left out if you carry out
            actions yourself.
        validate: returns the validation loss; without it the training loss decides.
        train_data: the batches for `train_step(batch)`.
        probe_data: other batches for probes; for a stream that cannot be iterated twice at a time.
        data: what `train_step()` draws from.
        scaler: an AMP GradScaler.
        scheduler: an LR scheduler that the step calls, to roll it back; AutoLRS still sets the rate of each step.
        stateful: more objects to roll back, by name: averages of weights, metrics, counters.
        generators: random number generators that the step draws from, beside the global ones.
        count_tokens: returns the tokens (or samples) of a batch, for the ledger.
        search_budget: the steps that the search may take, as a fraction of max_steps, in (0, 1].
        seed: the seed of the search.
        prior: the learning rate to begin with and to keep without evidence: `optimizer` for the one that the
            optimizer was built with, a number in `lr_range`, or None to know none.
        warm_start: the `run_dir` of an earlier run, whose learning rates are followed and hardly searched for.
        run_dir: a folder for the journal and the states of the run: with it, start the same script again to resume a
            killed job, which then comes to bitwise the same weights.
        resume: `auto` resumes the run in `run_dir`, or starts one; True requires a run, and uses its initial weights
            even if the script's differ; False requires that there is none.
        keep: where the state to go back to is kept: `host` memory, `device` or `disk`.
        progress: whether to show a bar and a line per stage; the lines are logged (`autolrs_plugin`) without it.
        tensorboard: a folder or a SummaryWriter for scalars.
        observers: objects that are told of every action, step and result; on every rank.
        probes: what carries out probes elsewhere, in parallel, such as `integrations.ray.RayProbes`.
        settings: the other settings of AutoLRSConfig.

    Raises:
        ValueError: an argument that cannot be used; the message names it.
        TypeError: an argument of a wrong type.
        JournalError: `run_dir` holds another run, or a corrupted one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_steps: int,
        lr_range: tuple[float, float],
        train_step: TrainStep | None = None,
        validate: Callable[[], Any] | None = None,
        train_data: Batches | None = None,
        probe_data: Batches | None = None,
        data: Stateful | None = None,
        scaler: Stateful | None = None,
        scheduler: Stateful | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        generators: Sequence[Generator] = (),
        count_tokens: Callable[[Any], int] | None = None,
        search_budget: float = SEARCH_BUDGET,
        seed: int = 0,
        prior: float | str | None = "optimizer",
        warm_start: str | os.PathLike[str] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool | str = "auto",
        keep: str = "host",
        progress: bool = True,
        tensorboard: Any = None,
        observers: Sequence[Observer] = (),
        probes: Prober | None = None,
        **settings: Any,
    ) -> None:
        check_job(model, optimizer)
        check_accumulation(train_step)
        check_callables(validate, count_tokens, train_data)
        check_collections(stateful, generators, observers, probes, progress)
        folder = checked_folder(run_dir)
        resume = checked_resume(resume, folder)
        rate = prior_lr(checked_prior(prior, lr_range), optimizer)
        plateau = earlier_run(warm_start, lr_range).plateau_for(optimizer)
        known = {"prior_lr": rate, "warm_start": plateau, "validation": validate is not None}
        values = {"max_steps": max_steps, "lr_range": lr_range, "search_budget": search_budget, "seed": seed}
        config = AutoLRSConfig.from_mapping(plain_numbers({**values, **known, **settings}), origin="AutoLRS")
        ranks = _ranks(probes)
        if ranks is not None:
            train_step = ranks.averaged(train_step, "train_step")
            validate = ranks.averaged(validate, "validate")
        job = Job.of(
            model,
            optimizer,
            train_step=train_step,
            validate=validate,
            train_data=train_data,
            probe_data=probe_data,
            data=data,
            scaler=scaler,
            scheduler=scheduler,
            stateful=stateful,
            generators=generators,
            count_tokens=count_tokens,
            keep=keep,
        )
        self._loop = TorchLoop(job)
        self._loop.driven = bool(observers)
        if train_step is not None and train_data is None and data is None:
            self._loop.check_rollback()
        self._ranks, self._only_find, leads = ranks, share_to_find(), ranks is None or ranks.leads
        shown = observers_for(config, progress, tensorboard) if leads and self._only_find is None else []
        self._session = _session(config, self._loop, ranks, folder, resume, [*shown, *observers], probes)
        self._controller = self._session.controller
        if leads:
            warn_beforehand(self._controller)

    def run(self) -> Schedule:
        """Search and train up to the end; return the schedule that was found.

        Raises:
            ValueError: train_step or validate return what cannot be used.
            RuntimeError: the weights were changed by something else between two actions.
            FoundError: the script runs under `autolrs find`.
        """
        self._end_if_only_finding()
        self._session.run()
        return self.schedule

    def find(self, share: float = FIND_SHARE) -> Finding:
        """Return a learning rate with its interval, after a search that is rolled back; nothing is trained.

        Args:
            share: the steps that it may take, as a fraction of max_steps. With the default of 0.03 the run
                needs at least 3,334 steps (3,667 with `validate`); with 0.1, 1,000 (1,100).

        Raises:
            RuntimeError: the run has begun.
            ConfigError: `share` is not a fraction.
        """
        self._session.check_open()
        if self._controller.state.kept_step is not None:
            raise RuntimeError("find(): the run has begun; find a learning rate before its first step.")
        share = plain_numbers({"share": share})["share"]
        if not is_number(share) or not 0 < share <= 1:
            raise ConfigError(f"share={share!r}: must be a fraction of max_steps, above 0 and at most 1.")
        config = to_find(self._controller.config, share)
        session = _session(config, self._loop, self._ranks, None, "auto", [], None)
        session.run()
        return finding(session.controller.state)

    def next_action(self) -> Action:
        """Return what to do now; `Done` at the end.

        Raises:
            RuntimeError: the last action's result was not told, or the weights were changed since.
            FoundError: the script runs under `autolrs find`.
        """
        self._end_if_only_finding()
        return self._session.next_action()

    def perform(self, action: Action) -> Result:
        """Carry out the action that `next_action` gave, and return the result to `tell`."""
        self._loop.driven = True
        return self._session.perform(action)

    def tell(self, result: Result) -> None:
        """Take the result of the present action; its wall time is filled in if it is 0.

        Raises:
            ValueError: it does not fit the action.
            TypeError: it is no Result.
        """
        check_result(result)
        self._session.tell(result if self._ranks is None else self._ranks.averaged_result(result))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the first parameter group, and the others by their ratios.

        Raises:
            ValueError: `lr` is not a finite number of at least 0.
        """
        plain = plain_numbers({"lr": lr})["lr"]
        if not is_number(plain) or plain < 0:
            raise ValueError(f"set_lr({lr!r}): must be a finite learning rate of at least 0.")
        self._loop.rates.set(plain)

    def restore(self) -> None:
        """Go back to the kept state: what a probe begins with, if you carry it out yourself."""
        self._loop.restore()

    def scheduler(self, optimizer: torch.optim.Optimizer) -> ReplayLR:
        """Return the schedule found so far as a torch LR scheduler, to replay it in another run."""
        return ReplayLR(optimizer, self.schedule.lrs)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save a picture: learning rate and loss over the steps, with the probes as branches."""
        draw_run(self._controller, Path(path))

    def as_trained(self) -> AbstractContextManager[None]:
        """Inside, even during a probe, the job is that of the real step: to save it from an observer, say."""
        return self._loop.as_trained()

    def close(self) -> None:
        """Let another process write to `run_dir`; what was found can still be read, and nothing be trained."""
        self._session.close()

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each step so far."""
        return self._controller.schedule

    @property
    def ledger(self) -> Ledger:
        """What training, search, evaluations and snapshots have cost so far."""
        return self._controller.ledger

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The searches so far, with their candidates."""
        return self._controller.stages

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of each step so far."""
        return self._controller.losses

    @property
    def val_losses(self) -> tuple[tuple[int, float], ...]:
        """(step, validation loss) of each evaluation along the run so far."""
        return self._controller.val_losses

    def _end_if_only_finding(self) -> None:
        if self._only_find is not None:
            raise FoundError(self.find(self._only_find))


def _ranks(probes: Prober | None) -> Ranks | None:
    """Return the processes that train together; raise ValueError if they cannot have their probes elsewhere."""
    ranks = ranks_of_job()
    if ranks is not None and ranks.count > 1 and probes is not None:
        raise ValueError(
            f"probes: cannot be carried out elsewhere for a job of {ranks.count} processes; leave it out."
        )
    return ranks


def _session(
    config: AutoLRSConfig,
    loop: TorchLoop,
    ranks: Ranks | None,
    folder: Path | None,
    resume: bool | str,
    observers: Sequence[Observer],
    probes: Prober | None,
) -> Session:
    """Return the session of this process, or of this rank of several."""
    if share_to_find() is not None:
        folder = None  # it is left to the training
    if probes is not None:
        probes.attach(loop.kept_state)
    identity: dict[str, Any] = {}
    if folder is not None:
        identity = loop.identity()
        loop.warn_of_buckets()
    if ranks is None:
        return Session(Controller(config), loop, folder, identity, resume, observers, prober=probes)
    loop.agreed = ranks.any
    return Session(
        ranks.controller(config),
        RankedPort(loop, ranks),
        folder,
        ranks.identity(identity),
        resume,
        observers,
        SharedJournals(ranks),
    )
