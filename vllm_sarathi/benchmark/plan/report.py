"""What a plan says: the choice and the runner-up, checked by a whole fleet, a table, rows, and how to start it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.benchmark.capacity.fleet import run_fleet
from vllm_sarathi.benchmark.capacity.search import scheduler_fields
from vllm_sarathi.benchmark.plan.load import Load
from vllm_sarathi.benchmark.plan.prices import Prices
from vllm_sarathi.benchmark.plan.search import MOST_REPLICAS, Board, Candidate, Verdict, settings_of
from vllm_sarathi.core.config import CONFIG_KEY, SCHEDULER_CLS, STOCK_SCHEDULER, ConfigError, flag_name
from vllm_sarathi.core.files import write_whole
from vllm_sarathi.core.spec import SchedulerSpec
from vllm_sarathi.simulation.devices.package import known_models
from vllm_sarathi.simulation.fleet.fleet import FleetSpec
from vllm_sarathi.simulation.fleet.group import ReplicaSpec
from vllm_sarathi.simulation.fleet.tally import merged
from vllm_sarathi.simulation.models import CHECKPOINTS

Row = dict[str, Any]

ROUTER = "least-tokens"
"""What the fleet of the check is behind: what waits is what any gateway can know."""

ONLINE = ("fp8",)
"""Precisions to which vLLM quantizes all of a model while it loads it (`--quantization`; of NVFP4 it makes the experts
alone)."""

UNKNOWN_TO_RAY = ("a40",)
"""Devices that Ray has no type of: the file then asks for any GPU."""

MORE_REPLICAS = 8
"""The most replicas that are tried beyond what one replica's share needs."""


@dataclass(frozen=True)
class Checked:
    """A verdict that a fleet of all its replicas has kept.

    Attributes:
        verdict: the candidate's.
        replicas: how many it takes behind a router.
        cost: of these, per hour.
        kept: the share of the requests that met their SLOs, by class.
    """

    verdict: Verdict
    replicas: int
    cost: float
    kept: dict[str, float]


def checked(verdict: Verdict, load: Load, unit_cost: float) -> Checked | None:
    """Return a verdict that a whole fleet keeps, with more replicas where it must be; None where that is not enough.

    Args:
        verdict: of a candidate that carries the load.
        load: what is sent.
        unit_cost: of one replica, per hour.
    """
    candidate = verdict.candidate
    assert verdict.replicas is not None, "it carries the load"
    settings = tuple(settings_of(candidate, load).items())
    spec = ReplicaSpec(
        candidate.deployment,
        candidate.scheduler,
        settings,
        load.share_prefixes,
        load.seed,
        longest=load.longest,
    )
    for replicas in range(verdict.replicas, verdict.replicas + MORE_REPLICAS + 1):
        fleet = FleetSpec(("serve",) * replicas, {"serve": spec}, ROUTER, 0)
        result = run_fleet(fleet, load.at(load.rate_qps))
        kinds = dict.fromkeys(kind for each in result.ended for kind in each.by_kind)
        whole = {k: merged([e.by_kind[k] for e in result.ended if k in e.by_kind]) for k in kinds}
        kept = {
            kind: of.request_attainment for kind, of in whole.items() if of.request_attainment is not None
        }
        if all(share >= load.attainment for share in kept.values()):
            return Checked(verdict, replicas, replicas * unit_cost, kept)
    return None


def choose(board: Board, load: Load) -> list[Checked]:
    """Return the choice and the runner-up, two deployments; fewer where no other fleet carries the load.

    Raises:
        ConfigError: no replica carries its share; the message says what comes nearest.
    """
    if not board.carrying():
        raise ConfigError(nothing_said(board, load))
    found: list[Checked] = []
    for verdict in board.carrying():
        if len(found) > 1 and verdict.cost >= found[1].cost:
            break
        if any(each.verdict.candidate.deployment == verdict.candidate.deployment for each in found):
            continue
        one = checked(verdict, load, board.unit_cost(verdict.candidate))
        if one is None:
            verdict.why = "router"
        else:
            found = sorted([*found, one], key=lambda each: each.cost)[:2]
    return found


def unheld_said(board: Board) -> str:
    """Return that no fleet carries a load, though replicas carry their shares of it, in one sentence."""
    first = board.carrying()[0]
    assert first.replicas is not None, "it carries its share"
    return (
        f"plan: no fleet keeps the SLOs behind a {ROUTER} router; one of {first.replicas} replicas of "
        f"{first.candidate.deployment} should by the share of one, but even {first.replicas + MORE_REPLICAS} are not "
        "enough; a lower --attainment would help, and --exhaustive tries those that were left as too expensive."
    )


def nothing_said(board: Board, load: Load) -> str:
    """Return why nothing carries a load, in one sentence."""
    refused = [v for v in board.verdicts if v.why in ("memory", "slo")]
    broken = [v for v in refused if v.why == "slo"]
    if len(refused) < len(board.verdicts):
        return (
            f"plan: no number of replicas up to {MOST_REPLICAS:,} carries {load.rate_qps:g} requests/s; even with "
            f"{load.rate_qps / MOST_REPLICAS:.3g} a second on each, too many miss the SLOs."
        )
    if broken:
        nearest = min(broken, key=lambda v: v.bound.fastest_ms)
        return f"plan: no deployment can meet the SLOs; the nearest is {nearest.bound.refused} ms."
    roomiest = max(refused, key=lambda v: v.candidate.devices)
    return f"plan: the model fits on none of the candidates; {roomiest.bound.refused.removeprefix('--deployment ')}"


def served_model(candidate: Candidate) -> str:
    """Return the checkpoint that is to be served: one in the candidate's precision where vLLM cannot make it."""
    model = CHECKPOINTS.get(candidate.model.lower(), candidate.model)
    if candidate.precision is None or candidate.precision in ONLINE:
        return model
    ending = f"/{model.rpartition('/')[2]}-{candidate.precision}".lower()
    known = (name for name in known_models().values() if name.lower().endswith(ending))
    return next(known, f"{candidate.precision.upper()}_CHECKPOINT")


def checkpoint_lines(candidate: Candidate) -> list[str]:
    """Return what has to be had before a candidate can be started, in a sentence."""
    if candidate.precision is None or candidate.precision in ONLINE:
        return []
    return [
        f"{candidate.model} needs a checkpoint in {candidate.precision.upper()}, here {served_model(candidate)}: "
        "vLLM cannot quantize a whole model to that while loading it"
    ]


def serve_words(candidate: Candidate, load: Load, classes: Path | None) -> list[str]:
    """Return the `vllm serve` command that starts one replica, as words."""
    words = ["vllm", "serve", served_model(candidate), "--max-model-len", str(load.longest)]
    for flag, value in (
        ("--tensor-parallel-size", candidate.tensor_parallel),
        ("--pipeline-parallel-size", candidate.stages),
    ):
        words += [flag, str(value)] if value > 1 else []
    words += ["--enable-expert-parallel"] if candidate.expert_parallel else []
    words += ["--quantization", candidate.precision] if candidate.precision in ONLINE else []
    name, budget = SchedulerSpec.parse(candidate.scheduler)
    tokens = [] if budget is None else [str(budget)]
    if name == STOCK_SCHEDULER:
        return [*words, "--scheduler", name, *(["--max-num-batched-tokens", *tokens] if tokens else [])]
    words += ["--scheduler", name] if name != "sarathi" else []
    words += ["--token-budget", *tokens] if tokens else []
    for key, value in settings_of(candidate, load).items():
        if key == "slo_classes":
            words += [flag_name(key), str(classes)]
        elif value is True:
            words.append(flag_name(key))
        else:
            words += [flag_name(key), f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def ray_serve_text(candidate: Candidate, load: Load, replicas: int) -> str:
    """Return a file for `serve run`: YAML, in the part of it that is JSON."""
    name, budget = SchedulerSpec.parse(candidate.scheduler)
    engine: Row = {
        "max_model_len": load.longest,
        "tensor_parallel_size": candidate.tensor_parallel,
        "pipeline_parallel_size": candidate.stages,
    }
    if candidate.expert_parallel:
        engine["enable_expert_parallel"] = True
    if candidate.precision in ONLINE:
        engine["quantization"] = candidate.precision
    if name == STOCK_SCHEDULER:
        engine |= {} if budget is None else {"max_num_batched_tokens": budget}
    else:
        settings = {"scheduler": name, **settings_of(candidate, load)}
        settings |= {} if budget is None else {"token_budget": budget}
        engine |= {"scheduler_cls": SCHEDULER_CLS, "additional_config": {CONFIG_KEY: settings}}
    model = {
        "model_loading_config": {"model_id": candidate.model, "model_source": served_model(candidate)},
        **({} if candidate.device in UNKNOWN_TO_RAY else {"accelerator_type": candidate.device.upper()}),
        "deployment_config": {"num_replicas": replicas},
        "engine_kwargs": engine,
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    return json.dumps({"applications": [application]}, indent=2) + "\n"


def write_ray_serve(candidate: Candidate, load: Load, replicas: int, path: Path) -> None:
    """Write a file for `serve run`.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, ray_serve_text(candidate, load, replicas))


def per_million(cost: float, tokens_per_s: float) -> float:
    """Return what a million tokens cost at a cost per hour."""
    return cost / (tokens_per_s * 3600) * 1e6


def rows_of(board: Board, load: Load, prices: Prices, found: Sequence[Checked]) -> list[Row]:
    """Return a row for each candidate, the choice and the runner-up first."""
    named = dict(zip(("chosen", "runner-up"), found, strict=False))
    states = {id(each.verdict): (state, each) for state, each in named.items()}

    def row(verdict: Verdict) -> Row:
        state, each = states.get(id(verdict), (verdict.why or "dearer", None))
        candidate = verdict.candidate
        replicas = each.replicas if each else verdict.replicas
        cost = each.cost if each else None if verdict.replicas is None else verdict.cost
        return {
            "deployment": candidate.deployment,
            "device": candidate.device,
            "tensor_parallel": candidate.tensor_parallel,
            "pipeline_parallel": candidate.stages,
            "expert_parallel": candidate.expert_parallel,
            **scheduler_fields(candidate.scheduler),
            "workload": load.name,
            "rate_qps": load.rate_qps,
            "state": state,
            "replicas": replicas,
            "devices": None if replicas is None else replicas * candidate.devices,
            "cost_per_hour": cost,
            "cost_per_million_tokens": None if cost is None else per_million(cost, load.tokens_per_s),
            "currency": prices.currency,
            "least_cost_per_hour": verdict.least_cost if verdict.bound.most_qps else None,
            "kept": each.kept if each else None,
            "runs": verdict.runs,
            "source": verdict.bound.source or None,
            "refused": verdict.bound.refused or None,
        }

    order = {"chosen": 0, "runner-up": 1, "router": 2, "dearer": 3, "bound": 4, "slo": 5, "memory": 6}
    rows = [row(verdict) for verdict in board.verdicts]
    return sorted(
        rows, key=lambda r: (order[r["state"]], r["cost_per_hour"] or r["least_cost_per_hour"] or 0.0)
    )


STATES = {
    "dearer": "cannot carry it at that price",
    "bound": "its best is more expensive",
    "slo": "cannot keep the SLO",
    "memory": "does not hold the model",
}


def plan_table(rows: Sequence[Row], currency: str) -> Table:
    """Return the choice, the runner-up, and all others whose cost is known."""
    model = rows[0]["deployment"].rpartition("/")[0]
    table = Table(title=f"{model}, {rows[0]['workload']}, {rows[0]['rate_qps']:.4g} requests/s")
    for name in ("replica", "scheduler", ""):
        table.add_column(name, no_wrap=True)
    for name in ("replicas", "devices", f"{currency}/hour", "per million tokens"):
        table.add_column(name, justify="right")
    known = [row for row in rows if row["cost_per_hour"] is not None]
    for row in known[:8]:
        budget = "" if row["token_budget"] is None else f"@{row['token_budget']}"
        table.add_row(
            row["deployment"].rpartition("/")[2],
            row["scheduler"] + budget,
            row["state"],
            str(row["replicas"]),
            str(row["devices"]),
            f"{row['cost_per_hour']:.2f}",
            f"{row['cost_per_million_tokens']:.3f}",
        )
    left = {why: sum(row["state"] == why and row["cost_per_hour"] is None for row in rows) for why in STATES}
    said = [f"{count} {STATES[why]}" for why, count in left.items() if count]
    table.caption = f"{len(rows)} candidates" + (": " + "; ".join(said) if said else "")
    return table


def source_lines(board: Board) -> list[str]:
    """Return which of the devices have step times that are not measured, and why."""
    by_device: dict[str, Verdict] = {}
    for verdict in board.verdicts:
        if verdict.bound.source not in ("", "measured"):
            by_device.setdefault(verdict.candidate.device, verdict)
    return [f"on {name}, {'; '.join(v.bound.notes)}" for name, v in sorted(by_device.items())]


def margin(found: Sequence[Checked]) -> float | None:
    """Return how much more the runner-up costs, as a share; None without one."""
    return found[1].cost / found[0].cost - 1 if len(found) > 1 else None


def lines_of(found: Sequence[Checked], load: Load, currency: str, classes: Path | None) -> list[str]:
    """Return what is printed below the table."""
    first = found[0]
    candidate = first.verdict.candidate
    million = per_million(first.cost, load.tokens_per_s)
    lines = [
        f"{first.replicas} x {candidate.deployment}, {candidate.scheduler}: {first.cost:.2f} {currency} an hour, "
        f"{million:.3f} per million tokens ({million / load.output_share:.3f} per million output tokens)",
        "kept behind a router: " + ", ".join(f"{k or 'requests'} {v:.1%}" for k, v in first.kept.items()),
    ]
    if len(found) > 1:
        name = found[1].verdict.candidate.deployment
        lines.append(f"the runner-up, {name}, costs {margin(found):.0%} more")
    else:
        lines.append("no other deployment was found to carry it")
    lines += first.verdict.bound.notes
    lines += checkpoint_lines(candidate)
    lines.append("start each replica with: " + shlex.join(serve_words(candidate, load, classes)))
    return lines
