"""The live benchmark: real servers with a real model, each scheduler under the same load, judged by the SLO.

For each scheduler a `vllm serve` is started, `vllm bench serve` sends it a workload from the first second on, and
every gap between tokens counts. Ours starts cold for every workload and SLO. A stock server does not know the
SLO: it runs each workload once, one after the other on the same server, and is judged by each SLO.

With `--scale auto` a stock server is measured first, and all of it is fitted to the device (`scale.py`).
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from rich.console import Console

from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.common.report import check_report, write_report
from vllm_sarathi.benchmark.live import idle
from vllm_sarathi.benchmark.live.arrivals import quick
from vllm_sarathi.benchmark.live.contenders import (
    DEADLINE,
    Contender,
    default_contenders,
    parse_contenders,
)
from vllm_sarathi.benchmark.live.load import Load, is_result_of, prepare, read_result, send
from vllm_sarathi.benchmark.live.neighbour import BUSY_S, busy_neighbour
from vllm_sarathi.benchmark.live.probe import find_scale
from vllm_sarathi.benchmark.live.rows import Row, RowFile, build_row
from vllm_sarathi.benchmark.live.scale import AS_WRITTEN, Scale
from vllm_sarathi.benchmark.live.server import SERVER_FLAGS, Server, ServerError, log_tail, serve, server_env
from vllm_sarathi.benchmark.live.verdict import print_verdicts
from vllm_sarathi.core.classes import slo_ms
from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.workloads.live import LiveWorkload
from vllm_sarathi.simulation.workloads.registry import live_named, live_names

TBT_SLOS_MS = (150.0, 250.0, 500.0)

QUICK_WORKLOADS = ("short", "mix")
QUICK_SLOS_MS = (250.0,)

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""OWNER/NAME, as model hubs name models."""

AUTO = "auto"
SCALES = ("none", AUTO)
"""What `--scale` takes."""

DEADLINE_WORKLOADS = ("mix", "rush")
"""Where ours with `--prefill-order deadline` takes part unless it is asked for: where lengths differ much."""


@dataclass(frozen=True)
class Options:
    """What is to be run.

    Attributes:
        workloads: names of live workloads, or `idle`.
        tbt_slos_ms: the SLOs.
        contenders: the schedulers.
        named: whether the user named them.
        quick: whether the workloads are shortened.
        ttft_slo_ms: the SLO for the time to first token of `sarathi-deadline`.
        model: a folder, or a name on a model hub.
        out: where data sets, clients' results and logs go.
        json: where the rows go, too.
        resume: whether finished runs in `out` are used instead of repeated.
        seed: what the requests and their times are drawn from.
        neighbour: whether another process works on the machine, on and off.
        scale: whether workloads and SLOs are fitted to the device, one of SCALES; until `fit` has done so,
            SLOs are those on the reference device.
        report: where a report to send in goes.
    """

    workloads: tuple[str, ...]
    tbt_slos_ms: tuple[float, ...]
    contenders: tuple[Contender, ...]
    named: bool
    quick: bool
    ttft_slo_ms: float
    model: str
    out: Path
    json: Path | None
    resume: bool
    seed: int
    neighbour: bool
    scale: str
    report: Path | None

    def workload(self, name: str) -> LiveWorkload:
        """Return a workload as written, or its shorter form."""
        return quick(live_named(name)) if self.quick else live_named(name)


@dataclass(frozen=True)
class Session:
    """One server: who schedules, by which SLO (None: it knows none), under which workloads one by one."""

    contender: Contender
    tbt_slo_ms: float | None
    workloads: tuple[str, ...]

    def result(self, workload: str, out: Path) -> Path:
        """Where the client's result of a workload goes."""
        slo = "" if self.tbt_slo_ms is None else f"-{self.tbt_slo_ms:g}ms"
        return out / f"{workload}-{self.contender.label}{slo}.json"


def parse_options(
    *,
    workloads: Sequence[str] | None,
    tbt_slos_ms: Sequence[float] | None,
    schedulers: str | None,
    quick: bool,
    ttft_slo_ms: float,
    model: str,
    out: Path,
    json: Path | None,
    resume: bool,
    seed: int,
    neighbour: bool,
    scale: str,
    report: Path | None,
) -> Options:
    """Check what the user asked for, before any server starts; where nothing was said, all of it.

    Raises:
        ConfigError: an unknown workload, scheduler or scale, an SLO or a budget out of range, no model, or a
            folder in the report's place.
    """
    for name in workloads or ():
        if name != idle.NAME:
            live_named(name, others=(idle.NAME,))
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale!r}: unknown; {nearest_hint(scale, SCALES)}")
    check_report(report)
    for tbt_slo_ms in tbt_slos_ms or ():
        slo_ms(tbt_slo_ms, "--tbt-slo-ms")
    slo_ms(ttft_slo_ms, "--ttft-slo-ms")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more.")
    contenders = default_contenders(quick) if schedulers is None else parse_contenders(schedulers)
    # vLLM looks for whatever is no folder on a model hub, for minutes.
    if not Path(model).is_dir() and not HUB_NAME.fullmatch(model):
        raise ConfigError(
            f"--model {model}: no such folder, and no name on a model hub (OWNER/NAME); "
            f"`vllm-sarathi reference-model {model}` puts the reference model there."
        )
    return Options(
        workloads=tuple(
            dict.fromkeys(workloads or (QUICK_WORKLOADS if quick else (*live_names(), idle.NAME)))
        ),
        tbt_slos_ms=tuple(dict.fromkeys(tbt_slos_ms or (QUICK_SLOS_MS if quick else TBT_SLOS_MS))),
        contenders=tuple(contenders),
        named=schedulers is not None,
        quick=quick,
        ttft_slo_ms=ttft_slo_ms,
        model=model,
        out=out,
        json=json,
        resume=resume,
        seed=seed,
        neighbour=neighbour,
        scale=scale,
        report=report,
    )


def fit(options: Options, scale: Scale) -> Options:
    """Return the options with the SLOs of this device, and its budgets where the user has named none.

    Raises:
        ConfigError: an SLO is out of range on this device.
    """
    fitted = replace(
        options,
        tbt_slos_ms=tuple(map(scale.slo_ms, options.tbt_slos_ms)),
        ttft_slo_ms=scale.slo_ms(options.ttft_slo_ms),
        contenders=options.contenders if options.named else tuple(default_contenders(options.quick, scale)),
    )
    for tbt_slo_ms in fitted.tbt_slos_ms:
        slo_ms(tbt_slo_ms, "--tbt-slo-ms")
    slo_ms(fitted.ttft_slo_ms, "--ttft-slo-ms")
    return fitted


def plan_sessions(options: Options) -> list[Session]:
    """Return the servers to start, in order: a cold one of ours for each run, one for all of a stock budget's."""
    workloads = tuple(name for name in options.workloads if name != idle.NAME)
    sessions = []
    for contender in options.contenders:
        if contender.is_stock:
            sessions.append(Session(contender, None, workloads))
            continue
        for workload in workloads:
            if contender.name == DEADLINE and not options.named and workload not in DEADLINE_WORKLOADS:
                continue
            slos_ms = options.tbt_slos_ms if contender.knows_slo else (None,)
            sessions += [Session(contender, slo_ms, (workload,)) for slo_ms in slos_ms]
    return [session for session in sessions if session.workloads]


def run_live(options: Options, console: Console) -> list[Row]:
    """Run everything, print the tables and the verdicts, and return the rows.

    Raises:
        ServerError: a server did not come up, or died.
        RuntimeError: a client failed.
    """
    with Stages(console) as stages:
        scale = AS_WRITTEN
        if options.scale == AUTO:
            scale = find_scale(options.model, options.out, options.resume, stages)
        written = [options.workload(name) for name in options.workloads if name != idle.NAME]
        about = scale.about(written, options.tbt_slos_ms, options.ttft_slo_ms)
        options = fit(options, scale)
        file = RowFile(options.json, options.resume, about)
        loads = {
            each.name: prepare(scale.workload(each), options.model, options.out, options.seed)
            for each in written
        }
        sessions = plan_sessions(options)
        if about is not None:
            console.print(f"  {scale.sentence}\n  {_length(sessions, loads)}", highlight=False)
        common_flags = [*SERVER_FLAGS, *scale.server_flags]
        for number, session in enumerate(sessions, start=1):
            _run_session(session, f"{number}/{len(sessions)}", options, common_flags, loads, file, stages)
        if idle.NAME in options.workloads:
            _run_idle(options, common_flags, file, stages)
    print_verdicts(file.rows, console, scale)
    if options.report is not None:
        write_report(options.report, file.rows, about, options.model, options.seed, options.quick)
    return file.rows


def _length(sessions: Sequence[Session], loads: dict[str, Load]) -> str:
    """Return how long it will take, for people."""
    minutes = sum(loads[name].duration_s for session in sessions for name in session.workloads) / 60
    return f"requests arrive for {minutes:.0f} minutes in all; {len(sessions)} servers are started for them"


def _run_idle(options: Options, server_flags: Sequence[str], file: RowFile, stages: Stages) -> None:
    """Run the idle benchmark for each SLO, and add its rows."""
    prompts = idle.QUICK_PROMPTS if options.quick else idle.PROMPTS
    for tbt_slo_ms in options.tbt_slos_ms:
        records = idle.run_idle(options.model, tbt_slo_ms, prompts, options.out, stages, server_flags)
        file.add(
            build_row(idle.NAME, tbt_slo_ms, contender, records[contender.label])
            for contender in idle.CONTENDERS
        )


def _run_session(
    session: Session,
    place: str,
    options: Options,
    common_flags: Sequence[str],
    loads: dict[str, Load],
    file: RowFile,
    stages: Stages,
) -> None:
    """Run what is not there yet of a session, and add the rows of all of it."""
    # For one that knows no SLO the flags are the same whichever is given.
    flags = session.contender.flags(session.tbt_slo_ms or options.tbt_slos_ms[0], options.ttft_slo_ms)
    server_flags = [*common_flags, *flags]

    def metadata(workload: str) -> dict[str, str]:
        return {
            "load": loads[workload].fingerprint,
            "server_flags": " ".join(server_flags),
            "neighbour": f"{BUSY_S:g} s on and off" if options.neighbour else "none",
        }

    def add_rows(workload: str) -> None:
        records = read_result(session.result(workload, options.out), loads[workload])
        slos_ms = options.tbt_slos_ms if session.tbt_slo_ms is None else (session.tbt_slo_ms,)
        file.add(build_row(workload, slo_ms, session.contender, records) for slo_ms in slos_ms)

    missing = []
    for workload in session.workloads:
        if options.resume and is_result_of(session.result(workload, options.out), metadata(workload)):
            add_rows(workload)
        else:
            missing.append(workload)
    if not missing:
        return
    title = f"{place} {' '.join(flags)}"
    stages.begin(f"{title}: starting the server")
    log_path = session.result(missing[0], options.out).with_suffix(".server.log")
    env = server_env(options.model)
    with serve(options.model, server_flags, log_path=log_path, env=env) as server:
        for workload in missing:
            load = loads[workload]
            stages.begin(f"{title}: {workload}, {len(load.arrivals)} requests", total=load.duration_s)
            result = session.result(workload, options.out)
            with busy_neighbour() if options.neighbour else nullcontext():
                send(
                    load,
                    server.base_url,
                    result,
                    env=env,
                    metadata=metadata(workload),
                    while_running=stages.advance,
                )
            _check_alive(server)
            add_rows(workload)


def _check_alive(server: Server) -> None:
    try:
        httpx.get(f"{server.base_url}/health", trust_env=False, timeout=60.0).raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(f"the server died under the load\n{log_tail(server.log_path)}") from error
