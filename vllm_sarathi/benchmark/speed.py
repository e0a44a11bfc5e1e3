"""How fast a rehearsal is: steps per second with many running requests, and a long chat from its start to its end.

A rehearsal is one thread, and seconds are those of the processor: what else runs on the machine is not counted.
"""

import time
from typing import Any

from rich.table import Table

from vllm_sarathi.simulation.deployment import SchedulerChoice, build, deployment, scheduler_choice
from vllm_sarathi.simulation.simulator import Simulator
from vllm_sarathi.simulation.workload import SimulatedRequest, synthetic

DEPLOYMENT = "mistral-7b/a100"
SCHEDULERS = ("default", "sarathi@512", "sarathi")
TBT_SLO_MS = 100.0
RUNNING = 64
WARM_UP_STEPS = 200
MEASURED_STEPS = 4000
CHAT_REQUESTS = 2048
CHAT_RATE_QPS = 2.0


def _choice(name: str) -> SchedulerChoice:
    return scheduler_choice(name, **({"tbt_slo_ms": TBT_SLO_MS} if name == "sarathi" else {}))


def _simulator(choice: SchedulerChoice, requests: list[SimulatedRequest]) -> Simulator:
    place = deployment(DEPLOYMENT)
    return Simulator(build(place, choice), place.times(), requests, place.in_flight)


def steps_per_s(choice: SchedulerChoice, running: int = RUNNING, steps: int = MEASURED_STEPS) -> float:
    """Return how many steps a second are simulated while so many requests decode."""
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
    table = Table(title=f"rehearsals of {DEPLOYMENT}, on one core")
    table.add_column("scheduler")
    for name in (f"steps/s, {rows[0]['running']} running", f"{rows[0]['chat_requests']} chat requests, s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["scheduler"], f"{row['steps_per_s']:,.0f}", f"{row['chat_s']:.1f}")
    return table
