"""How fast a simulation is: steps per second with many running requests, and a long chat from its start to its end.

A simulation is one thread, and seconds are those of the processor: what else runs on the machine is not counted.
"""

import time
from collections.abc import Callable
from typing import Any

from rich.table import Table

from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.simulation.deployment import SchedulerChoice, build, deployment, scheduler_choice
from vllm_sarathi.simulation.devices.package import known_models
from vllm_sarathi.simulation.simulator import Simulator
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

DEPLOYMENT = "mistral-7b/a100"
SCHEDULERS = ("default", "sarathi@512", "sarathi")
TBT_SLO_MS = 100.0
RUNNING = 64
WARM_UP_STEPS = 200
MEASURED_STEPS = 4000
CHAT_REQUESTS = 2048
CHAT_RATE_QPS = 2.0

QUERIED = (
    "mistral-7b/a100",
    "Qwen/Qwen3-32B/h100:tp4",
    "Qwen/Qwen3-30B-A3B/h100",
    "deepseek-ai/DeepSeek-V3/h200:tp8ep",
)
"""Deployments whose step times are asked for: a roofline, and measured kernels."""

QUERIES = 20_000


def _choice(name: str) -> SchedulerChoice:
    return scheduler_choice(name, **({"tbt_slo_ms": TBT_SLO_MS} if name == "sarathi" else {}))


def _simulator(choice: SchedulerChoice, requests: list[SimulatedRequest]) -> Simulator:
    place = deployment(DEPLOYMENT)
    return Simulator(build(place, choice), place.times(), requests, place.in_flight)


def steps_per_s(choice: SchedulerChoice, running: int = RUNNING, steps: int = MEASURED_STEPS) -> float:
    """Return how many steps a second are simulated with a number of requests decoding."""
    answer = WARM_UP_STEPS + steps + 200
    engine = _simulator(choice, [SimulatedRequest(0.0, 100 + i, answer) for i in range(running)])
    engine.run(lambda run: run.steps >= WARM_UP_STEPS)
    assert len(engine.scheduler.running) == running
    first, started_s = engine.steps, time.process_time()
    engine.run(lambda run: run.steps >= first + steps)
    return (engine.steps - first) / (time.process_time() - started_s)


def chat_s(choice: SchedulerChoice, requests: int = CHAT_REQUESTS) -> float:
    """Return the seconds that a run of the chat workload takes, from its first arrival to its last token."""
    engine = _simulator(choice, synthetic("chat", CHAT_RATE_QPS, requests, seed=0))
    started_s = time.process_time()
    engine.run()
    return time.process_time() - started_s


def measure_speed(chat_requests: int = CHAT_REQUESTS, steps: int = MEASURED_STEPS) -> list[dict[str, Any]]:
    """Return a row for each scheduler."""
    return [
        {
            "scheduler": name,
            "running": RUNNING,
            "steps_per_s": steps_per_s(_choice(name), steps=steps),
            "chat_requests": chat_requests,
            "chat_s": chat_s(_choice(name), chat_requests),
        }
        for name in SCHEDULERS
    ]


def speed_table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    table = Table(title=f"simulations of {DEPLOYMENT}, on one core")
    table.add_column("scheduler")
    for name in (f"steps/s, {rows[0]['running']} running", f"{rows[0]['chat_requests']} chat requests, s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["scheduler"], f"{row['steps_per_s']:,.0f}", f"{row['chat_s']:.1f}")
    return table


def _decodes(step: int) -> StepShape:
    """Return the step of 48 to 64 requests whose contexts have grown by one token since the last."""
    decodes = 48 + step // 97 % 17
    return StepShape(decodes, decodes, decodes * (1000 + step % 4000), 0.0, decodes)


def _with_a_chunk(step: int) -> StepShape:
    """Return the same with a chunk of a prompt beside it, somewhere in the prompt."""
    decodes = 48 + step // 97 % 17
    tokens, prefix = 512 - decodes, step * 37 % 8192
    work = chunk_work(prefix, tokens)
    return StepShape(512, decodes, decodes * (1000 + step % 4000), work, decodes + 1)


def query_us(deployment_name: str, shape: Callable[[int], StepShape], queries: int = QUERIES) -> float:
    """Return the microseconds that asking for the time of a step takes, on average over a run's steps."""
    times = deployment(deployment_name).times()
    shapes = [shape(step) for step in range(queries)]
    started_s = time.process_time()
    for each in shapes:
        times.stage_s(each, 0)
    return (time.process_time() - started_s) / queries * 1e6


def measure_queries(queries: int = QUERIES) -> list[dict[str, Any]]:
    """Return a row for each deployment: what a query takes; the roofline alone without the extra devices."""
    return [
        {
            "deployment": name,
            "decodes_query_us": query_us(name, _decodes, queries),
            "chunk_query_us": query_us(name, _with_a_chunk, queries),
        }
        for name in (QUERIED if known_models() else QUERIED[:1])
    ]


def query_table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    table = Table(title="asking for the time of a step, microseconds")
    table.add_column("deployment")
    for name in ("decodes", "with a chunk"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["deployment"], f"{row['decodes_query_us']:.1f}", f"{row['chunk_query_us']:.1f}")
    return table
