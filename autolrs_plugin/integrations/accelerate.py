"""AutoLRS in a hand-written loop on Accelerate's Accelerator."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Unpack

import torch

from autolrs_plugin.training.arguments import check_callables, check_step
from autolrs_plugin.training.checking import named
from autolrs_plugin.training.data import generators_of, without_workers
from autolrs_plugin.training.hosted import HostedLoop, HostedResults, HostedRun, saved_by
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.loop import as_number
from autolrs_plugin.training.settings import HostedOptions, HostedSettings

try:
    from accelerate import Accelerator, skip_first_batches
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ModuleNotFoundError(
        f"AutoLRS on an Accelerator: needs accelerate ({error}): "
        "pip install 'vllm-sarathi[autolrs,accelerate]'",
        name="accelerate",
    ) from error


class AccelerateOptions(HostedOptions, total=False):
    """The options of AutoLRS on an Accelerator: HostedOptions, and whether a greater value of `validate` is better."""

    greater_is_better: bool


class AutoLRS(HostedResults):
    """Finds the learning rate inside of a loop of your own:

        tuner = AutoLRS(accelerator, model, optimizer, loader, train_step, max_steps=600, lr_range=(1e-6, 1e-2))
        for batch in loader:
            loss = tuner.step(batch)

    `step` searches first where a search is due, sets the learning rate and calls `train_step`. Searches draw batches of
    their own from the loader and are rolled back bit for bit: your loop and its data are what they would be without.
    Its state is in what `accelerator.save_state` writes and `accelerator.load_state` reads.

    Args:
        accelerator: the Accelerator.
        model: the model, as `accelerator.prepare` returned it.
        optimizer: the optimizer, as `accelerator.prepare` returned it. There is no scheduler.
        loader: the loader of the training batches, as `accelerator.prepare` returned it.
        train_step: takes a batch: forward, backward, clipping, `optimizer.step()`, `optimizer.zero_grad()`, inside of
            `accelerator.accumulate(model)` where gradients are accumulated; returns the loss. It must leave counters
            of the loop alone, for probes call it, too.
        max_steps: optimizer steps of the whole run; the search comes on top.
        lr_range: the lowest and the highest learning rate to try, of the first parameter group.
        validate: returns the validation loss; without it the training loss decides. What it changes is set back, where
            it is the tuner that evaluates.
        options: what every adapter takes, see HostedOptions; and `greater_is_better`, of what `validate` returns.

    Raises:
        ConfigError, ValueError, TypeError: an argument that cannot be used; the message names it.
        RuntimeError: DeepSpeed, FSDP1, or training that has already started.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        train_step: Callable[[Any], Any],
        *,
        max_steps: int,
        lr_range: tuple[float, float],
        validate: Callable[[], Any] | None = None,
        **options: Unpack[AccelerateOptions],
    ) -> None:
        _check_prepared(accelerator, model, optimizer, loader)
        check_step(train_step, loader, None, has_data=False)
        check_callables(validate, None, loader)
        settings = HostedSettings.checked("AutoLRS", lr_range, options)
        self._config = settings.config(optimizer.optimizer, max_steps, validate is not None)
        wrapped, model = model, accelerator.unwrap_model(model)
        check_accelerator(accelerator, model)
        self._host = _Host(accelerator, loader, train_step, validate)
        self._optimizer = optimizer.optimizer
        rolled_back = dict(settings.stateful)
        if accelerator.scaler is not None:
            rolled_back["scaler"] = accelerator.scaler
        all_generators = [*generators_of(loader), *settings.generators]
        parts = {"model": wrapped, "train_step": train_step, "validate": validate, "loader": loader}
        roots = {name: part for name, part in parts.items() if part is not None}
        job = Job(
            model,
            self._optimizer,
            stateful=rolled_back,
            generators=all_generators,
            keep=settings.keep,
            roots=roots,
        )
        self._loop = HostedLoop(job, self._host)
        self._observer = settings.observer()
        self._saved: str | None = None
        self._losses: list[Any] = []
        accelerator.register_for_checkpointing(self)

    def step(self, batch: Any) -> Any:
        """Train on a batch at the learning rate that is due, after a search where that is due; return the loss."""
        if self.run is None:
            if self._optimizer.state and self._saved is None:
                raise RuntimeError(
                    "AutoLRS: training has already started: the optimizer has taken steps without it; begin with it, "
                    "or accelerator.load_state() of a run that did."
                )
            self.run = HostedRun(self._config, self._loop, self._saved, None, [self._observer])
            if self._config.validation and self._saved is None:
                self._loop.check_metric("validate")
        if not self._losses:
            self.run.before_step()
        loss = self._host.train_step(batch)
        self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        if self._host.accelerator.sync_gradients:
            losses, self._losses = self._losses, []
            self.run.after_step(sum(losses) / len(losses))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the run so far, for `accelerator.save_state`; between two optimizer steps."""
        return {"journal": self._saved if self.run is None else self.run.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run that `state_dict` told of: the next `step` is its next one."""
        self._saved, self.run, self._losses = state["journal"], None, []


class _Host:
    """Probes and evaluations inside a user's loop."""

    def __init__(
        self,
        accelerator: Accelerator,
        loader: Any,
        train_step: Callable[[Any], Any],
        validate: Callable[[], Any] | None,
    ) -> None:
        self.accelerator, self.train_step, self._loader = accelerator, train_step, loader
        self._validate = validate

    @contextmanager
    def probing(self, seed: int) -> Iterator[Callable[[], Any]]:
        accelerator = self.accelerator
        step, trackers = accelerator.step, accelerator.trackers
        # A probe begins with a whole accumulation, and whatever train_step logs is no progress.
        accelerator.step, accelerator.trackers = 0, []
        try:
            with probe_batches(
                accelerator, without_workers(skip_first_batches(self._loader)), seed
            ) as batches:
                yield lambda: self._optimizer_step(batches)
        finally:
            accelerator.step, accelerator.trackers = step, trackers

    def _optimizer_step(self, batches: Iterator[Any]) -> Any:
        losses: list[Any] = []
        while not losses or not self.accelerator.sync_gradients:
            losses.append(as_number(self.train_step(next(batches)), "train_step"))
        return sum(losses) / len(losses)

    def saving(self, as_kept: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
        """Inside, `accelerator.save_state` saves inside of `as_kept()`."""
        return saved_by(self.accelerator, "save_state", as_kept)

    def evaluate(self) -> Any:
        assert self._validate is not None, "no plan evaluates without validation"
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        try:
            with gradients_kept(self.accelerator):
                return self._validate()
        finally:
            self.accelerator.trackers = trackers


@contextmanager
def gradients_kept(accelerator: Accelerator) -> Iterator[None]:
    """Afterwards Accelerate knows nothing of what was iterated over inside: its place in the run's loader stays."""
    gradients = accelerator.gradient_state
    sync, iterated = gradients.sync_gradients, gradients.dataloader_references
    try:
        yield
    finally:
        gradients.dataloader_references = iterated
        gradients._set_sync_gradients(sync)


@contextmanager
def probe_batches(accelerator: Accelerator, loader: Any, seed: int) -> Iterator[Iterator[Any]]:
    """Yield the batches of a prepared loader, without end; afterwards Accelerate knows nothing of it."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(seed % 2**31)  # a seedable sampler does not look at the global generators
    batches = _endless(loader)
    with gradients_kept(accelerator):
        try:
            yield batches
        finally:
            batches.close()


def check_accelerator(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Raise, naming it, for what AutoLRS cannot work with.

    Raises:
        ValueError: half precision without a gradient scaler.
        RuntimeError: DeepSpeed or FSDP1.
    """
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        raise RuntimeError(
            "DeepSpeed: keeps its state where AutoLRS cannot roll it back; train with DDP, or with FSDP2 "
            "(fsdp_version: 2)."
        )
    if str(accelerator.distributed_type).endswith("FSDP") and not accelerator.is_fsdp2:
        raise RuntimeError(
            "FSDP1: flattens the parameters, so that a step cannot be undone; use fsdp_version: 2, or DDP."
        )
    halves = any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters())
    if (halves or accelerator.mixed_precision == "fp16") and accelerator.scaler is None:
        raise ValueError(
            "fp16: trains without a gradient scaler here, and would underflow; use bf16 or fp32."
        )


def _endless(loader: Any) -> Any:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("an epoch of the training data has no batches.")


def _check_prepared(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> None:
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator: {named(accelerator)} is no accelerate.Accelerator.")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model: {named(model)} is no torch.nn.Module; give what accelerator.prepare returned."
        )
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(f"optimizer: {named(optimizer)}; give what accelerator.prepare returned.")
    if not hasattr(loader, "gradient_state"):
        raise TypeError(f"loader: {named(loader)}; give what accelerator.prepare returned.")
    if accelerator._schedulers:
        raise ValueError(
            f"accelerator: has prepared a {type(accelerator._schedulers[0].scheduler).__name__}, which "
            "conflicts with AutoLRS, which sets the learning rate; leave it out."
        )
    if any(isinstance(thing, AutoLRS) for thing in accelerator._custom_objects):
        raise ValueError(
            "accelerator: has an AutoLRS already; only one can set the learning rate, so use that one, or make a new "
            "Accelerator."
        )
