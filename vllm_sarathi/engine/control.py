"""Live control, in the engine core's process: what is asked, what is changed, what is refused.

A command is a JSON object, and so is the answer: `{"status": 200, ...}` as HTTP has it, or `{"status": 4xx, "error":
"one sentence"}`. It runs between two steps, in the thread of the engine's loop, so that no step sees half a change.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from vllm_sarathi.core.classes import NO_TIER, AskedSlo, Bond, SloClass, SloClasses
from vllm_sarathi.core.config import (
    BASELINES,
    NO_CALIBRATION,
    ConfigError,
    SarathiConfig,
    check_keys,
    flag_name,
    nearest_hint,
)
from vllm_sarathi.core.errors import short
from vllm_sarathi.core.first_token import QueueView
from vllm_sarathi.core.forecast import forecast_first_token, forecast_in_line
from vllm_sarathi.core.gate import Gate
from vllm_sarathi.engine.telemetry import Telemetry
from vllm_sarathi.engine.trace_file import StepTraceFile, check_step_trace
from vllm_sarathi.engine.vllm.internals import engine_rank, logger
from vllm_sarathi.engine.vllm.protocols import Request
from vllm_sarathi.engine.vllm.queues import waiting_requests
from vllm_sarathi.engine.vllm.support import check_engine

AT_START_ONLY = (
    "calibration_dir",
    "step_trace",
    "slo_classes",
    "fairness_header",
    "scheduler_base",
)
"""Settings that name files: who may change an SLO is not thereby one who may choose what the server writes to. And what
clients and routers go by; of the classes, that is what `SloClasses.changed` does not take."""

MOST_COUNTED = 4096
"""The most waiting prompts that are counted one by one; the others are taken to be like them."""


class Control:
    """Answers control commands for one scheduler.

    Args:
        scheduler: ours.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._traced_to: Path | None = None
        self._calibration_dir = scheduler.config.calibration_dir
        self._commands = {
            "state": self._state,
            "change": self._change,
            "trace": self._trace,
            "first_token": self._first_token,
        }

    def answer(self, command: str) -> str:
        """Return the answer to a command; both are JSON. Nothing that is asked ends the engine."""
        try:
            asked = json.loads(command)
            answer = {"status": 200, **self._commands[asked["command"]](asked)}
        except ConfigError as error:
            answer = {"status": 400, "error": str(error)}
        except Exception as error:
            self._scheduler.faults.note(error)
            answer = {"status": 500, "error": "an error of the plugin; the server's log says more."}
        return json.dumps(answer)

    def _state(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        scheduler = self._scheduler
        controller, model = scheduler.controller, scheduler.controller.model
        queues = scheduler.queues()
        return {
            "rank": engine_rank(scheduler.vllm_config),
            "settings": scheduler.config.to_mapping(),
            "tbt_slo_s": controller.tbt_slo_s,
            "running": queues.running,
            "waiting": dict(queues.waiting),
            "step_trace": self._trace_path(),
            "step_model": {
                "ready": model.ready,
                "steps": model.steps,
                "margin": model.margin,
                "relative_error": model.relative_error,
            },
            "faults": scheduler.faults.total,
        }

    def _change(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Change settings: a value of null puts a setting back to its default."""
        scheduler, changes = self._scheduler, asked["settings"]
        if not scheduler.chunks:
            raise ConfigError("vLLM has switched chunked prefill off: its stock scheduling applies.")
        check_keys(changes, origin="PATCH")
        classes = scheduler.config.slo_classes
        # A text would be a file's name.
        if classes is not None and isinstance(changes.get("slo_classes"), Mapping):
            changes = {**changes, "slo_classes": classes.changed(changes["slo_classes"])}
        for key in AT_START_ONLY:
            if key in changes and not isinstance(changes[key], SloClasses):
                raise ConfigError(f"{flag_name(key)}: can only be given when the server starts.")
        old = scheduler.config.to_mapping()
        defaults = {setting.name: setting.default for setting in fields(SarathiConfig)}
        given = {key: defaults[key] if value is None else value for key, value in changes.items()}
        values = {**old, **given}
        if self._calibration_dir is not None:  # given at the start, it is without effect while nothing learns
            learns = values["token_budget"] is None and values["scheduler"] not in BASELINES
            values["calibration_dir"] = self._calibration_dir if learns else NO_CALIBRATION
        config = SarathiConfig.from_mapping(values)
        check_engine(scheduler.vllm_config, config)
        changed = {key: value for key, value in config.to_mapping().items() if value != old[key]}
        if changed:
            self._reconfigure(config)
        for key, value in changed.items():
            for name, new, before in _differences(key, value, old[key]):
                logger.warning("Changed while serving: %s is %r now, and was %r.", name, new, before)
        return {
            "changed": {key: {"old": old[key], "new": value} for key, value in changed.items()},
            **self._state(asked),
        }

    def _reconfigure(self, config: SarathiConfig) -> None:
        scheduler = self._scheduler
        scheduler.controller.reconfigure(config)
        scheduler.config = config
        scheduler.views.reconfigure(config)
        if scheduler.telemetry is not None:
            scheduler.telemetry.reconfigured()

    def _trace(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Start or stop the step trace, in the file of `--step-trace`, or in one in a folder of our own."""
        if asked["on"] and self._trace_path() is None:
            path = self._traced_to = self._traced_to or self._new_trace()
            check_step_trace(str(path))
            self._write_steps(StepTraceFile(path))
            logger.warning("The step trace was started while serving: %s.", path)
        elif not asked["on"] and (written := self._trace_path()) is not None:
            self._traced_to = Path(written)
            self._write_steps(None)
            logger.warning("The step trace was stopped while serving: %s.", written)
        return {
            "step_trace": self._trace_path(),
            "last_step_trace": None if self._traced_to is None else str(self._traced_to),
        }

    def _write_steps(self, trace: StepTraceFile | None) -> None:
        scheduler = self._scheduler
        if scheduler.telemetry is None:
            scheduler.telemetry = Telemetry(
                scheduler.controller, pipeline=scheduler.controller.pipeline, log=False, trace=trace
            )
        scheduler.telemetry.trace = trace

    def _trace_path(self) -> str | None:
        telemetry = self._scheduler.telemetry
        return None if telemetry is None or telemetry.trace is None else str(telemetry.trace.path)

    @staticmethod
    def _new_trace() -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix="vllm-sarathi-trace-")) / "steps.jsonl"
        except OSError as error:
            raise ConfigError(f"the step trace cannot be started ({error.strerror}).") from error

    def _first_token(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Say how long a prompt would wait, and whether the SLO of its class, or the one that is asked for, is kept."""
        config, tokens = self._scheduler.config, asked["tokens"]
        slo_ms = asked.get("ttft_slo_ms")
        bond = Bond(None, None if slo_ms is None else slo_ms / 1e3)
        if config.slo_classes is not None:
            bond = _bond(config.slo_classes, asked.get("slo_class"), bond.ttft_slo_s)
        elif "slo_class" in asked:
            raise ConfigError(
                f"slo_class {short(asked['slo_class'])}: this server has no classes (--slo-classes)."
            )
        elif slo_ms is None and config.ttft_slo_ms is not None:
            bond = Bond(None, config.ttft_slo_ms / 1e3)
        queue = self._line(bond, tokens)
        if queue is None:
            forecast = forecast_first_token(
                ttft_slo_s=bond.ttft_slo_s,
                tokens=tokens,
                ahead_tokens=self._tokens_ahead(tokens),
                **self._device(),
            )
        else:
            forecast = forecast_in_line(queue, tokens, bond.ttft_slo_s, last=bond.ttft_slo_s is None)
        return {
            "slo_class": None if bond.slo_class is None else bond.slo_class.name,
            "wait_s": forecast.wait_s,
            "ahead_tokens": forecast.ahead_tokens,
            "ttft_slo_s": bond.ttft_slo_s,
            "kept": forecast.kept,
        }

    def _device(self) -> dict[str, Any]:
        """Return what the pace of reading follows from, as `forecast.prefill_token_s` takes it."""
        scheduler, controller = self._scheduler, self._scheduler.controller
        generating = [r for r in scheduler.running if not r.is_prefill_chunk]
        slo_s = controller.tbt_slo_s
        return {
            "model": controller.model,
            "decodes": len(generating),
            "context_tokens": sum(r.num_computed_tokens for r in generating),
            "step_slo_s": None if slo_s is None else controller.pipeline.step_s(slo_s),
            "most_tokens": scheduler.max_num_scheduled_tokens,
        }

    def _line(self, bond: Bond, tokens: int) -> QueueView | None:
        """Return what is to be read by classes; None without any, or while nothing is known of the pace of reading."""
        scheduler = self._scheduler
        gate: Gate | None = scheduler.controller.gate
        if gate is None:
            return None
        scheduler.admissions.note_progress()
        idle_tokens = tokens if scheduler.admissions.idle() else None
        if (queue := gate.queue(scheduler.wall_clock(), idle_tokens)) is None:
            return None
        admitted = set(gate.standing)
        rest = sum(
            _left(request)
            for request in self._unread()
            if request.request_id not in admitted and (bond.batch or not scheduler.views.bond(request).batch)
        )
        return replace(queue, rest_s=queue.rest_s + rest * queue.token_s)

    def _unread(self) -> Iterator[Request]:
        """Iterate over the requests with tokens to read: those in flight, and the first of those that wait."""
        scheduler = self._scheduler
        yield from (request for request in scheduler.running if request.is_prefill_chunk)
        yield from itertools.islice(waiting_requests(scheduler), MOST_COUNTED)

    def _tokens_ahead(self, tokens: int) -> int:
        """Return the prompt tokens that are read before a new prompt of `tokens`, in an order without classes."""
        scheduler = self._scheduler
        partial = [_left(request) for request in scheduler.running if request.is_prefill_chunk]
        left = [_left(request) for request in self._unread()][len(partial) :]
        unseen = max(0, scheduler.queues().total_waiting - len(left))
        if scheduler.config.prefill_order == "sjf":
            ahead = sum(each for each in left if each <= tokens)
        else:
            ahead = sum(left)
        return sum(partial) + ahead + (ahead * unseen // len(left) if left else 0)


def _differences(key: str, new: Any, old: Any) -> Iterator[tuple[str, object, object]]:
    """Yield the name, the new and the old value of what a setting says otherwise; of classes, each value by itself."""
    if key != "slo_classes":
        yield flag_name(key), new, old
        return
    plain = asdict(SloClass(""))  # what a class has that does not say
    for name, values in new["classes"].items():
        before = {**plain, **old["classes"][name]}
        for each, value in {**plain, **values}.items():
            if value != before[each]:
                yield f"{flag_name(key)} classes.{name}.{each}", value, before[each]


def _bond(classes: SloClasses, name: str | None, ttft_slo_s: float | None) -> Bond:
    """Return what a request of a class would be bound to.

    Raises:
        ConfigError: no class and no tier has the name.
    """
    name = None if name == NO_TIER else name
    if name is not None and classes.named(name) is None:
        raise ConfigError(
            f"slo_class {short(name)}: unknown; {nearest_hint(name, [each.name for each in classes.classes])}"
        )
    return AskedSlo(ttft_slo_s=ttft_slo_s, class_name=name).bind(classes)


def _left(request: Request) -> int:
    """Return the prompt tokens of a request that are not read yet."""
    return int(request.num_tokens - request.num_computed_tokens)
