"""`vllm-sarathi fleet`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_sarathi.cli.options import (
    JsonOption,
    LoadOptions,
    RateOption,
    RayOption,
    announced_workload,
    check_rate,
    with_options,
)

TtftOption = Annotated[
    float | None,
    typer.Option(
        "--ttft-slo-ms", help="SLO for the time to first token of requests without one of their own, ms."
    ),
]


ReplicasOption = Annotated[int, typer.Option(help="Replicas that answer clients.")]
RouterOption = Annotated[
    str, typer.Option(help="round-robin, least-tokens, prefix-affinity, or first-token (asks each replica).")
]
SchedulerOption = Annotated[
    str, typer.Option(help="Scheduler of every replica; NAME@N has a fixed budget of N.")
]
PrefillOption = Annotated[
    int, typer.Option(help="Replicas that only prefill, for the others; 0: each prefills its own prompts.")
]
PrefillDeploymentOption = Annotated[
    str | None,
    typer.Option(help="Deployment of the prefill replicas, MODEL/DEVICE; default: that of the others."),
]
LinkOption = Annotated[
    float | None,
    typer.Option(help="Bandwidth at which each prefill replica sends KV cache, Gbit/s; default: 400."),
]
FailOption = Annotated[
    list[str] | None, typer.Option(help="REPLICA@SECONDS at which a replica fails; may be repeated.")
]
AddOption = Annotated[
    list[str] | None,
    typer.Option(help="SECONDS, or prefill@SECONDS, at which a replica is added; may be repeated."),
]
FailureOption = Annotated[
    str, typer.Option(help="reroute: other replicas prefill its requests again; lose: its requests are lost.")
]
RefreshOption = Annotated[
    float, typer.Option(help="How often the router looks at the replicas, ms; 0 for each request.")
]


@with_options(LoadOptions, requests=2048)
def fleet(
    load: LoadOptions,
    replicas: ReplicasOption = 2,
    router: RouterOption = "round-robin",
    rate: RateOption = None,
    scheduler: SchedulerOption = "sarathi",
    ttft_slo_ms: TtftOption = None,
    prefill_replicas: PrefillOption = 0,
    prefill_deployment: PrefillDeploymentOption = None,
    link_gbps: LinkOption = None,
    fail: FailOption = None,
    add: AddOption = None,
    on_failure: FailureOption = "reroute",
    refresh_ms: RefreshOption = 0.0,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Simulate several replicas behind a router, and print the latencies of each of them and of all together."""
    from vllm_sarathi.benchmark.capacity.fleet import FleetAsked

    wanted = FleetAsked(
        replicas, router, prefill_replicas, prefill_deployment, link_gbps, tuple(fail or ()), tuple(add or ()),
        on_failure, refresh_ms, ttft_slo_ms,
    )  # fmt: skip
    named = load if load.trace is None else replace(load, workload=load.trace.name)
    _run(named.asked((scheduler,), seeds=1), wanted, rate, ray, json)


def _run(asked: Any, wanted: Any, rate: float | None, ray: str | None, json: Path | None) -> None:
    from vllm_sarathi.benchmark.capacity import fleet as benchmark
    from vllm_sarathi.benchmark.capacity import simulated
    from vllm_sarathi.benchmark.common import results
    from vllm_sarathi.core.config import check_positive

    check_rate(rate, asked.trace)
    if wanted.ttft_slo_ms is not None:
        check_positive("ttft_slo_ms", wanted.ttft_slo_ms, 3.6e6)
    simulated.check_asked(asked)
    benchmark.check_fleet(wanted, asked.schedulers[0])
    benchmark.changes_of(wanted)
    console = Console()
    sent = benchmark.requests_of(asked, wanted, announced_workload(asked, console), rate)
    spec = benchmark.spec_of(asked, wanted, share_prefixes=any(request.prefix for request in sent))
    with console.status(f"simulating {len(sent):,} requests on {len(spec.roles)} replicas"):
        result = benchmark.run_fleet(spec, sent, ray)
    rows = benchmark.rows_of(asked, wanted, (rate, simulated.rate_of(sent)), spec, result)
    console.print(benchmark.fleet_table(rows))
    results.write_rows(rows, json)
