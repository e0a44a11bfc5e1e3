"""The whole state of a training job, taken and restored bit for bit."""

import logging
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autolrs_plugin.training.checking import check_job, named
from autolrs_plugin.training.fingerprint import (
    digest_of,
    leaves,
    short,
    tensor_digest,
    weights_fingerprint,
)
from autolrs_plugin.training.flags import flags_seen
from autolrs_plugin.training.forms import forms, hold_forms, restore_forms, restore_orders
from autolrs_plugin.training.holdings import (
    Origins,
    held_in,
    hold_dicts,
    made_anew,
    plain_in,
    restore_dicts,
    restore_slots,
)
from autolrs_plugin.training.initial import MADE, ORDERS, Initial
from autolrs_plugin.training.inventory import REACH, Inventory, Stateful, is_stateful
from autolrs_plugin.training.lost import FROZEN, LOG, check_replaced
from autolrs_plugin.training.optimizers import (
    GROUP_PARAMS,
    optimizer_state,
    params_of,
    restore_optimizer,
    swaps_weights,
)
from autolrs_plugin.training.plain import ATOMS, MOST_BYTES, is_plain, joined
from autolrs_plugin.training.resuming import Places, check_made, refill
from autolrs_plugin.training.rng import (
    Generator,
    check_generator,
    rng_state,
    set_rng_state,
    set_state_of,
    spawned_by,
    state_of,
)
from autolrs_plugin.training.sharded import reshard
from autolrs_plugin.training.slots import VariableSlots
from autolrs_plugin.training.threads import wait_for_pools
from autolrs_plugin.training.tree import Copier, Restorer
from autolrs_plugin.training.watched import data_seen, position, switches

logger = logging.getLogger("autolrs_plugin")

ORIGINS = "origins"
"""The part of a captured state that holds the job's own objects, and is not written to files."""


class JobState:
    """Everything of a training job that a step changes: what `Inventory` finds.

    Trainable parameters and their gradients, buffers (always all), train/eval modes, optimizers with all options of
    their groups, plain attributes, the state of every stateful object, and every random number generator. A frozen
    parameter is copied where a trainable one has its shape, for it may be its average (a teacher, a target network),
    or where its module was given as `stateful`; the others are watched.

    Args:
        model: the model.
        optimizer: its optimizer.
        stateful: more objects to take along, by name (an AMP scaler, a scheduler, the data, a metric, a teacher).
        generators: random number generators beside the global ones.
        roots: more parts of the job, by name, from which state may be reached: functions, loaders.
        last: the name of the one of `stateful` that is restored when all else is: it is given its state as
            captured, and tells whether it has gone anywhere.

    Raises:
        ValueError: the optimizer has no parameters, or none of the model's; or a parameter is still uninitialised.
        TypeError: a `stateful` object has no state_dict/load_state_dict, or a generator is of an unknown kind.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        stateful: Mapping[str, Any] | None = None,
        generators: Sequence[Generator] = (),
        roots: Mapping[str, Any] | None = None,
        last: str = "",
    ) -> None:
        check_job(model, optimizer)
        reshard(model)
        self.model = model
        self.optimizer = optimizer
        self.generators = tuple(generators)
        given = dict(stateful or {})
        walked = torch.nn.Module | torch.optim.Optimizer
        self._given = {name: thing for name, thing in given.items() if isinstance(thing, walked)}
        self.stateful: dict[str, Stateful] = {n: thing for n, thing in given.items() if n not in self._given}
        for name, thing in self.stateful.items():
            if not is_stateful(thing):
                raise TypeError(
                    f"{name}: {named(thing)} has no state_dict() and load_state_dict(), so it cannot be taken as "
                    "stateful; what train_step reaches is rolled back anyway, so leave it out then."
                )
        for generator in self.generators:
            check_generator(generator)
        self._roots = dict(roots or {})
        self._last = last
        self._lengths: dict[str, int] = {}
        self._left: dict[str, Any] = {}
        self.look()
        if not self.found.whole:
            logger.warning(
                "train_step and the other arguments reach more than %d objects; what a probe changes beyond them is "
                "neither rolled back nor seen: keep data in arrays, tensors or a data set.",
                REACH,
            )
        self._initial = Initial(self.found, self.parameters, self._names)

    def trainable(self) -> dict[str, torch.Tensor]:
        """Return the parameters that a step may change, by name."""
        return {name: p for name, p in self.parameters.items() if name in self._moving}

    def frozen(self) -> dict[str, torch.Tensor]:
        """Return the parameters that no step changes, by name."""
        return {name: p for name, p in self.parameters.items() if name not in self._moving}

    def fingerprint(self) -> str:
        """Return a few bytes that change when a weight does, of those that there were at the last look."""
        return weights_fingerprint(self.trainable(), self.frozen())

    def capture(self, copier: Copier, old: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the state now, as plain containers of TensorCopy and plain values.

        Args:
            copier: makes the copies.
            old: a state captured before that nobody needs any more: its memory is used again.
        """
        reshard(self.model)
        self.settle()
        olds = old or {}
        state = {key: copier.copy(part(), olds.get(key)) for key, part in self._parts().items()}
        if copier.shares:
            changed = self._initial.changed(self.found, self._names)
            state["attributes"] = copier.copy(changed, olds.get("attributes"), note=True)
        else:
            self._hold(state, copier, olds.get("attributes"), MOST_BYTES)
        return state | self._initial.parts(self.found, self.parameters, self._names)

    def made(self) -> dict[str, str]:
        """Return what steps have made, as of the last look, or put elsewhere: what it is, by the path to it."""
        return self._initial.made(self.found, self.parameters, self._names)

    def held(self) -> dict[str, Any]:
        """Return the part of a state that is held by name, as of the last look: it goes beside one from a file."""
        state: dict[str, Any] = {}
        self._hold(state, Copier(), None, MOST_BYTES)
        return state

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Leave the job as it was after something that only looks at it: an evaluation leaves no trace.

        All is put back but what is large and nobody changes who only looks: the weights and what the optimizers hold.
        Those are put back, too, where an optimizer swaps the weights for others to evaluate (Schedule-Free).
        """
        self.settle()
        swaps = any(swaps_weights(optimizer) for optimizer in self.found.optimizers.values())
        kept = self.glance(("gradients",)) if swaps else self.glance()
        gradients = [(p, p.grad) for p in self.parameters.values()]
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            self._keep_changed(kept)
            self.restore(kept)
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make the job what it was when `state` was captured; tensors in use are written in place."""
        reshard(self.model)
        origins = state.get(ORIGINS)
        if origins is None or self.found.shared:
            self.settle()
        if origins is None:
            self._initial.put_back(state, self.found)
            self.look()
            check_made(state.get(MADE, {}), Places(self.found, self.parameters))
            refill(self.found, state["attributes"])
            origins = Origins(self.found, self.parameters, self._names, orders=state.get(ORDERS, {}))
        restorer = Restorer(origins.notes)
        with torch.no_grad():
            self._restore(restorer, state, origins)
        check_replaced(restorer.replaced)
        self.look()
        for thing in self.found.bearers.values() if ORIGINS in state else ():
            if id(thing) not in origins.found.bearers:  # its attributes have come to it since
                vars(thing).clear()

    def digests(self) -> dict[str, str]:
        """Return a digest of everything that is reached, by the path to it: also of what is only watched."""
        share = Copier(share=True)
        reshard(self.model)
        self.settle()
        state = {key: share.copy(part()) for key, part in self._parts().items()}
        found = {path: digest for key, value in state.items() for path, digest in leaves(key, value)}
        for path, slots in self.found.lasting().items():
            for name, value in slots.get().items():
                full = joined(path, name)
                if slots.leaves(name, value):
                    begun = self._lengths.setdefault(full, len(value))
                    found[full] = str(data_seen(value[:begun]))
                    found[full + LOG] = str(len(value))
                elif is_plain(value, self._names):
                    found[full] = digest_of(share.copy(value, note=True))
        for module, variables in self._modules().items():
            atoms = {k: v for k, v in list(variables.items()) if isinstance(v, ATOMS)}
            found |= {f"{module}.{k} (a variable)": short(repr(v)) for k, v in atoms.items()}
        for name, parameter in self.frozen().items():
            found[name + FROZEN] = str(tensor_digest(parameter))
        return found | forms(self.found.lasting()) | self.unheld()

    def unheld(self) -> dict[str, str]:
        """Return the part of `digests` that nobody can set back, but for frozen weights; as of the last look."""
        found = {}
        for path, data in self.found.data.items():
            size = "" if isinstance(data, torch.Tensor) else f" of {len(data)} items"
            found[f"{path} (a {type(data).__name__}{size})"] = str(data_seen(data))
        return found | self.watched()

    def records(self) -> dict[str, str]:
        """Return a digest of every plain value that the user's functions and objects hold, logs left out, by path."""
        self.look()
        share = Copier(share=True)
        return {
            joined(path, name): digest_of(share.copy(value, note=True))
            for path, slots in self.found.lasting().items()
            if slots.kind == "user"
            for name, value in plain_in(slots, self._names).items()
            if not slots.leaves(name, value)
        }

    def watched(self) -> dict[str, str]:
        """Return the part of `unheld` that costs little."""
        share, found = Copier(share=True), switches()
        for path, iterator in self.found.iterators.items():
            where = share.copy(position(iterator))
            found[f"{path} (a {type(iterator).__name__})"] = f"{id(iterator)} {digest_of(where)}"
        for path, cache in self.found.caches.items():
            found[f"{path} (a cache)"] = str(cache.cache_info().currsize)
        for path, generator in self.found.generators.items():
            found[f"{path} (its spawned generators)"] = str(spawned_by(generator))
        return found | flags_seen(self.found.flags)

    # What there is.

    def settle(self) -> None:
        """Find what there is now, when pools of threads have done what they were asked to."""
        self.look()
        while wait_for_pools(self.found.shared):
            self.look()

    def leave(self, things: Sequence[Any]) -> None:
        """Leave what other threads hold in some containers alone from now on."""
        if things:
            self._left |= {f"left {id(thing)}": thing for thing in things}
            self.look()

    def look(self) -> None:
        """Find what there is now: a step may have let more weights train, or made some."""
        generators = {str(i): generator for i, generator in enumerate(self.generators)}
        skip = {**self.stateful, **generators, **self._left}
        self.found = Inventory(
            {"": self.model, "optimizer": self.optimizer, **self._given, **self._roots}, skip
        )
        self.parameters: dict[str, torch.Tensor] = {}
        self._names = {id(thing): name for name, thing in self._left.items()}
        for path, module in self.found.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self._names:
                    self._add(joined(path, name), parameter)
        optimized: set[int] = set()
        for path, optimizer in self.found.optimizers.items():
            for index, parameter in enumerate(params_of(optimizer)):
                optimized.add(id(parameter))
                if id(parameter) not in self._names:
                    self._add(f"{path}.{index}", parameter)
            for index, key in enumerate(optimizer.state):  # of one that no group has any more
                if isinstance(key, torch.Tensor) and id(key) not in self._names:
                    self._add(f"{path}.state.{index}", key)
        modules = [thing for thing in self._given.values() if isinstance(thing, torch.nn.Module)]
        given = {id(p) for module in modules for p in module.parameters()}
        moving = {n: p for n, p in self.parameters.items() if p.requires_grad or id(p) in optimized}
        shapes = {tuple(p.shape) for p in moving.values()}
        self._moving = {
            n for n, p in self.parameters.items() if n in moving or tuple(p.shape) in shapes or id(p) in given
        }

    def _add(self, name: str, parameter: torch.Tensor) -> None:
        self.parameters[name] = parameter
        self._names[id(parameter)] = name

    def _modules(self) -> dict[str, dict[str, Any]]:
        """Return the variables of the user's modules, for a function may make up the name of one."""
        functions = [slots for slots in self.found.slots.values() if isinstance(slots, VariableSlots)]
        return {module: variables for slots in functions for module, variables in slots.modules.items()}

    def _stateful(self) -> dict[str, Stateful]:
        return {**self.stateful, **self.found.stateful}

    def _with_extra_state(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name, module in self.found.modules.items():
            if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                yield name, module

    def _hold(self, state: dict[str, Any], copier: Copier, old: Any, kinds: Container[str]) -> None:
        """Add to a state what is held by name: plain values in slots of some kinds, and the objects themselves."""
        plain, objects = held_in(self.found, self._names, kinds)
        olds = old or {}
        # Each value by itself: the dictionaries that they are in here are nobody's, and would be noted as well.
        state["attributes"] = {
            path: {
                name: copier.copy(value, olds.get(path, {}).get(name), note=True)
                for name, value in values.items()
            }
            for path, values in plain.items()
        }
        origins = Origins(self.found, self.parameters, self._names, copier.origins, objects)
        for path, held in objects.items():
            lists = {k: v for k, v in held.items() if type(v) is list and id(v) not in self._names}
            origins.lengths[path] = {k: len(v) for k, v in lists.items()}
        hold_dicts(origins)
        hold_forms(origins)
        for path, optimizer in self.found.optimizers.items():
            origins.params[path] = [list(group[GROUP_PARAMS]) for group in optimizer.param_groups]
        state[ORIGINS] = origins

    def _parts(self) -> dict[str, Callable[[], Any]]:
        modules, found = self.found.modules, self.found
        return {
            "parameters": self.trainable,
            "gradients": lambda: {name: p.grad for name, p in self.trainable().items()},
            "buffers": lambda: {name: module._buffers for name, module in modules.items()},
            "modes": lambda: {name: module.training for name, module in modules.items()},
            "trains": lambda: {name: p.requires_grad for name, p in self.parameters.items() if p.is_leaf},
            "extra": lambda: {name: module.get_extra_state() for name, module in self._with_extra_state()},
            "optimizers": lambda: {
                path: optimizer_state(o, self._names) for path, o in found.optimizers.items()
            },
            "stateful": lambda: {name: thing.state_dict() for name, thing in self._stateful().items()},
            "generators": lambda: {path: state_of(generator) for path, generator in found.generators.items()},
            "rng": lambda: rng_state(self.generators),
        }

    def glance(self, without: Collection[str] = ("gradients", "parameters", "optimizers")) -> dict[str, Any]:
        """Return a state as `capture` does, without some parts."""
        copier, kinds = Copier(), [k for k in MOST_BYTES if k != "optimizer" or "optimizers" not in without]
        state = {key: copier.copy(part()) for key, part in self._parts().items() if key not in without}
        self._hold(state, copier, None, kinds)
        return state

    def _keep_changed(self, state: dict[str, Any]) -> None:
        """Leave out of a state what has its own way of being set back, a loader say, and has not changed."""
        for part in ("extra", "stateful"):
            now = Copier(share=True).copy(self._parts()[part]())
            state[part] = {n: v for n, v in state[part].items() if digest_of(v) != digest_of(now.get(n))}

    # Going back.

    def _restore(self, restorer: Restorer, state: Mapping[str, Any], origins: Origins) -> None:
        found = origins.found
        restore_dicts(origins)
        restore_forms(origins)
        for name, kept in state.get("parameters", {}).items():
            restorer.into(origins.parameters[name], kept)
        for name, trains in state.get("trains", {}).items():
            origins.parameters[name].requires_grad_(trains)
        for name, kept in state.get("gradients", {}).items():
            parameter = origins.parameters[name]
            restorer.mesh = getattr(parameter, "device_mesh", None)
            parameter.grad = restorer.restored(parameter.grad, kept)
        for name, module in found.modules.items():
            if "buffers" in state:
                restorer.restored(module._buffers, state["buffers"].get(name, {}))
                module.training = state["modes"].get(name, module.training)
            if name in state.get("extra", {}):
                module.set_extra_state(restorer.restored(None, state["extra"][name]))
        for path, kept in state.get("optimizers", {}).items():
            if path not in found.optimizers:
                raise ValueError(f"{path}: is no optimizer now, and was one when the state was taken.")
            restore_optimizer(restorer, path, found.optimizers[path], kept, origins)
        things = {**self.stateful, **found.stateful}
        last = things.pop(self._last, None)
        for name in [name for name in things if name in state.get("stateful", {})]:
            things[name].load_state_dict(Restorer().restored(None, state["stateful"][name]))
        restore_slots(restorer, state["attributes"], origins)
        kept_last = state.get("stateful", {}).get(self._last)
        if last is not None and kept_last is not None and last.load_state_dict(kept_last):
            # What it has drawn from may have changed.
            restore_slots(Restorer(origins.notes), state["attributes"], origins)
        restore_orders(origins)
        # Last, because restoring the data may draw from the generators.
        for path, kept in state["generators"].items():
            value = Restorer().restored(None, kept)
            generator = found.generators.get(path) or made_anew(found, path, value)
            if generator is not None:
                set_state_of(generator, value)
        set_rng_state(Restorer().restored(None, state["rng"]), self.generators)
