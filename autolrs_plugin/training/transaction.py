"""A probe as a transaction: whatever ends it, the job is what it was before."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.training.ports import OnStep, Port
from autolrs_plugin.training.signals import SIGNALS


@contextmanager
def gradients_kept() -> Iterator[None]:
    """Whatever ends what is inside, be it Ctrl-C amid torch's own switching of gradients, they are on as before."""
    enabled = torch.is_grad_enabled()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(enabled)
        raise


def evaluated(port: Port) -> float:
    """Return the validation loss.

    Raises:
        RuntimeError: evaluating changed the weights.
    """
    before = port.fingerprint()
    loss = port.evaluate()
    if port.fingerprint() != before:
        raise RuntimeError(
            "validate: changed the weights of the model; it must leave them as they were (put back what it swaps)."
        )
    return loss


def carry_out(probe: Probe, port: Port, seed: int, on_step: OnStep, clean: bool = False) -> Result:
    """Carry out a probe on a port that has kept a state; `seed` is the search's. Return its result.

    A probe is a transaction: whatever ends it, an exception or Ctrl-C included, the job is in the kept state then.
    An exception is let out as it is; what cannot be undone after it is in its notes.

    Args:
        probe: the probe.
        port: the training job.
        seed: of the search.
        on_step: called after each step.
        clean: whether the job is in the kept state already.
    """
    started = time.perf_counter()
    if not clean:
        _go_back(port)
    restored = time.perf_counter()
    try:
        steps = port.probe(probe.lrs, probe_seed(seed, probe), probe.abort_above, on_step)
        probed = time.perf_counter()
        held = len(steps.losses) == len(probe.lrs) and math.isfinite(steps.losses[-1])
        val_loss = evaluated(port) if probe.evaluate and held else None
        evaluated_at = time.perf_counter()
        stopped = steps.stopped or port.asked()
    except BaseException as error:
        try:
            _go_back(port)
        except Exception as lost:  # it must not stand in the place of what the user needs to see
            error.add_note(f"AutoLRS: what the probe had done when this ended it could not be undone: {lost}")
        raise
    _go_back(port)
    ended = time.perf_counter()
    return Result(
        losses=steps.losses,
        val_loss=val_loss,
        seconds=ended - started,
        eval_seconds=evaluated_at - probed,
        restore_seconds=ended - evaluated_at + restored - started,
        tokens=steps.tokens,
        stopped=stopped,
    )


def _go_back(port: Port) -> None:
    """Go back to the kept state, wholly: an interrupt in its midst is let out afterwards."""
    with SIGNALS.setting_back():
        try:
            port.restore()
        except KeyboardInterrupt:
            port.restore()
            raise


def probe_seed(seed: int, probe: Probe) -> int:
    """Return the seed of a probe's minibatches; two probes of a stage with the same draw have the same."""
    return int(np.random.SeedSequence([seed, probe.stage, probe.draw]).generate_state(1)[0])
