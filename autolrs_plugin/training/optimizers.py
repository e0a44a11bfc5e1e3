"""The state of an optimizer, taken and restored without its own state_dict(), which aliases and casts."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from autolrs_plugin.training.holdings import Origins
from autolrs_plugin.training.tree import Restorer

GROUP_PARAMS = "params"


def params_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group[GROUP_PARAMS]


def swaps_weights(optimizer: Any) -> bool:
    """Tell whether an optimizer evaluates at other weights than it trains: it has modes, as a module has."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the options of the groups and the state of each parameter; `names` are those of parameters, by id."""

    def key_of(key: Any) -> tuple[str, Any]:
        return ("parameter", names[id(key)]) if isinstance(key, torch.Tensor) else ("key", key)

    return {
        "groups": [{k: v for k, v in g.items() if k != GROUP_PARAMS} for g in optimizer.param_groups],
        "state": {key_of(key): value for key, value in optimizer.state.items()},
    }


def restore_optimizer(
    restorer: Restorer, path: str, optimizer: torch.optim.Optimizer, kept: Any, origins: Origins
) -> None:
    """Make the optimizer at `path` what it was when `optimizer_state` gave what was copied into `kept`.

    Raises:
        ValueError: it had another number of groups then.
    """
    groups = optimizer.param_groups
    if path in origins.params:
        del groups[len(origins.params[path]) :]  # a group that was added since
    if len(groups) != len(kept["groups"]):
        raise ValueError(
            f"{path}: has {len(groups)} parameter groups now and had {len(kept['groups'])} when the state was "
            "taken: a run whose groups were added on the way cannot be resumed; give the optimizer all groups from "
            "the beginning, for what needs no gradient yet it leaves alone."
        )
    for index, (group, kept_group) in enumerate(zip(groups, kept["groups"], strict=True)):
        options = restorer.restored({k: v for k, v in group.items() if k != GROUP_PARAMS}, kept_group)
        params = group[GROUP_PARAMS]
        if path in origins.params:
            params[:] = origins.params[path][index]
        group.clear()
        group.update({GROUP_PARAMS: params, **options})
    by_parameter = {_unkey(key, origins): value for key, value in kept["state"].items()}
    values = {}
    for key, value in by_parameter.items():
        restorer.mesh = getattr(key, "device_mesh", None)
        values[key] = restorer.restored(optimizer.state.get(key), value)
    optimizer.state.clear()
    optimizer.state.update(values)


def _unkey(key: tuple[str, Any], origins: Origins) -> Any:
    kind, name = key
    return origins.parameters[name] if kind == "parameter" else name
