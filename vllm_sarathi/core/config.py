"""SarathiConfig: every setting of the scheduler, strict about names, types and ranges."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEDULERS = ("sarathi",)
"""Schedulers of ours, by the name that `--scheduler` takes."""

STOCK_SCHEDULER = "default"
"""The name that `--scheduler` takes for vLLM's own scheduler."""

CONFIG_KEY = "vllm_sarathi"
"""The key under which vLLM's `additional_config` carries our settings to the engine core."""

SCHEDULER_CLS = "vllm_sarathi.SarathiScheduler"
"""The dotted path that vLLM's `scheduler_cls` takes."""

DEFAULT_TOKEN_BUDGET = 512
"""The paper's budget for a strict promise on its three smaller deployments (section 5, table 3)."""


class ConfigError(ValueError):
    """A setting that a user gave and that cannot be used; the message names it, the value and what is valid."""


def nearest_hint(name: str, valid: Iterable[str]) -> str:
    """Return "did you mean ...?" with the nearest valid name, or the list of valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}."


def flag_name(key: str) -> str:
    """Return the command-line flag of a setting: `token_budget` is `--token-budget`."""
    return "--" + key.replace("_", "-")


def check_scheduler(name: object) -> str:
    """Return `name` if it is a scheduler that `--scheduler` takes; raise ConfigError with the nearest one if not."""
    valid = (*SCHEDULERS, STOCK_SCHEDULER)
    if not isinstance(name, str) or name not in valid:
        raise ConfigError(f"--scheduler {name!r}: unknown scheduler; {nearest_hint(str(name), valid)}")
    return name


def check_int(key: str, value: object, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`; raise ConfigError naming the flag if it is none."""
    # bool is an int to Python, but `"token_budget": true` in a file is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{flag_name(key)} {value!r}: must be a whole number of at least {minimum}.")
    return value


def check_keys(values: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError for the first key that is no setting; `origin` names where the keys stand."""
    known = SarathiConfig.keys()
    for key in values:
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {key!r}; {nearest_hint(str(key), known)}")


@dataclass(frozen=True)
class SarathiConfig:
    """Settings of SarathiScheduler.

    Attributes:
        scheduler: which of our schedulers plans the steps, a name from SCHEDULERS.
        token_budget: tokens per step, decodes included (tau in the paper, section 4.3); None means
            DEFAULT_TOKEN_BUDGET, or the engine's own limit where that is lower.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    scheduler: str = field(default="sarathi", metadata={"help": "Who plans each step"})
    token_budget: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "Tokens per step, decodes included (the paper's tau)."},
    )

    def __post_init__(self) -> None:
        if check_scheduler(self.scheduler) == STOCK_SCHEDULER:
            raise ConfigError(
                f"SarathiConfig: {STOCK_SCHEDULER!r} is vLLM's own scheduler and has no settings."
            )
        if self.token_budget is not None:
            check_int("token_budget", self.token_budget, minimum=1)

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
        return asdict(self)

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
        ConfigError: the file cannot be read, is no JSON object, or has an unknown key.
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
