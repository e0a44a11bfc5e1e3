"""The contract with vLLM: it lists all that we lean on, all of it is there, and what is missing is said."""

import ast
import functools
import logging
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

import vllm_sarathi
from vllm_sarathi import SarathiConfig
from vllm_sarathi.engine.vllm import contract, protocols
from vllm_sarathi.engine.vllm.contract import (
    ContractError,
    contract_violations,
    missing_attributes,
    touchpoint_violations,
)
from vllm_sarathi.engine.vllm.internals import installed_version, resolve
from vllm_sarathi.engine.vllm.surface import SURFACES, Surface
from vllm_sarathi.engine.vllm.touchpoints import CONTRACT, Touchpoint
from vllm_sarathi.testing.modelled import ModelledEngine

PACKAGE = Path(vllm_sarathi.__file__).parent
DECLARED = {surface.kind: {*surface.attributes, *surface.some} for surface in SURFACES}

PLAIN = (list, dict, set, str, int, deque, Path, re.Pattern, logging.Logger)

KINDS = {
    "scheduler": "Scheduler",
    "request": "Request",
    "vllm_config": "VllmConfig",
    "cache_config": "CacheConfig",
    "model_config": "ModelConfig",
    "parallel_config": "ParallelConfig",
    "scheduler_config": "SchedulerConfig",
    "speculative_config": "SpeculativeConfig",
    "sampling_params": "SamplingParams",
    "kv_cache_manager": "KVCacheManager",
    "coordinator": "KVCacheCoordinator",
    "block_pool": "BlockPool",
    "lora_config": "LoRAConfig",
    "lora_request": "LoRARequest",
    "kv_cache_config": "KVCacheConfig",
    "mm_position": "PlaceholderRange",
    "encoder_cache_manager": "EncoderCacheManager",
    "engine_args": "EngineArgs",
}
"""What a name stands for, wherever it stands in the code that handles vLLM's objects."""

LISTS = {"surface.py", "protocols.py"}
"""The modules that list vLLM's attributes, and read none."""

OURS_TOO = {"finished", "sleep"}
"""What objects of vLLM's have, too, but we only read of our own."""


@pytest.fixture
def fresh_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget that this process has been checked."""
    monkeypatch.setattr(contract, "check_contract", functools.cache(contract.check_contract.__wrapped__))


@pytest.mark.parametrize("touchpoint", CONTRACT, ids=lambda t: t.path.partition(":")[2])
def test_the_installed_vllm_has(touchpoint: Touchpoint) -> None:
    assert touchpoint_violations(touchpoint) == []


def test_the_installed_vllm_breaks_nothing_of_the_contract(make_config: Any) -> None:
    assert contract_violations() == []
    engine = ModelledEngine(make_config(SarathiConfig(token_budget=16)))
    assert missing_attributes("scheduler", engine.scheduler) == []
    assert missing_attributes("request", engine.add("a", 4)) == []


@functools.cache
def trees() -> dict[Path, ast.Module]:
    # The kit for those who write a policy may lean on more: serving needs none of it.
    served = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE / "testing"]
    return {path: ast.parse(path.read_text()) for path in served}


def handles_vllm(path: Path) -> bool:
    """True for a module that is handed vLLM's objects: it imports what makes or reads them."""
    return bool(re.search(r"engine\.(vllm|offline|inprocess|scheduler)\b", path.read_text())) or (
        path.parent.name == "vllm"
    )


def defined_by_us() -> set[str]:
    """Return the names of our own classes' methods, fields and attributes."""
    names: set[str] = set()
    for path, tree in trees().items():
        if path.name in LISTS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                names.add(last_name(node.target))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if ast.unparse(node.value) == "self":
                    names.add(node.attr)
            elif isinstance(node, ast.ClassDef):
                names |= {last_name(t) for s in node.body if isinstance(s, ast.Assign) for t in s.targets}
    return names


def last_name(node: ast.expr) -> str:
    return re.split(r"[.(\[]", ast.unparse(node).rstrip(")]"))[-1]


def attributes_used() -> Iterator[tuple[str, str, str]]:
    """Yield the module, the name in front of the dot and the name behind it, for each attribute in such modules."""
    for path, tree in trees().items():
        if handles_vllm(path):
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    yield str(path.relative_to(PACKAGE)), last_name(node.value), node.attr


def real_attributes(make_config: Any) -> dict[str, set[str]]:
    """Return all that the objects of each kind have in the installed vLLM."""
    engine = ModelledEngine(make_config())
    roots = {"scheduler": engine.scheduler, "request": engine.add("a", 4)}
    found = {}
    for surface in SURFACES:
        if surface.root in roots:
            names = filter(None, surface.at.split("."))
            target = functools.reduce(
                lambda held, name: getattr(held, name, None), names, roots[surface.root]
            )
        elif surface.root == "class":
            target = resolve(surface.at)
        else:
            continue
        declared = {*getattr(target, "__dataclass_fields__", ()), *getattr(target, "__struct_fields__", ())}
        found[surface.kind] = {n for n in {*dir(target), *declared} if not n.startswith("__")}
    return found


def test_whatever_the_code_reads_of_vllms_objects_is_declared(make_config: Any) -> None:
    """A name that one of vLLM's objects has, and nothing of Python's, is taken to be vLLM's wherever it is read."""
    real = set().union(*real_attributes(make_config).values())
    plain = {n for kind in (*PLAIN, os) for n in dir(kind)}
    declared = set().union(*DECLARED.values())
    undeclared = {use for use in attributes_used() if use[2] in real - plain - declared - OURS_TOO}
    assert not undeclared


def test_each_is_declared_for_the_kind_of_object_that_it_is_read_of() -> None:
    ours = defined_by_us()
    wrong = {
        use
        for use in attributes_used()
        if use[1] in KINDS and use[2] not in DECLARED[KINDS[use[1]]] and use[2] not in ours
    }
    assert not wrong


def test_nothing_is_declared_that_nobody_reads() -> None:
    texts = "\n".join(path.read_text() for path in trees() if handles_vllm(path) and path.name not in LISTS)
    read = set(re.findall(r"\w+", texts))
    assert {kind: names - read for kind, names in DECLARED.items() if names - read} == {}


def test_the_type_checker_knows_no_attribute_that_is_not_declared() -> None:
    """What is declared is looked for in each vLLM; what the type checker knows is a part of it."""
    known = {
        name: {n for n in {*vars(kind), *kind.__annotations__} if not n.startswith("_")}
        for name, kind in vars(protocols).items()
        if getattr(kind, "_is_protocol", False) and kind is not Protocol
    }
    assert known["Request"] >= {"num_tokens", "is_finished"}
    assert {kind: names - DECLARED[kind] for kind, names in known.items() if names - DECLARED[kind]} == {}


def test_each_internal_has_a_touchpoint() -> None:
    paths = {touchpoint.path for touchpoint in CONTRACT} | {s.at for s in SURFACES if s.root == "class"}
    named = {
        node.value
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "surface.py"
        if re.fullmatch(r"vllm(\.\w+)+:[\w.]+", node.value)
    }
    assert named
    assert not {name for name in named if not any((path + ".").startswith(name + ".") for path in paths)}


@pytest.mark.parametrize(
    ("touchpoint", "said"),
    [
        (Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.plan"), "Scheduler.plan is gone"),
        (Touchpoint("vllm.v1.core.nowhere:Scheduler"), "vllm.v1.core.nowhere:Scheduler is gone"),
        (
            Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.add_request", ("prompt",)),
            "Scheduler.add_request no longer takes 'prompt'",
        ),
    ],
)
def test_what_moved_is_said_with_the_tested_range(
    fresh_check: None, monkeypatch: pytest.MonkeyPatch, touchpoint: Touchpoint, said: str
) -> None:
    monkeypatch.setattr(contract, "CONTRACT", (touchpoint,))
    with pytest.raises(ContractError, match=said) as error:
        contract.scheduler_classes()
    assert contract.tested_range() in str(error.value)
    assert installed_version() in str(error.value)


@pytest.mark.parametrize(
    ("surface", "said"),
    [
        (Surface("Request", "request", "", ("is_a_prefill",)), "Request has no attribute 'is_a_prefill'."),
        (
            Surface("EngineArgs", "class", "vllm.engine.arg_utils:EngineArgs", ("scheduler_cls", "tempo")),
            "EngineArgs has no attribute 'tempo'.",
        ),
        (
            Surface("Gone", "class", "vllm.engine.arg_utils:Gone", ("a",)),
            "vllm.engine.arg_utils:Gone is gone",
        ),
    ],
)
def test_a_missing_attribute_is_said(monkeypatch: pytest.MonkeyPatch, surface: Surface, said: str) -> None:
    monkeypatch.setattr(contract, "SURFACES", (surface,))
    (violation,) = contract_violations()
    assert violation.startswith(said)


def test_what_a_scheduler_lacks_is_said() -> None:
    assert "Scheduler has no attribute 'running'." in missing_attributes("scheduler", object())


def test_an_untested_version_warns_once(
    fresh_check: None, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr(contract, "installed_version", lambda: "0.99.1+cpu")
    contract.check_contract()
    contract.check_contract()
    assert warned == [
        f"vLLM 0.99.1+cpu is not among the versions that vllm-sarathi is tested with ({contract.tested_range()})."
    ]
