"""The whole state of a training job, taken and restored bit for bit."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from autolrs_plugin.training.rng import Generator, check_generator, rng_kept, rng_state, set_rng_state
from autolrs_plugin.training.tree import Copier, Restorer, local

_GROUP_PARAMS = "params"
_OPTIMIZER_OWN = frozenset({"param_groups", "state", "defaults"})

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stateful(Protocol):
    """Whatever keeps its state as torch's own objects do: schedulers, scalers, samplers, averages of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class JobState:
    """Everything of a training job that a step changes.

    Trainable parameters and their gradients, buffers (always all), train/eval modes, the optimizer with all options
    of its groups and its own attributes, the state of every `stateful` object, and every random number generator.
    Frozen parameters are not copied: no step changes them.

    Args:
        model: the model.
        optimizer: its optimizer; one that wraps another is followed.
        stateful: more objects to take along, by name (an AMP scaler, a scheduler, the data, an average of weights).
        generators: random number generators beside the global ones.

    Raises:
        ValueError: the optimizer has no parameters, or none of the model's; or a parameter is still uninitialised.
        TypeError: a `stateful` object has no state_dict/load_state_dict, or a generator is of an unknown kind.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        stateful: Mapping[str, Stateful] | None = None,
        generators: Sequence[Generator] = (),
    ) -> None:
        _check_job(model, optimizer)
        reshard(model)
        self.model = model
        self.optimizer = optimizer
        self.stateful = dict(stateful or {})
        self.generators = tuple(generators)
        for name, thing in self.stateful.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise TypeError(
                    f"{name}: a {type(thing).__name__} has no state_dict() and load_state_dict(), so it cannot be "
                    "rolled back."
                )
        for generator in self.generators:
            check_generator(generator)
        self.parameters = dict(model.named_parameters())
        names = {id(p): name for name, p in self.parameters.items()}
        for index, parameter in enumerate(_params_of(optimizer)):
            if id(parameter) not in names:
                self.parameters[f"optimizer.{index}"] = parameter
                names[id(parameter)] = f"optimizer.{index}"
        self._names = names

    def trainable(self) -> dict[str, torch.Tensor]:
        """Return the parameters that a step may change, by name."""
        optimized = {id(p) for p in _params_of(self.optimizer)}
        return {n: p for n, p in self.parameters.items() if p.requires_grad or id(p) in optimized}

    def frozen(self) -> dict[str, torch.Tensor]:
        """Return the parameters that no step changes, by name."""
        trainable = self.trainable()
        return {n: p for n, p in self.parameters.items() if n not in trainable}

    def capture(self, copier: Copier, old: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the state now, as plain containers of TensorCopy and plain values.

        Args:
            copier: makes the copies.
            old: a state captured before that nobody needs any more: its memory is used again.
        """
        reshard(self.model)
        parameters = self.trainable()
        live = {
            "parameters": parameters,
            "gradients": {name: p.grad for name, p in parameters.items()},
            "buffers": {name: module._buffers for name, module in self.model.named_modules()},
            "modes": {name: module.training for name, module in self.model.named_modules()},
            "extra": {name: module.get_extra_state() for name, module in _with_extra_state(self.model)},
            "optimizer": self._optimizer_state(self.optimizer),
            "stateful": {name: thing.state_dict() for name, thing in self.stateful.items()},
            "rng": rng_state(self.generators),
        }
        olds = old or {}
        return {key: copier.copy(value, olds.get(key)) for key, value in live.items()}

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Leave the job as it was after something that only looks at it: buffers, train/eval modes and generators."""
        modules = list(self.model.modules())
        modes = [module.training for module in modules]
        kept = Copier().copy([module._buffers for module in modules])
        with rng_kept(self.generators):
            yield
        restorer = Restorer()
        with torch.no_grad():
            for module, training, buffers in zip(modules, modes, kept, strict=True):
                module.training = training
                restorer.restored(module._buffers, buffers)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make the job what it was when `state` was captured; tensors in use are written in place."""
        reshard(self.model)
        with torch.no_grad():
            self._restore(Restorer(), state)

    def _restore(self, restorer: Restorer, state: Mapping[str, Any]) -> None:
        for name, kept in state["parameters"].items():
            restorer.into(self.parameters[name], kept)
        for name, kept in state["gradients"].items():
            parameter = self.parameters[name]
            restorer.mesh = getattr(parameter, "device_mesh", None)
            parameter.grad = restorer.restored(parameter.grad, kept)
        for name, module in self.model.named_modules():
            restorer.restored(module._buffers, state["buffers"].get(name, {}))
            module.training = state["modes"].get(name, module.training)
        for name, module in _with_extra_state(self.model):
            module.set_extra_state(restorer.restored(None, state["extra"][name]))
        self._restore_optimizer(restorer, self.optimizer, state["optimizer"])
        for name, thing in self.stateful.items():
            thing.load_state_dict(Restorer().restored(None, state["stateful"][name]))
        # Last, because restoring the data may draw from the generators.
        rng = Restorer().restored(None, state["rng"])
        set_rng_state(rng, self.generators)

    def _optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "groups": [{k: v for k, v in g.items() if k != _GROUP_PARAMS} for g in optimizer.param_groups],
            "state": {self._key(key): value for key, value in optimizer.state.items()},
            "attributes": {k: v for k, v in vars(optimizer).items() if self._is_own(k, v)},
            "inner": {name: self._optimizer_state(inner) for name, inner in _inner_optimizers(optimizer)},
        }

    def _restore_optimizer(self, restorer: Restorer, optimizer: torch.optim.Optimizer, kept: Any) -> None:
        if len(optimizer.param_groups) != len(kept["groups"]):
            raise ValueError(
                f"optimizer: has {len(optimizer.param_groups)} parameter groups now and had {len(kept['groups'])}; "
                "groups cannot be added or removed while tuning."
            )
        for group, kept_group in zip(optimizer.param_groups, kept["groups"], strict=True):
            options = restorer.restored({k: v for k, v in group.items() if k != _GROUP_PARAMS}, kept_group)
            params = group[_GROUP_PARAMS]
            group.clear()
            group.update({_GROUP_PARAMS: params, **options})
        by_parameter = {self._unkey(key): value for key, value in kept["state"].items()}
        values = {}
        for key, value in by_parameter.items():
            restorer.mesh = getattr(key, "device_mesh", None)
            values[key] = restorer.restored(optimizer.state.get(key), value)
        optimizer.state.clear()
        optimizer.state.update(values)
        own = {k: v for k, v in vars(optimizer).items() if self._is_own(k, v)}
        for name in own.keys() - kept["attributes"].keys():
            delattr(optimizer, name)
        for name, value in kept["attributes"].items():
            setattr(optimizer, name, restorer.restored(own.get(name), value))
        for name, inner in _inner_optimizers(optimizer):
            self._restore_optimizer(restorer, inner, kept["inner"][name])

    def _key(self, key: Any) -> tuple[str, Any]:
        return ("parameter", self._names[id(key)]) if isinstance(key, torch.Tensor) else ("key", key)

    def _unkey(self, key: tuple[str, Any]) -> Any:
        kind, name = key
        return self.parameters[name] if kind == "parameter" else name

    def _is_own(self, name: str, value: Any) -> bool:
        """Return whether an attribute of an optimizer is state: counters and tensors that it keeps outside `state`."""
        return name not in _OPTIMIZER_OWN and not name.endswith("_hooks") and self._is_plain(value)

    def _is_plain(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return id(value) not in self._names
        if isinstance(value, dict):
            return all(self._is_plain(v) and not isinstance(k, torch.Tensor) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(self._is_plain(v) for v in value)
        return isinstance(value, bool | int | float | str | None)


def fingerprint(job: JobState) -> str:
    """Return a few bytes that change when a weight does: cheap enough for every action.

    Trainable parameters count by the sum of their bits as integers, frozen ones by torch's count of writes.
    """
    trainable = job.trainable()
    sums = [_bit_sum(local(p.detach())) for p in trainable.values()]
    digest = hashlib.sha256()
    for device in dict.fromkeys(s.device for s in sums):
        digest.update(repr(torch.stack([s for s in sums if s.device == device]).tolist()).encode())
    frozen = [(p._version, p.data_ptr()) for n, p in job.parameters.items() if n not in trainable]
    digest.update(repr(frozen).encode())
    return digest.hexdigest()[:16]


def weights_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and every bit of `parameters`."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        data = local(parameter.detach()).cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integers = tensor.view(_INTEGERS[tensor.element_size()])
    if tensor.is_contiguous() and tensor.element_size() < 8:
        flat = integers.reshape(-1)
        per_word = 8 // tensor.element_size()
        # Whole 64-bit words are summed thirty times as fast as smaller integers, which torch widens first.
        if flat.numel() % per_word == 0 and flat.storage_offset() % per_word == 0 and flat.numel():
            integers = flat.view(torch.int64)
    return integers.sum(dtype=torch.int64)


def reshard(model: torch.nn.Module) -> None:
    """Make FSDP2 let go of weights that it has gathered.

    After a forward pass without a backward pass the root keeps them for the next forward pass, which would then not
    see what is written into its parameters meanwhile.
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()


def _check_wrapper(model: torch.nn.Module) -> None:
    kinds = type(model).__mro__
    if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in kinds):
        raise ValueError(
            f"model: a {type(model).__name__} partitions weights and optimizer state out of reach, so a step of it "
            "cannot be undone; train with DistributedDataParallel or FSDP2 (fully_shard) to use AutoLRS."
        )
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds):
        raise ValueError(
            "model: FullyShardedDataParallel (FSDP1) flattens the parameters, so a step of it cannot be undone; use "
            "FSDP2 (torch.distributed.fsdp.fully_shard)."
        )


def _check_job(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    _check_wrapper(model)
    params = list(_params_of(optimizer))
    if not params:
        raise ValueError("optimizer: has no parameters; there is nothing to train.")
    of_model = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in of_model for p in params):
        raise ValueError(
            "optimizer: none of its parameters belongs to the model; was it built for another one?"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f"model: the parameter {name!r} is uninitialised; pass one batch through the model first."
            )


def _params_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group[_GROUP_PARAMS]


def _inner_optimizers(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    return ((n, v) for n, v in list(vars(optimizer).items()) if isinstance(v, torch.optim.Optimizer))


def _with_extra_state(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            yield name, module
