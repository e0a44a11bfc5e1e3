"""A life: vLLM's real scheduler with its assertions on, ours or stock's, through whatever happens.

What must hold, whatever happens: nothing is raised; each step is consistent in itself; nothing of what vLLM must not
cut is cut; and once all that blocks has ended, everybody finishes and no block is left.
"""

import zlib
from concurrent.futures import Future
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.engine.fuzz.connector import LateConnector
from tests.engine.fuzz.events import (
    Abort,
    Add,
    Duplicate,
    Event,
    Grammar,
    Leap,
    Load,
    Part,
    Pause,
    Reset,
    Sent,
    Steps,
    WallLeap,
)
from tests.engine.fuzz.setups import (
    CLASSES,
    IMAGE_TOKENS,
    MAX_MODEL_LEN,
    STOCK,
    Setup,
    hasher,
    scheduler_class,
    vllm_config,
)
from vllm_sarathi.engine.offline import build_request
from vllm_sarathi.testing.modelled import VOCABULARY, ModelledEngine, Step
from vllm_sarathi.testing.play import Play

MOST_EMPTY_STEPS = 16
"""Steps in a row that may take nothing while somebody could be served."""

MOST_STEPS_TO_END = 3000
MOST_STEPS_OF_ONE = 100
"""Steps after which everybody has finished, and as many more for each that is there: with one slot they are served one
after the other, and an answer has up to two dozen tokens, each two steps of a pipeline."""

TOKEN_S = 0.0002

SLO_CLASSES = (*CLASSES["classes"], "nobody")
"""What requests call their class where there are classes; one name is no class."""


class AnyGrammar:
    """A grammar that takes every token."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        pass

    def is_terminated(self) -> bool:
        return False


class FuzzedEngine(ModelledEngine):
    """A modelled engine that tells what its connector did, and loses clients while a batch is computed."""

    def __init__(self, setup: Setup) -> None:
        config = vllm_config(setup)
        drafts = setup.drafts if setup.mode != "async" else 0  # else the workers draft by themselves
        super().__init__(
            config,
            setup.blocks,
            setup.in_flight,
            scheduler_class(setup),
            (lambda name, position: self.drafts(name, position, drafts)) if drafts else None,
        )
        self.setup = setup
        self._hasher = hasher(setup, config)
        self.aborts_inside: list[str] = []
        self.aborted: set[str] = set()

    @property
    def connector(self) -> LateConnector | None:
        return self.scheduler.connector

    def drafts(self, name: str, position: int, count: int) -> list[int]:
        """Return draft tokens, of which about two of three are right."""
        right = zlib.crc32(f"{name}/{position}/drafts".encode()) % (count + 1)
        return [self.token(name, position + i) + (i >= right) for i in range(count)]

    def abort(self, name: str) -> None:
        self.aborted.add(name)
        super().abort(name)

    def _execute(self, step: Step) -> Any:
        result = super()._execute(step)
        if self.connector is not None:
            result.kv_connector_output = self.connector.take_output()
        for name in self.aborts_inside:
            self.abort(name)
        self.aborts_inside.clear()
        return result

    def _sample(self, step: Step, name: str) -> list[int]:
        drafts = step.output.scheduled_spec_decode_tokens.get(name, ())
        if self.setup.mode != "async" or not drafts or name not in step.sampling:
            return super()._sample(step, name)
        # The scheduler has only placeholders; one that is new has no drafts in the workers.
        new = {request.request_id for request in step.admitted}
        kept = 0 if name in new else zlib.crc32(f"{name}/{step.sampling[name]}".encode()) % (len(drafts) + 1)
        return [self.token(name, step.sampling[name] + i) for i in range(kept + 1)]


class Life(Play):
    """Plays events on an engine and checks what must hold.

    Raises AssertionError, or whatever vLLM raises, where it does not.
    """

    engine: FuzzedEngine
    most_empty_steps = MOST_EMPTY_STEPS

    def __init__(self, setup: Setup) -> None:
        super().__init__(FuzzedEngine(setup), setup.limit)
        self.setup = setup
        self.ours = setup.policy != STOCK
        self.now_s = 1000.0
        self.wall_shift_s = 1e6
        self.step_s = 0.01
        self.added: dict[str, Add] = {}
        self.grammars: dict[str, Future[Any]] = {}
        self.streams: dict[str, bool] = {}
        if self.ours:
            self.scheduler.wall_clock = lambda: self.wall_s
        self.lora_limit = self._lora_limit()

    # --- What happens ---

    def happen(self, event: Event) -> None:
        scheduler = self.scheduler
        match event:
            case Add():
                for copy in range(event.copies):
                    self._add(event, copy)
            case Steps(count, seconds):
                self.step_s = seconds
                for _ in range(count):
                    self.step()
            case Abort(index, inside):
                if name := _one_of(list(scheduler.requests), index):
                    self.engine.aborts_inside.append(name) if inside else self.engine.abort(name)
            case Pause(state):
                scheduler.set_pause_state(PauseState[state])
            case Reset(running):
                # vLLM refuses a reset by force where blocks are held outside of `running`.
                if not (running and (self.engine.connector or len(self._set_aside))):
                    scheduler.reset_prefix_cache(reset_running_requests=running)
            case Duplicate(index):
                if self.ours and (name := _one_of(list(scheduler.requests), index)):
                    self._duplicate(name)
            case Part(index, tokens):
                if name := _one_of([n for n, open_ in self.streams.items() if open_], index):
                    self._part(name, tokens)
            case Grammar(index, well):
                if name := _one_of([n for n, future in self.grammars.items() if not future.done()], index):
                    self._compiled(name, well)
            case Load(index, well):
                if self.engine.connector:
                    self.engine.connector.end_load(index, well)
            case Sent():
                if self.engine.connector:
                    self.engine.connector.end_send()
            case Leap(seconds):
                self.now_s += seconds
            case WallLeap(seconds):
                self.wall_shift_s += seconds

    @property
    def wall_s(self) -> float:
        """The wall clock; the other one never goes back."""
        return self.now_s + self.wall_shift_s

    def _add(self, event: Add, copy: int) -> None:
        name = f"r{len(self.added)}"
        self.added[name] = event
        extra: dict[str, Any] = {}
        if event.remote:
            how = event.how.split()
            extra["kv_transfer_params"] = {
                "remote_tokens": event.remote,
                "async": "async" in how,
                "unsure": 2 * ("unsure" in how),
                "send": "send" in how,
            }
        if event.slo_ms is not None:
            extra |= {"tbt_slo_ms": event.slo_ms, "ttft_slo_ms": 4 * event.slo_ms}
        if self.setup.policy == "classes":
            extra |= {
                "slo_class": SLO_CLASSES[event.prompt % len(SLO_CLASSES)],
                "slo_tenant": f"t{event.seed}",
            }
        sampling: dict[str, Any] = {"extra_args": extra} if extra else {}
        if event.logprobs:
            sampling["prompt_logprobs"] = 1
        if event.grammar:
            sampling["structured_outputs"] = StructuredOutputsParams(json_object=True)
        request = self.engine.add(
            name,
            [(event.seed * 31 + i * 7) % VOCABULARY for i in range(event.prompt)],
            min(event.answer, MAX_MODEL_LEN - event.prompt),
            arrival_s=self.wall_s,
            sampling=sampling,
            priority=event.priority,
            lora_request=_adapter(event.adapter),
            mm_features=[_image(event.seed, at) for at in event.images] or None,
            resumable=event.stream,
        )
        if event.stream:
            self.streams[name] = True
        if event.grammar:
            self.grammars[name] = request.structured_output_request.grammar = Future()
            if (event.seed + copy) % 3 == 0:
                self._compiled(name, True)

    def _compiled(self, name: str, well: bool) -> None:
        if well:
            self.grammars[name].set_result(AnyGrammar())
        else:
            self.grammars[name].set_exception(ValueError("no such grammar"))

    def _duplicate(self, name: str) -> None:
        request = build_request(name, [5] * 30, 3, self.wall_s, block_hasher=self.engine._hasher)
        if self.scheduler.requests[name].streaming_queue is None:
            self.scheduler.add_request(request)

    def _part(self, name: str, tokens: int) -> None:
        request = self.scheduler.requests.get(name)
        if request is None or request.is_finished():
            self.streams[name] = False
            return
        room = (
            MAX_MODEL_LEN
            - request.num_tokens
            - sum(
                len(update.prompt_token_ids) + update.max_tokens
                for update in request.streaming_queue
                if update
            )
        )
        if tokens > room - 40:
            tokens = 0
        self.streams[name] = tokens > 0
        part = build_request(
            name, [9] * max(1, tokens), 3, self.wall_s, block_hasher=self.engine._hasher, resumable=tokens > 0
        )
        self.scheduler.add_request(part)

    # --- A step, and what must hold in it ---

    def seconds_of(self, step: Step) -> float:
        return self.step_s + TOKEN_S * sum(step.scheduled.values())

    def check(self, step: Step) -> None:
        assert self._lora_limit() == self.lora_limit, "limits are not restored"
        adapters = {self.added[name].adapter for name in step.scheduled} - {0}
        assert not self.setup.adapters or len(adapters) <= self.setup.adapters, "too many adapters"
        if self.setup.images == "whole":
            self._check_images(step)

    def _check_images(self, step: Step) -> None:
        """No chunk ends inside an image."""
        starts = {data.req_id: data.num_computed_tokens for data in step.output.scheduled_new_reqs}
        cached = step.output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, tokens in step.scheduled.items():
            end = starts[name] + tokens
            for at in self.added[name].images:
                assert not at < end < at + IMAGE_TOKENS, f"an image of {name} at {at} is cut at {end}"

    def could_serve(self, step: Step) -> bool:
        """True where stock vLLM would take something in a step of its own limit: seen by what it holds back."""
        scheduler = self.scheduler
        if step.preempted or scheduler.pause_state == PauseState.PAUSED_ALL:
            return False
        if scheduler.running:
            return True
        if scheduler.pause_state == PauseState.PAUSED_NEW:
            return False
        ready = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        held = scheduler.num_waiting_for_streaming_input or len(self._set_aside)
        if self.engine.connector and self.engine.connector.sending:
            held = True  # blocks are kept until they have been sent
        return not held and any(request.status in ready for request in scheduler.waiting)

    # --- The end ---

    def finish(self) -> None:
        """Let all that blocks end, and everybody finish."""
        scheduler, engine = self.scheduler, self.engine
        scheduler.set_pause_state(PauseState.UNPAUSED)
        for name, future in self.grammars.items():
            if not future.done():
                self._compiled(name, True)
        for count in range(MOST_STEPS_TO_END + MOST_STEPS_OF_ONE * len(scheduler.requests)):
            for name in [n for n, open_ in self.streams.items() if open_]:
                self._part(name, 0)
            if engine.connector:
                engine.connector.end_load(count, True)
                engine.connector.end_send()
            if not scheduler.requests:
                break
            self.step()
        assert not scheduler.requests, f"never finished\n{self._left()}"
        while engine.queue:
            engine.finish_oldest()
        lost = self.added.keys() - engine.finished.keys() - engine.aborted
        assert lost <= self.streams.keys(), f"lost: {lost}"
        self.rules.check_end()

    def _left(self) -> str:
        return ", ".join(
            f"{n} {r.status.name} {r.num_computed_tokens}/{r.num_tokens}"
            for n, r in self.scheduler.requests.items()
        )

    @property
    def _set_aside(self) -> Any:
        """Those that wait outside of `waiting`: that hold KV blocks, and before vLLM 0.31 all that were passed over."""
        name = "kv_holding_waiting" if hasattr(self.scheduler, "kv_holding_waiting") else "skipped_waiting"
        return getattr(self.scheduler, name)

    def _lora_limit(self) -> int | None:
        config = self.scheduler.lora_config
        return config and config.max_loras


def _one_of(names: list[str], index: int) -> str | None:
    return names[index % len(names)] if names else None


def _adapter(number: int) -> LoRARequest | None:
    return LoRARequest(f"adapter{number}", number, f"/adapters/{number}") if number else None


def _image(seed: int, at: int) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=at, length=IMAGE_TOKENS)
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=f"image{seed % 3}", mm_position=place
    )
