"""What we lean on in vLLM, and whether the vLLM that is installed has it.

What that is, is listed in `surface`; tests collect it from the code of this project, so that the list cannot be short.
"""

import functools
import inspect
from typing import Any, Literal

from vllm_sarathi.engine.vllm.internals import (
    installed_version,
    logger,
    request_class,
    resolve,
    sampling_params_class,
)
from vllm_sarathi.engine.vllm.surface import SURFACES, Surface
from vllm_sarathi.engine.vllm.touchpoints import CONTRACT, Touchpoint

TESTED_VERSIONS = ((0, 30), (0, 33))
"""First and last minor release of vLLM that the contract and the scheduler-level tests were run against."""


class ContractError(RuntimeError):
    """The installed vLLM lacks something that we lean on."""


def tested_range() -> str:
    """Return the tested versions as a user reads them."""
    first, last = (".".join(map(str, v)) for v in TESTED_VERSIONS)
    return f"{first}.x to {last}.x"


def scheduler_classes() -> tuple[type[Any], type[Any]]:
    """Return vLLM's synchronous and asynchronous scheduler classes.

    Raises:
        ImportError: vLLM is not installed.
        ContractError: this vLLM lacks something that we lean on.
    """
    sync = resolve("vllm.v1.core.sched.scheduler:Scheduler")
    check_contract()
    return sync, resolve("vllm.v1.core.sched.async_scheduler:AsyncScheduler")


def _parameters_missing(function: Any, wanted: tuple[str, ...]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    names = {p.name for p in parameters}
    return [name for name in wanted if name not in names]


def touchpoint_violations(touchpoint: Touchpoint) -> list[str]:
    """Return one sentence for each way in which the installed vLLM differs from a touchpoint."""
    try:
        target = resolve(touchpoint.path)
    except (ImportError, AttributeError) as error:
        return [f"{touchpoint.path} is gone ({error})."]
    missing = _parameters_missing(target, touchpoint.parameters) if touchpoint.parameters else []
    return [f"{touchpoint.path} no longer takes {name!r}." for name in missing]


def contract_violations() -> list[str]:
    """Return one sentence for each thing that the installed vLLM lacks or has moved; empty if all is there."""
    violations = [said for touchpoint in CONTRACT for said in touchpoint_violations(touchpoint)]
    for surface in SURFACES:
        if surface.root == "class":
            violations += _missing_in_class(surface)
    return violations + _missing_in_request()


def _missing_in_class(surface: Surface) -> list[str]:
    try:
        kind = resolve(surface.at)
    except (ImportError, AttributeError) as error:
        return [f"{surface.at} is gone ({error})."]
    declared = {*getattr(kind, "__dataclass_fields__", ()), *getattr(kind, "__struct_fields__", ())}
    return [
        f"{surface.kind} has no attribute {name!r}."
        for name in surface.attributes
        if name not in declared and not hasattr(kind, name)
    ]


def _missing_in_request() -> list[str]:
    try:
        request = request_class()(
            request_id="contract",
            prompt_token_ids=[0],
            sampling_params=sampling_params_class()(max_tokens=1),
            pooling_params=None,
            arrival_time=0.0,
        )
    except TypeError as error:
        return [f"vllm.v1.request:Request is built otherwise ({error})."]
    return missing_attributes("request", request)


def missing_attributes(root: Literal["scheduler", "request", "engine"], target: Any) -> list[str]:
    """Return one sentence for each attribute that an object of this vLLM, or one that it holds, lacks."""
    missing = []
    for surface in SURFACES:
        if surface.root != root:
            continue
        holder = target
        for name in filter(None, surface.at.split(".")):
            holder = getattr(holder, name, None)
        if (
            holder is not None
        ):  # where one is gone, its holder's own surface says so; some are None when unused
            missing += [
                f"{surface.kind} has no attribute {name!r}."
                for name in surface.attributes
                if not hasattr(holder, name)
            ]
    return missing


def raise_violations(violations: list[str]) -> None:
    """Raise ContractError that says what moved, if anything did."""
    if violations:
        raise ContractError(
            f"vLLM {installed_version()} does not fit vllm-sarathi, which is tested with {tested_range()}: "
            + " ".join(violations)
        )


@functools.cache
def check_contract() -> None:
    """Check the installed vLLM once per process.

    Raises:
        ContractError: something that we lean on is gone; the message says what, and names the tested range.
    """
    raise_violations(contract_violations())
    version = installed_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TESTED_VERSIONS[0] <= numbers <= TESTED_VERSIONS[1]:
        logger.warning(
            "vLLM %s is not among the versions that vllm-sarathi is tested with (%s).",
            version,
            tested_range(),
        )
