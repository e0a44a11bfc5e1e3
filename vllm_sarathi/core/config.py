"""SarathiConfig: every setting of the scheduler, strict about names, types and ranges."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_sarathi.core.classes import LEAST_WAIT_S, MAX_SLO_MS, SloClasses, check_number, read_classes, slo_ms
from vllm_sarathi.core.errors import ConfigError as ConfigError
from vllm_sarathi.core.errors import nearest_hint as nearest_hint
from vllm_sarathi.core.errors import short
from vllm_sarathi.core.policies import POLICIES

SCHEDULERS = tuple(POLICIES)
"""Schedulers of ours, by the name that `--scheduler` takes."""

BASELINES = tuple(name for name in SCHEDULERS if name != "sarathi")
"""Schedulers to compare with; a token budget is the most that they take in one step."""

STOCK_SCHEDULER = "default"
"""The name that `--scheduler` takes for vLLM's own scheduler."""

CONFIG_KEY = "vllm_sarathi"
"""The key under which vLLM's `additional_config` carries our settings to the engine core."""

SCHEDULER_CLS = "vllm_sarathi.SarathiScheduler"
"""The dotted path that vLLM's `scheduler_cls` takes."""

AUTO_FACTOR = 5.0
"""The paper's strict SLO: five times a decode step (section 5, "SLOs"); its relaxed one is 25 times."""

CHOICES = {"tbt_mode": ("gap", "pace"), "prefill_order": ("fcfs", "sjf", "deadline")}
"""Settings that are one of some words."""


def flag_name(key: str) -> str:
    """Return the command-line flag of a setting: `token_budget` is `--token-budget`."""
    return "--" + key.replace("_", "-")


def check_scheduler(name: object) -> str:
    """Return `name` if it is a scheduler that `--scheduler` takes; raise ConfigError with the nearest one if not."""
    valid = (*SCHEDULERS, STOCK_SCHEDULER)
    if not isinstance(name, str) or name not in valid:
        raise ConfigError(f"--scheduler {short(name)}: unknown scheduler; {nearest_hint(str(name), valid)}")
    return name


def check_int(key: str, value: object, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`; raise ConfigError naming the flag if it is none."""
    # bool is an int to Python, but `"token_budget": true` in a file is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{flag_name(key)} {short(value)}: must be a whole number of at least {minimum}.")
    return value


def check_keys(values: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError for the first key that is no setting; `origin` names where the keys stand."""
    known = SarathiConfig.keys()
    for key in values:
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {short(key)}; {nearest_hint(str(key), known)}")


def check_choice(key: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise ConfigError naming the flag and the nearest choice if `value` is none of `valid`."""
    if value not in valid:
        raise ConfigError(f"{flag_name(key)} {short(value)}: unknown; {nearest_hint(str(value), valid)}")


def check_positive(key: str, value: object, most: float, least: float = 0.0) -> None:
    """Raise ConfigError naming the flag if `value` is not a finite number above 0, from `least` to `most`."""
    check_number(value, flag_name(key), most, least)


def check_path(key: str, value: object) -> None:
    """Raise ConfigError naming the flag if `value` is neither None nor the name of a file or folder."""
    if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
        raise ConfigError(f"{flag_name(key)} {short(value)}: must be the name of a file or folder.")


def auto_factor(text: object) -> float:
    """Return the factor in `auto` (5) or `auto:25x` (25).

    Raises:
        ConfigError: `text` is neither.
    """
    match = re.fullmatch(r"auto(?::(\d+(?:\.\d+)?)x)?", text) if isinstance(text, str) else None
    factor = float(match.group(1) or AUTO_FACTOR) if match else 0.0
    if not 1 < factor <= 1000:
        raise ConfigError(
            f"--tbt-slo {short(text)}: must be 'auto' or 'auto:25x', with a factor above 1 and at most 1000."
        )
    return factor


def check_header(key: str, value: object) -> None:
    """Raise ConfigError naming the flag if `value` cannot be the name of an HTTP header (RFC 9110, section 5.1)."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        raise ConfigError(f"{flag_name(key)} {short(value)}: must be the name of an HTTP header.")


def check_class_path(key: str, value: object) -> None:
    """Raise ConfigError naming the flag if `value` cannot be the dotted path of a class."""
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
        raise ConfigError(
            f"{flag_name(key)} {short(value)}: must be the dotted path of a class, MODULE.CLASS."
        )


def _classes_of(_: str, value: object) -> SloClasses | None:
    """Return the classes that a setting stands for: themselves, their plain values, or a file's name."""
    if value is None or isinstance(value, SloClasses):
        return value
    if isinstance(value, Mapping):
        return SloClasses.from_mapping(value)
    check_path("slo_classes", value)
    return read_classes(str(value))


NO_CALIBRATION = "none"
"""What `--calibration-dir` takes to start cold and remember nothing."""

FAIRNESS_HEADER = "x-llm-d-inference-fairness-id"
"""The header by which llm-d's router says whose a request is."""


def by_slo_alone(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return those of the settings that, beside the others, only a scheduler that goes by the SLO heeds.

    No baseline does so, and nobody with a fixed budget; what clients ask for still counts in deadline order, and the
    bound on waiting in any order but that of arrival.
    """
    keys = ["tbt_slo_ms", "tbt_slo", "tbt_mode", "slo_classes", "fairness_header"]
    if settings.get("prefill_order") != "deadline":
        keys += ["allow_request_slo", "min_request_slo_ms"]
    if settings.get("prefill_order", "fcfs") == "fcfs":
        keys.append("prefill_max_wait_s")
    if settings.get("calibration_dir") != NO_CALIBRATION:
        keys.append("calibration_dir")
    return tuple(key for key in keys if key in settings)


SPECIAL: dict[str, Callable[[str, object], object]] = {
    "slo_classes": _classes_of,
    "fairness_header": check_header,
    "scheduler_base": check_class_path,
}
"""Settings with a check of their own."""


def check_setting(key: str, value: Any) -> None:
    """Raise ConfigError naming the flag if the value of a setting is none, whatever the other settings are."""
    if value is None and key in ("token_budget", "tbt_slo_ms", "ttft_slo_ms", "scheduler_base"):
        return
    if key == "scheduler":
        check_scheduler(value)
    elif key == "token_budget":
        check_int(key, value, minimum=1)
    elif key == "tbt_slo":
        auto_factor(value)
    elif key == "allow_request_slo":
        if not isinstance(value, bool):
            raise ConfigError(f"--allow-request-slo {short(value)}: must be true or false.")
    elif key in ("step_trace", "calibration_dir"):
        check_path(key, value)
    elif key in SPECIAL:
        SPECIAL[key](key, value)
    elif key in CHOICES:
        check_choice(key, value, CHOICES[key])
    elif key.endswith("_slo_ms"):
        slo_ms(value, flag_name(key))
    else:
        check_positive(key, value, MAX_SLO_MS / 1e3, LEAST_WAIT_S)


def _setting(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class SarathiConfig:
    """Settings of SarathiScheduler; each is a flag of the same name.

    Without any of them the scheduler keeps the paper's strict SLO, measured on the spot: every gap between
    tokens within five times a decode step.

    Attributes:
        scheduler: which of our schedulers plans the steps, a name from SCHEDULERS.
        token_budget: tokens per step, decodes included (tau in the paper, section 4.3): a fixed budget
            instead of a latency SLO.
        tbt_slo_ms: the SLO for the time between tokens, milliseconds.
        tbt_slo: `auto` or `auto:25x`: the SLO as a multiple of a decode step; used where tbt_slo_ms is None.
        tbt_mode: `gap`: every gap keeps the SLO; `pace`: token n comes by first token + n x SLO, so that
            a stream that is ahead has slack to lend.
        ttft_slo_ms: the SLO for the time to first token, milliseconds; gives each waiting prompt a deadline.
        prefill_order: `fcfs`, the order of arrival; `sjf`, the shortest prompt first; or `deadline`: earliest deadline
            first, shortest remaining as tie-break.
        prefill_max_wait_s: a prompt that has waited so long goes before all later ones, and before the gaps between
            tokens where both cannot be had, seconds.
        allow_request_slo: whether clients may ask for SLOs of their own.
        min_request_slo_ms: the least SLO that a client may ask for, milliseconds.
        slo_classes: the classes of requests, with the SLOs of each; the name of a class file is read at once.
        fairness_header: the HTTP header that names the tenant of a request; tenants share the time of a class.
        scheduler_base: the dotted path of another subclass of vLLM's scheduler, which stays in use below ours.
        step_trace: a file that gets a line per step; None writes none.
        calibration_dir: the folder that keeps what was learnt of a device; None is `vllm-sarathi` in the user's
            cache folder, `none` starts cold and keeps nothing.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    scheduler: str = _setting("sarathi", "The policy that plans each step.")
    token_budget: int | None = _setting(
        None, "Tokens per step, decodes included (the paper's tau), instead of an SLO.", "N"
    )
    tbt_slo_ms: float | None = _setting(
        None, "SLO for the time between tokens, in milliseconds; the budget follows from it.", "MS"
    )
    tbt_slo: str = _setting(
        "auto",
        "Without --tbt-slo-ms: the SLO as a multiple of a decode step, measured while serving.",
        "auto[:25x]",
    )
    tbt_mode: str = _setting(
        "gap",
        "gap: every gap meets the SLO; pace: token n is due at first token + n x SLO.",
        "{gap,pace}",
    )
    ttft_slo_ms: float | None = _setting(
        None,
        "SLO for the time to first token, in milliseconds: each prompt's deadline in deadline order.",
        "MS",
    )
    prefill_order: str = _setting(
        "fcfs",
        "Which prompt is prefilled first: the first to arrive, the shortest, or the one whose deadline is next.",
        "{fcfs,sjf,deadline}",
    )
    prefill_max_wait_s: float = _setting(
        30.0,
        "A prompt that has waited this long goes before all later ones, and before the gaps between tokens.",
        "S",
    )
    allow_request_slo: bool = _setting(
        False, "Let clients ask for SLOs of their own (vllm_xargs: tbt_slo_ms, ttft_slo_ms)."
    )
    min_request_slo_ms: float = _setting(
        10.0, "The tightest SLO that a client may ask for, in milliseconds.", "MS"
    )
    slo_classes: SloClasses | None = _setting(  # noqa: RUF009  # it makes a field
        None, "A YAML or JSON file that names classes of requests and the SLOs of each.", "FILE.yaml"
    )
    fairness_header: str = _setting(
        FAIRNESS_HEADER, "With --slo-classes: the HTTP header that names the tenant of a request.", "NAME"
    )
    scheduler_base: str | None = _setting(
        None, "Another subclass of vLLM's scheduler, which stays in use below ours.", "MODULE.CLASS"
    )
    step_trace: str | None = _setting(
        None, "A file that gets a line per step; `vllm-sarathi trace` draws it.", "FILE.jsonl"
    )
    calibration_dir: str | None = _setting(
        None,
        "The folder that keeps what was learnt of a device for the next start (default: vllm-sarathi in the "
        "user's cache folder); 'none' starts cold and keeps nothing.",
        "DIR",
    )

    @property
    def tbt_slo_factor(self) -> float:
        """The factor in `tbt_slo`: 5 in `auto`, 25 in `auto:25x`."""
        return auto_factor(self.tbt_slo)

    def __post_init__(self) -> None:
        if check_scheduler(self.scheduler) == STOCK_SCHEDULER:
            raise ConfigError(
                f"--scheduler {STOCK_SCHEDULER}: is vLLM's own scheduler, which has no settings and can only be chosen "
                f"on the command line; valid: {', '.join(SCHEDULERS)}."
            )
        object.__setattr__(self, "slo_classes", _classes_of("slo_classes", self.slo_classes))
        for key in self.keys():
            check_setting(key, getattr(self, key))
        if self.token_budget is not None and self.tbt_slo_ms is not None:
            raise ConfigError(
                f"--token-budget {self.token_budget}: a fixed budget cannot keep --tbt-slo-ms "
                f"{self.tbt_slo_ms:g}; give one of the two."
            )
        self._check_unheeded()

    def _check_unheeded(self) -> None:
        """Refuse what was asked for and would be ignored."""
        defaults = {field.name: field.default for field in fields(self)}
        self._check_classes(defaults)
        beside = f"--token-budget {self.token_budget}" if self.token_budget is not None else None
        if self.scheduler in BASELINES:
            beside = f"--scheduler {self.scheduler}"
        for key in by_slo_alone(self.to_mapping()):
            if beside and (value := getattr(self, key)) != defaults[key]:
                given = flag_name(key) if value is True else f"{flag_name(key)} {value}"
                if isinstance(value, SloClasses):
                    given = value.origin
                raise ConfigError(f"{given}: has no effect with {beside}.")
        if self.ttft_slo_ms is not None and self.prefill_order != "deadline" and self.slo_classes is None:
            raise ConfigError(
                f"--ttft-slo-ms {self.ttft_slo_ms:g}: has no effect without --prefill-order deadline."
            )
        if self.tbt_slo_ms is not None and self.tbt_slo != defaults["tbt_slo"]:
            raise ConfigError(
                f"--tbt-slo {self.tbt_slo}: has no effect with --tbt-slo-ms {self.tbt_slo_ms:g}; give one of the two."
            )
        if self.min_request_slo_ms != defaults["min_request_slo_ms"] and not self.allow_request_slo:
            raise ConfigError(
                f"--min-request-slo-ms {self.min_request_slo_ms:g}: has no effect without --allow-request-slo."
            )

    def _check_classes(self, defaults: Mapping[str, Any]) -> None:
        if self.slo_classes is None:
            if self.fairness_header != defaults["fairness_header"]:
                raise ConfigError(
                    f"--fairness-header {self.fairness_header}: has no effect without --slo-classes."
                )
            return
        for key in ("ttft_slo_ms", "allow_request_slo", "min_request_slo_ms"):
            if (value := getattr(self, key)) != defaults[key]:
                raise ConfigError(
                    f"{flag_name(key)} {value}: has no effect with --slo-classes; each class states its SLOs "
                    "and allows."
                )
        if self.prefill_order == "sjf":
            raise ConfigError("--prefill-order sjf: --slo-classes orders prompts by their SLOs.")

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Return the names of all settings."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "SarathiConfig") -> "SarathiConfig":
        """Build a config from plain values; `origin` names their source in errors.

        Raises:
            ConfigError: an unknown key, or a value of a wrong type or out of range.
        """
        check_keys(values, origin)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return the settings as plain values; `from_mapping` takes them back."""
        classes = None if self.slo_classes is None else self.slo_classes.to_mapping()
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"slo_classes": classes}

    def engine_args(self) -> dict[str, Any]:
        """Return the keyword arguments to splat into vLLM's `LLM` or `AsyncEngineArgs`."""
        return {"scheduler_cls": SCHEDULER_CLS, "additional_config": {CONFIG_KEY: ConfigCarrier(self)}}


class ConfigCarrier(str):
    """A SarathiConfig inside vLLM's `additional_config`, the same to vLLM's hash whatever it holds.

    vLLM hashes `additional_config` by its JSON into the key of its compile cache. Nothing of ours changes
    a compiled graph, so the JSON of this object is always the same word: a new budget or SLO recompiles nothing.
    """

    config: SarathiConfig

    def __new__(cls, config: SarathiConfig) -> "ConfigCarrier":
        carrier = super().__new__(cls, "SarathiConfig")
        carrier.config = config
        return carrier

    def __repr__(self) -> str:
        return repr(self.config)

    def __reduce__(self) -> tuple[type["ConfigCarrier"], tuple[SarathiConfig]]:
        return ConfigCarrier, (self.config,)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read the settings in a JSON file, as `--sarathi-config` names one.

    Raises:
        ConfigError: the file cannot be read, is not a JSON object, or has an unknown key.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--sarathi-config {str(path)!r}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"--sarathi-config {str(path)!r}: is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"--sarathi-config {str(path)!r}: must hold a JSON object, not {type(values).__name__}."
        )
    # Checked here, where the file's name is known; the values are checked after flags have overridden them.
    check_keys(values, origin=f"--sarathi-config {str(path)!r}")
    return values


def config_from_additional(additional_config: object) -> SarathiConfig:
    """Return our settings out of vLLM's `additional_config`, or the defaults where it has none.

    Raises:
        ConfigError: what stands under CONFIG_KEY is not ours, or holds a bad setting.
    """
    value = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
    if value is None:
        return SarathiConfig()
    if isinstance(value, ConfigCarrier):
        return value.config
    if isinstance(value, SarathiConfig):
        return value
    if isinstance(value, Mapping):
        return SarathiConfig.from_mapping(value, origin=f"additional_config[{CONFIG_KEY!r}]")
    raise ConfigError(
        f"additional_config[{CONFIG_KEY!r}]: must be a mapping of settings, not {type(value).__name__}."
    )
