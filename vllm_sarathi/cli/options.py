"""Options that several commands share, and what they ask for."""

import functools
import inspect
import json as json_format
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperCommand

if TYPE_CHECKING:  # numpy and vLLM's surroundings are imported where a command runs
    from vllm_sarathi.benchmark.capacity.simulated import Asked


def can_be_written(path: Path | None) -> Path | None:
    """Return the file that an option names, or say before the work that it cannot be written."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder; give the name of a file.")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise typer.BadParameter(
            f"{path}: cannot be written, because {folder} is not a folder that you may write to."
        )
    return path


RAY_LOCAL = "local"
"""What `--ray` takes to start a Ray of its own, and what it means without an address."""


class RayCommand(TyperCommand):
    """A command whose `--ray` may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line."""
        whole: list[str] = []
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            whole.append(word)
            if word == "--ray" and following.startswith("-"):
                whole.append(RAY_LOCAL)
        return super().parse_args(ctx, whole)


DeploymentOption = Annotated[
    str,
    typer.Option(
        help="MODEL/DEVICE, such as mistral-7b/a100, Qwen/Qwen3-32B/h100:tp4 (measured kernels: extra `devices`) or "
        "meta-llama/Llama-3.1-70B/h100:fp8tp4; MODEL may be a folder."
    ),
]
WorkloadOption = Annotated[
    str,
    typer.Option(
        help="chat, arxiv, uniform, zipf, bimodal, classes (three SLO classes), mooncake (shared prefixes), or one of "
        "`bench live`: short, long, mix, rush, burst."
    ),
]
SchedulersOption = Annotated[str, typer.Option(help="Comma-separated names; NAME@N has a fixed budget of N.")]
SloOption = Annotated[float | None, typer.Option("--tbt-slo-ms", help="SLO for the time between tokens, ms.")]
RequestsOption = Annotated[int, typer.Option(help="Requests in a run.")]
SeedsOption = Annotated[
    int, typer.Option(help="Runs with different requests, which give the range of the answer.")
]
ArrivalsOption = Annotated[str, typer.Option(help="poisson, gamma (bursty) or fixed.")]
TraceOption = Annotated[
    Path | None, typer.Option(help="A file of arrivals and lengths, in place of --workload.")
]
FormatOption = Annotated[
    str,
    typer.Option(help="azure, mooncake, or csv: arrival_s, prompt_tokens, output_tokens (or JSON lines)."),
]
TooLongOption = Annotated[str, typer.Option(help="Requests beyond the model's context: refuse, or skip.")]
ScaleOption = Annotated[
    float, typer.Option(help="Play a trace this many times as fast, unless a rate is asked for.")
]
SettingOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE of SarathiConfig, for sarathi; may be repeated.")
]
RayOption = Annotated[
    str | None,
    typer.Option(metavar="[ADDRESS]", help="Run on a Ray cluster; without an address, start one here."),
]
CalibrationOption = Annotated[
    str | None, typer.Option(help="For MODEL/cpu: the folder that `vllm-sarathi profile` filled.")
]
RateOption = Annotated[float | None, typer.Option(help="Requests per second; by default that of the trace.")]
NoiseOption = Annotated[float, typer.Option(help="Noise of each step's time, as a fraction: 0.05 is 5%.")]
PausesOption = Annotated[float, typer.Option(help="Pauses per minute, of 20 to 200 ms each.")]
NeighbourOption = Annotated[
    float, typer.Option(help="The factor by which a neighbour slows steps, for 5 of every 10 s.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the rows to this file.", callback=can_be_written),
]
FiguresOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the figures to this file.", callback=can_be_written),
]
DEFAULT_SCHEDULERS = "sarathi,default,prefill-first,orca"

ELSEWHERE = {
    "scheduler": "--schedulers NAME",
    "token_budget": "--schedulers NAME@N",
    "tbt_slo_ms": "--tbt-slo-ms MS",
}
"""Settings that have an option of their own here."""


def help_of(command: Callable[..., Any]) -> str:
    """Return a command's docstring with each paragraph on one line: Typer would keep the line breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))


def read_names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas; each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def read_settings(texts: Sequence[str] | None) -> tuple[tuple[str, Any], ...]:
    """Return KEY=VALUE texts as settings.

    Raises:
        ConfigError: a text without `=`, or an unknown key.
    """
    from vllm_sarathi.core.config import ConfigError, check_keys

    settings: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r}: must be KEY=VALUE, as in --set tbt_mode=pace.")
        if key in ELSEWHERE:
            raise ConfigError(f"--set {text!r}: is set by {ELSEWHERE[key]} here.")
        try:
            settings[key] = json_format.loads(value)
        except ValueError:
            settings[key] = value
    check_keys(settings, "--set")
    return tuple(settings.items())


@dataclass(frozen=True)
class LoadOptions:
    """What is sent, to which deployment, and within which SLO: the options of `simulate`, `capacity` and `fleet`."""

    deployment: DeploymentOption
    workload: WorkloadOption = "chat"
    tbt_slo_ms: SloOption = 100.0
    requests: RequestsOption = 512
    arrivals: ArrivalsOption = "poisson"
    trace: TraceOption = None
    trace_format: FormatOption = "csv"
    too_long: TooLongOption = "refuse"
    time_scale: ScaleOption = 1.0
    setting: SettingOption = None
    calibration_dir: CalibrationOption = None
    noise: NoiseOption = 0.0
    pauses: PausesOption = 0.0
    neighbour: NeighbourOption = 1.0

    def asked(self, schedulers: tuple[str, ...], seeds: int, **others: Any) -> "Asked":
        """Return what is asked for.

        Args:
            schedulers: their names.
            seeds: how many.
            others: fields of Asked that are not among these options.

        Raises:
            ConfigError: a setting or a disturbance that is out of range.
        """
        # Imported here: `--help` needs none of it.
        from vllm_sarathi.benchmark.capacity.simulated import Asked
        from vllm_sarathi.simulation.devices.disturbed import Disturbance

        return Asked(
            deployment=self.deployment,
            workload=self.workload,
            schedulers=schedulers,
            tbt_slo_ms=self.tbt_slo_ms,
            requests=self.requests,
            seeds=seeds,
            arrivals=self.arrivals,
            trace=self.trace,
            trace_format=self.trace_format,
            too_long=self.too_long,
            time_scale=self.time_scale,
            settings=read_settings(self.setting),
            calibration_dir=self.calibration_dir,
            disturbance=Disturbance(self.noise, self.pauses, neighbour=self.neighbour),
            **others,
        )


def with_options(group: type[Any], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command, in place of its first parameter, the options of a group.

    Args:
        group: a dataclass, each of whose fields is annotated as an option; the command gets one of it.
        defaults: defaults that differ for this command.
    """
    hints = get_type_hints(group, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(
                field.name, inspect.Parameter.empty if field.default is MISSING else field.default
            ),
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
    names = {option.name for option in options}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            command(group(**{name: given.pop(name) for name in names}), **given)

        keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        # typer reads a command's options off its signature and its annotations.
        wrapper.__signature__ = inspect.Signature([*options, *keyword])  # type: ignore[attr-defined]  # any function may have one
        wrapper.__annotations__ = {each.name: each.annotation for each in (*options, *own)}
        return wrapper

    return decorate


def check_rate(rate: float | None, trace: Path | None) -> None:
    """Refuse a load without a rate, or with one out of range.

    Raises:
        ConfigError: so it is.
    """
    from vllm_sarathi.core.config import ConfigError, check_positive

    if rate is None and trace is None:
        raise ConfigError(
            "--rate: is missing; give requests per second, or a --trace, which has its own rate."
        )
    if rate is not None:
        check_positive("rate", rate, 1e6)


def announced_workload(asked: "Asked", console: Console) -> Any:
    """Return the workload of `Asked`, and print where its step times come from and what it leaves out."""
    from vllm_sarathi.benchmark.capacity.simulated import workload_of

    carried, skipped = workload_of(asked)
    for line in asked.place.source.lines:
        console.print(line, soft_wrap=True)
    say_skipped(skipped, console)
    return carried


def say_skipped(skipped: int, console: Console) -> None:
    """Print how many requests are left out."""
    if skipped:
        console.print(f"{skipped} requests are longer than the model's context and left out")
