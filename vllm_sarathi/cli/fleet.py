"""`vllm-sarathi fleet`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_sarathi.cli.rehearse import (
    ArrivalsOption,
    CalibrationOption,
    DeploymentOption,
    FormatOption,
    JsonOption,
    NeighbourOption,
    NoiseOption,
    PausesOption,
    RayOption,
    RequestsOption,
    ScaleOption,
    SettingOption,
    SloOption,
    TooLongOption,
    TraceOption,
    WorkloadOption,
    announced_workload,
    read_settings,
)

TtftOption = Annotated[
    float | None, typer.Option("--ttft-slo-ms", help="Promised time to first token, of requests without one.")
]


ReplicasOption = Annotated[int, typer.Option(help="Replicas that answer clients.")]
RouterOption = Annotated[
    str, typer.Option(help="round-robin, least-tokens, prefix-affinity, or first-token (asks each replica).")
]
RateOption = Annotated[float | None, typer.Option(help="Requests per second; a trace has its own.")]
SchedulerOption = Annotated[str, typer.Option(help="Of every replica; NAME@N has a fixed budget of N.")]
PrefillOption = Annotated[
    int, typer.Option(help="Replicas that read prompts for the others; 0: each reads its own.")
]
PrefillDeploymentOption = Annotated[
    str | None, typer.Option(help="Theirs, MODEL/DEVICE; that of the others by default.")
]
LinkOption = Annotated[float, typer.Option(help="Gbit/s that each of them sends KV with.")]
FailOption = Annotated[list[str] | None, typer.Option(help="REPLICA@SECONDS: one fails; may be repeated.")]
AddOption = Annotated[
    list[str] | None, typer.Option(help="SECONDS, or prefill@SECONDS: one is added; may be repeated.")
]
FailureOption = Annotated[
    str, typer.Option(help="reroute: others read what was there again; lose: they are lost.")
]
RefreshOption = Annotated[
    float, typer.Option(help="The router looks at the replicas so often; 0 for each request.")
]


def fleet(
    deployment: DeploymentOption,
    replicas: ReplicasOption = 2,
    router: RouterOption = "round-robin",
    rate: RateOption = None,
    workload: WorkloadOption = "chat",
    scheduler: SchedulerOption = "sarathi",
    tbt_slo_ms: SloOption = 100.0,
    ttft_slo_ms: TtftOption = None,
    requests: RequestsOption = 2048,
    prefill_replicas: PrefillOption = 0,
    prefill_deployment: PrefillDeploymentOption = None,
    link_gbps: LinkOption = 400.0,
    fail: FailOption = None,
    add: AddOption = None,
    on_failure: FailureOption = "reroute",
    refresh_ms: RefreshOption = 0.0,
    arrivals: ArrivalsOption = "poisson",
    trace: TraceOption = None,
    trace_format: FormatOption = "csv",
    too_long: TooLongOption = "refuse",
    time_scale: ScaleOption = 1.0,
    setting: SettingOption = None,
    calibration_dir: CalibrationOption = None,
    noise: NoiseOption = 0.0,
    pauses: PausesOption = 0.0,
    neighbour: NeighbourOption = 1.0,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Simulate several replicas behind a router, and print what each of them and all together make of a load."""
    from vllm_sarathi.benchmark.capacity import simulated as rehearsal
    from vllm_sarathi.benchmark.capacity.fleet import FleetAsked
    from vllm_sarathi.simulation.devices.disturbed import Disturbance

    wanted = FleetAsked(
        replicas, router, prefill_replicas, prefill_deployment, link_gbps, tuple(fail or ()), tuple(add or ()),
        on_failure, refresh_ms, ttft_slo_ms,
    )  # fmt: skip
    asked = rehearsal.Asked(
        deployment=deployment,
        workload=workload if trace is None else trace.name,
        schedulers=(scheduler,),
        tbt_slo_ms=tbt_slo_ms,
        requests=requests,
        seeds=1,
        arrivals=arrivals,
        trace=trace,
        trace_format=trace_format,
        too_long=too_long,
        time_scale=time_scale,
        settings=read_settings(setting),
        calibration_dir=calibration_dir,
        disturbance=Disturbance(noise, pauses, neighbour=neighbour),
    )
    _run(asked, wanted, rate, ray, json)


def _run(asked: Any, wanted: Any, rate: float | None, ray: str | None, json: Path | None) -> None:
    from vllm_sarathi.benchmark.capacity import fleet as room
    from vllm_sarathi.benchmark.capacity import simulated as rehearsal
    from vllm_sarathi.benchmark.common import results
    from vllm_sarathi.core.config import ConfigError, check_positive

    if rate is None and asked.trace is None:
        raise ConfigError("--rate: how many requests per second? (A --trace has a rate of its own.)")
    if rate is not None:
        check_positive("rate", rate, 1e6)
    if wanted.ttft_slo_ms is not None:
        check_positive("ttft_slo_ms", wanted.ttft_slo_ms, 3.6e6)
    rehearsal.check_asked(asked)
    room.check_fleet(wanted, asked.schedulers[0])
    room.changes_of(wanted)
    console = Console()
    sent = room.requests_of(asked, wanted, announced_workload(asked, console), rate)
    spec = room.spec_of(asked, wanted, share_prefixes=any(request.prefix for request in sent))
    with console.status(f"simulating {len(sent):,} requests on {len(spec.roles)} replicas"):
        result = room.run_fleet(spec, sent, ray)
    rows = room.rows_of(asked, wanted, rehearsal.rate_of(sent), spec, result)
    console.print(room.fleet_table(rows))
    results.write_rows(rows, json)
