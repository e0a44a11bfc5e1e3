"""What `vllm-sarathi fleet` does: one load on several replicas behind a router, with rows for them and for all."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from vllm_sarathi.benchmark.capacity.search import RequestSource, scheduler_fields
from vllm_sarathi.benchmark.capacity.simulated import AT_ONCE, Asked, scheduler_of
from vllm_sarathi.benchmark.common.lines import open_lines
from vllm_sarathi.core.config import STOCK_SCHEDULER, ConfigError, check_choice, check_int
from vllm_sarathi.core.spec import SchedulerSpec
from vllm_sarathi.simulation.deployment import deployment
from vllm_sarathi.simulation.fleet.fleet import Change, Fleet, FleetSpec, Link, Result
from vllm_sarathi.simulation.fleet.group import ReplicaSpec
from vllm_sarathi.simulation.fleet.routers import ROUTERS, router
from vllm_sarathi.simulation.fleet.tally import Tally, merged
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

Row = dict[str, Any]

ON_FAILURE = ("reroute", "lose")

LINK_GBPS = 400.0
"""What a replica sends its KV cache with unless another rate is stated: one port of 400 Gbit/s."""

LINK_LATENCY_S = 0.0005
"""A transfer's handshake, as RDMA between machines takes it."""

MOST_REPLICAS = 4096


@dataclass(frozen=True)
class FleetAsked:
    """What the command line asked for beside what `simulate` knows.

    Attributes:
        replicas: those that answer clients.
        router: by name.
        prefill_replicas: those that read prompts for the others; 0 lets each read its own.
        prefill_deployment: theirs, by name; None is that of the others.
        link_gbps: gigabits per second that each of them sends KV with; None for LINK_GBPS.
        fail, add: texts, `REPLICA@SECONDS` and `SECONDS` or `ROLE@SECONDS`.
        on_failure: one of ON_FAILURE.
        refresh_ms: as `FleetSpec.refresh_s`, milliseconds.
        ttft_slo_ms: the SLO of every request without SLOs of its own; None for none.
    """

    replicas: int
    router: str = "round-robin"
    prefill_replicas: int = 0
    prefill_deployment: str | None = None
    link_gbps: float | None = None
    fail: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    on_failure: str = "reroute"
    refresh_ms: float = 0.0
    ttft_slo_ms: float | None = None


def check_fleet(asked: FleetAsked, scheduler: str) -> None:
    """Check what was asked for.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    check_int("replicas", asked.replicas, minimum=1)
    check_int("prefill_replicas", asked.prefill_replicas, minimum=0)
    if asked.replicas + asked.prefill_replicas > MOST_REPLICAS:
        raise ConfigError(f"--replicas {asked.replicas}: at most {MOST_REPLICAS} in all.")
    check_choice("on_failure", asked.on_failure, ON_FAILURE)
    router(asked.router, 1)
    if asked.link_gbps is not None and not 0 < asked.link_gbps <= 1e6:
        raise ConfigError(f"--link-gbps {asked.link_gbps!r}: must be above 0 and at most 1,000,000.")
    if not 0 <= asked.refresh_ms <= 1e6:
        raise ConfigError(f"--refresh-ms {asked.refresh_ms!r}: must be at least 0 and at most 1,000,000.")
    for option, given in (
        ("--prefill-deployment", asked.prefill_deployment),
        ("--link-gbps", asked.link_gbps),
    ):
        if given is not None and not asked.prefill_replicas:
            raise ConfigError(f"{option}: has no effect without --prefill-replicas.")
    if ROUTERS[asked.router].asks and SchedulerSpec.parse(scheduler).name == STOCK_SCHEDULER:
        raise ConfigError(
            f"--router {asked.router}: asks the replicas, and vLLM's own scheduler has no answer; "
            "--scheduler sarathi has."
        )


def changes_of(asked: FleetAsked) -> tuple[Change, ...]:
    """Read what fails and what is added.

    Raises:
        ConfigError: a text that is neither, or of a replica that is not there then.
    """
    roles = ("decode", "prefill") if asked.prefill_replicas else ("serve",)
    changes = [Change(_time_s("fail", text, text.partition("@")[2]), _replica(text)) for text in asked.fail]
    for text in asked.add:
        role, at, time = text.rpartition("@")
        if at and role not in roles:
            raise ConfigError(f"--add {text!r}: the roles here are {', '.join(roles)}.")
        changes.append(Change(_time_s("add", text, time), None, role or roles[0]))
    changes.sort(key=lambda change: change.at_s)
    there = set(range(asked.replicas + asked.prefill_replicas))
    count = len(there)
    for change in changes:
        if change.fails is None:
            there.add(count)
            count += 1
        elif change.fails in there:
            there.remove(change.fails)
        else:
            raise ConfigError(
                f"--fail {change.fails}@{change.at_s:g}: there is no replica {change.fails} then; they are counted "
                f"from 0, and there are {count}."
            )
    return tuple(changes)


def _replica(text: str) -> int:
    number = text.partition("@")[0]
    if not number.isdecimal():
        raise ConfigError(f"--fail {text!r}: must be REPLICA@SECONDS, as in --fail 2@30.")
    return int(number)


def _time_s(option: str, text: str, time: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", time):
        form = "REPLICA@SECONDS, as in --fail 2@30" if option == "fail" else "SECONDS, as in --add 60"
        raise ConfigError(f"--{option} {text!r}: must be {form}.")
    return float(time)


def spec_of(asked: Asked, fleet: FleetAsked, share_prefixes: bool) -> FleetSpec:
    """Return the fleet that was asked for."""
    [scheduler] = asked.schedulers
    place = asked.place
    serving = ReplicaSpec(
        asked.deployment,
        scheduler,
        asked.scheduler_settings(scheduler),
        share_prefixes,
        0,
        asked.calibration_dir,
        asked.disturbance,
    )
    common: dict[str, Any] = {
        "router": fleet.router,
        "kv_tokens": place.kv_tokens,
        "changes": changes_of(fleet),
        "reroute": fleet.on_failure == "reroute",
        "refresh_s": fleet.refresh_ms / 1e3,
    }
    if not fleet.prefill_replicas:
        return FleetSpec(("serve",) * fleet.replicas, {"serve": serving}, **common)
    theirs = fleet.prefill_deployment or asked.deployment
    try:
        deployment(theirs, asked.calibration_dir)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--deployment", "--prefill-deployment", 1)) from error
    if _model_of(theirs) != _model_of(asked.deployment):
        raise ConfigError(
            f"--prefill-deployment {theirs!r}: must be of the same model as {asked.deployment!r}, which is to use "
            "its KV cache."
        )
    if ("kvfp8" in theirs.rpartition("/")[2]) != ("kvfp8" in asked.deployment.rpartition("/")[2]):
        raise ConfigError(
            f"--prefill-deployment {theirs!r}: its KV cache has another precision than that of {asked.deployment!r}, "
            "which is to use it; both or none are 'kvfp8'."
        )
    reading = replace(serving, deployment=theirs)
    link = Link((fleet.link_gbps or LINK_GBPS) * 1e9 / 8, LINK_LATENCY_S, place.kv_token_bytes)
    roles = ("prefill",) * fleet.prefill_replicas + ("decode",) * fleet.replicas
    return FleetSpec(roles, {"prefill": reading, "decode": serving}, link=link, **common)


def _model_of(deployment_name: str) -> str:
    """Return a model's own name: it may be named with its owner, whose tables are measured, or without."""
    return deployment_name.rpartition("/")[0].rpartition("/")[2].lower()


def requests_of(
    asked: Asked, fleet: FleetAsked, workload: RequestSource, rate_qps: float | None
) -> list[SimulatedRequest]:
    """Return what is sent, with the SLOs that a report is by."""
    sent = workload.at(rate_qps, 0)
    if fleet.ttft_slo_ms is None:
        return sent
    return [
        replace(r, tbt_slo_ms=asked.tbt_slo_ms, ttft_slo_ms=fleet.ttft_slo_ms)
        if r.tbt_slo_ms is None and r.ttft_slo_ms is None
        else r
        for r in sent
    ]


def run_fleet(spec: FleetSpec, requests: Sequence[SimulatedRequest], ray: str | None = None) -> Result:
    """Run a fleet, in as many processes as there are cores, or on a Ray cluster."""
    with open_lines(spec.most, ray) as lines:
        return Fleet(spec, lines).run(requests)


def imbalance(tallies: Sequence[Tally]) -> float | None:
    """Return the most tokens that a replica read and wrote over the mean; None where nothing was."""
    tokens = [each.prompt_tokens + each.output_tokens for each in tallies]
    return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else None


def rows_of(
    asked: Asked,
    fleet: FleetAsked,
    rates_qps: tuple[float | None, float | None],
    spec: FleetSpec,
    result: Result,
) -> list[Row]:
    """Return a row for the fleet, one for each class where there are several, and one for each replica.

    Args:
        asked, fleet: what was asked for.
        rates_qps: requests per second that were asked for (None for a trace's own), and that came (None: all at once).
        spec, result: of the run.
    """
    common = {
        "deployment": asked.deployment,
        "workload": asked.workload,
        "tbt_slo_ms": asked.tbt_slo_ms,
        "ttft_slo_ms": fleet.ttft_slo_ms,
        **scheduler_fields(asked.schedulers[0]),
        "router": fleet.router,
        "asked_qps": rates_qps[0],
        "rate_qps": rates_qps[1],
        "source": asked.place.source.kind,
        "disturbance": asked.disturbance.text,
    }

    def row(replica: Any, role: str, kind: str | None, of: Tally, **more: Any) -> Row:
        figures = of.to_mapping(asked.tbt_slo_ms)
        return {**common, "replica": replica, "role": role, "class": kind, **figures, **more}

    by_replica = {each.replica: each.by_kind for each in result.ended}
    serving = [by_replica[i] for i, role in enumerate(result.roles) if role != "prefill"]
    kinds = dict.fromkeys(kind for every in (*serving, result.unserved) for kind in every)
    by_kind: Mapping[str, Tally] = {
        kind: merged([every[kind] for every in (*serving, result.unserved) if kind in every])
        for kind in kinds
    }
    whole = merged(by_kind.values())
    rows = [
        row(
            "fleet",
            "fleet",
            None,
            whole,
            replicas=len(result.roles),
            lost=whole.requests - whole.completed - whole.refused,
            rerouted=result.rerouted,
            unkept=result.unkept if ROUTERS[spec.router].asks else None,
            imbalance=imbalance([merged(every.values()) for every in serving]),
        )
    ]
    if len(kinds) > 1:
        rows += [row("fleet", "fleet", kind, of) for kind, of in by_kind.items()]
    return rows + [
        row(index, role, None, merged(by_replica[index].values())) for index, role in enumerate(result.roles)
    ]


def fleet_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    first = rows[0]
    asked_qps, drawn_qps = first["asked_qps"], first["rate_qps"]
    if drawn_qps is None:
        rate = AT_ONCE
    else:
        rate = f"{drawn_qps:.4g}" if asked_qps is None else f"{asked_qps:.4g} (as drawn {drawn_qps:.4g})"
        rate += " requests/s"
    title = f"{first['deployment']}, {first['workload']}, {rate}, {first['router']}"
    table = Table(title=f"{title}, {scheduler_of(first)}")
    table.add_column("", no_wrap=True)
    names = ["requests", "gap P50 ms", "P99", "gaps in time", "TTFT P50 ms", "P99", "tokens/s"]
    with_slo = any(row["request_attainment"] is not None for row in rows)
    for name in [*names, *["requests kept"] * with_slo]:
        table.add_column(name, justify="right")
    for row in rows:
        gap, ttft = row["gap_ms"], row["ttft_ms"]
        shown = [f"{row['requests']:,}"]
        shown += [_ms(gap["p50"], 1), _ms(gap["p99"], 1), _share(row["attainment"])]
        shown += [_ms(ttft["p50"]), _ms(ttft["p99"]), f"{row['output_tokens_per_s']:,.0f}"]
        table.add_row(_name(row), *shown, *[_share(row["request_attainment"])] * with_slo)
    said = (
        []
        if first["imbalance"] is None
        else [f"the busiest replica has {first['imbalance']:.2f} times the mean"]
    )
    said += [f"{first['rerouted']} rerouted"] * (first["rerouted"] > 0) + [f"{first['lost']} lost"] * (
        first["lost"] > 0
    )
    said += [f"{first['unkept']} that no replica could keep"] * bool(first["unkept"])
    table.caption = "; ".join(said)
    return table


def _name(row: Row) -> str:
    if row["replica"] == "fleet":
        return "fleet" if row["class"] is None else f"class {row['class']}"
    return f"replica {row['replica']}" + ("" if row["role"] == "serve" else f", {row['role']}")


def _ms(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
