"""Small deployments, and simulators on them, for the tests of the simulator."""

from dataclasses import replace
from typing import Any

from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.deployment import build, scheduler_choice
from vllm_sarathi.simulation.devices.roofline import DEVICES
from vllm_sarathi.simulation.models import ModelShape
from vllm_sarathi.simulation.placement import RESERVED_BYTES, Deployment, RooflineDeployment, memory_share
from vllm_sarathi.simulation.simulator import Simulator
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

SHAPE = ModelShape(4, 1024, 8, 8, 128, 4096, 32000, 2048)

MODES = {"sync": (1, 1), "async": (1, 2), "pipeline": (2, 2)}
"""Pipeline stages, and batches in flight."""


def small_place(mode: str = "sync", kv_tokens: int = 16384, max_sequences: int = 32) -> Deployment:
    """Return a deployment whose KV cache holds about this many tokens, 2,048 of them for one request at the most."""
    stages, _ = MODES[mode]
    token = SHAPE.kv_bytes_per_token / stages
    weights = SHAPE.parameters * SHAPE.dtype_bytes / stages
    memory = (weights + RESERVED_BYTES + (kv_tokens + 1) * token) / memory_share()
    return RooflineDeployment(
        name="small",
        model=SHAPE,
        unit=replace(DEVICES["a100"], memory_bytes=memory),
        tensor_parallel=1,
        stages=stages,
        devices_per_node=8,
        max_tokens=2048,
        max_sequences=max_sequences,
        step_tokens=512,
    )


class EvenTimes:
    """A device on which every step takes the same, and a stage more for each of its stages."""

    def __init__(self, stages: int = 1, stage_s: float = 0.01, host_s: float = 0.001) -> None:
        self.stages = stages
        self.host_s = host_s
        self.host_sequence_s = 0.0
        self._stage_s = stage_s

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        return self._stage_s

    def send_s(self, tokens: int) -> float:
        return 0.0


def simulator(
    requests: list[SimulatedRequest],
    scheduler: str = "default",
    mode: str = "sync",
    share_prefixes: bool = False,
    times: Any = None,
    place: Deployment | None = None,
    **settings: Any,
) -> Simulator:
    """Return a simulator of a small deployment with a scheduler by name."""
    place = small_place(mode) if place is None else place
    in_flight = MODES[mode][1]
    built = build(place, scheduler_choice(scheduler, **settings), share_prefixes, in_flight)
    return Simulator(built, place.times() if times is None else times, requests, in_flight)


def requests_at_once(*lengths: tuple[int, int], gap_s: float = 0.0) -> list[SimulatedRequest]:
    """Return requests of these prompt and output lengths, some seconds apart."""
    return [SimulatedRequest(i * gap_s, prompt, output) for i, (prompt, output) in enumerate(lengths)]
