"""SLO classes: what a class file says, and what one request is bound to by it.

A file names classes, each with its SLOs and what to do when they cannot be met:

    default: standard
    classes:
      interactive: {ttft_slo_ms: 500, tbt_slo_ms: 50, weight: 4, when_late: refuse, service_tiers: [priority]}
      standard: {ttft_slo_ms: 2000, tbt_slo_ms: 100, when_late: relegate}
      batch: {batch: true, service_tiers: [flex]}
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from vllm_sarathi.core.errors import ConfigError, nearest_hint, short
from vllm_sarathi.core.plain import parse_plain

LEAST_SLO_MS, MAX_SLO_MS = 0.1, 3_600_000.0
"""No step of any device ends sooner; and an hour: whoever asks for more has mistaken the unit."""

WHEN_LATE = ("serve", "relegate", "refuse")
"""What becomes of a request whose time to first token cannot be kept: it keeps its place and is late; it goes behind
those that can be kept; it is refused before any of it is prefilled."""

SERVICE_TIERS = ("default", "flex", "scale", "priority")
"""What OpenAI's `service_tier` may be, and vLLM lets through; beside these NO_TIER."""

NO_TIER = "auto"
"""What clients send that ask for no tier: it stands for no class."""

MOST_NAME_CHARACTERS = 256
"""The longest name of a class, and of a tenant that is told from others."""

BATCH_MAX_WAIT_S = 300.0
LEAST_WAIT_S = 1e-3
"""The least bound on waiting: it is meant to let others go first for a step at the least."""

MOST_CLASSES = 32

WHILE_SERVING = ("ttft_slo_ms", "tbt_slo_ms", "weight", "when_late", "max_wait_s")
"""What can be changed of a class while requests run. Names, tiers and which of them are batch work cannot: clients and
routers go by those."""

MOST_WEIGHT = 1e6


@dataclass(frozen=True, slots=True)
class SloClass:
    """One class.

    Attributes:
        name: what requests call it.
        ttft_slo_ms: the SLO for the time to first token, milliseconds; None for none.
        tbt_slo_ms: the SLO for the time between tokens, milliseconds; None leaves it at the server's own.
        weight: how much meeting one of its SLOs counts beside another class's.
        when_late: one of WHEN_LATE.
        batch: whether it takes only what the SLOs of the others leave.
        max_wait_s: batch work has waited for no longer than that when the next prompt of it is begun, seconds.
        service_tiers: values of `service_tier` that stand for it, beside its name.
    """

    name: str
    ttft_slo_ms: float | None = None
    tbt_slo_ms: float | None = None
    weight: float = 1.0
    when_late: str = "serve"
    batch: bool = False
    max_wait_s: float = BATCH_MAX_WAIT_S
    service_tiers: tuple[str, ...] = ()

    @property
    def ttft_slo_s(self) -> float | None:
        """The SLO for the time to first token, seconds; None for none."""
        return None if self.ttft_slo_ms is None else self.ttft_slo_ms / 1e3

    @property
    def tbt_slo_s(self) -> float | None:
        """The SLO for the time between tokens, seconds; None is the server's own; infinite for batch work."""
        if self.batch:
            return math.inf
        return None if self.tbt_slo_ms is None else self.tbt_slo_ms / 1e3


_KEYS = tuple(each.name for each in fields(SloClass) if each.name != "name")
"""What a file may say of a class."""


@dataclass(frozen=True, slots=True)
class Bond:
    """What one request is bound to.

    Attributes:
        tbt_slo_s: the time between its tokens, seconds; None is the server's own, infinity is none.
        ttft_slo_s: the time to its first token, seconds; None is the server's own.
        slo_class: its class; None where there are no classes.
        tenant: whose it is, for fairness inside a class.
        tag: its place in its class by the shares of the tenants, tokens; see `order.shares`.
    """

    tbt_slo_s: float | None = None
    ttft_slo_s: float | None = None
    slo_class: SloClass | None = None
    tenant: str = ""
    tag: float = 0.0

    @property
    def batch(self) -> bool:
        """Whether it takes only what SLOs leave."""
        return self.slo_class is not None and self.slo_class.batch


@dataclass(frozen=True)
class SloClasses:
    """The classes of a server.

    Attributes:
        classes: all of them, in the order of the file.
        default: the name of that of requests which name none.

    Raises:
        ConfigError: they contradict each other.
    """

    classes: tuple[SloClass, ...]
    default: str
    origin: str = field(default="--slo-classes", compare=False)

    def __post_init__(self) -> None:
        names = [each.name for each in self.classes]
        if self.default not in names:
            raise ConfigError(
                f"{self.origin}: default {self.default!r}: no such class; {nearest_hint(self.default, names)}"
            )
        taken: dict[str, str] = {name: name for name in names}
        for each in self.classes:
            for tier in each.service_tiers:
                if taken.setdefault(tier, each.name) != each.name:
                    raise ConfigError(
                        f"{self.origin}: classes.{each.name}.service_tiers {tier!r}: stands for class "
                        f"{taken[tier]!r} already; each tier stands for one class."
                    )

    @classmethod
    def from_mapping(cls, values: object, origin: str = "--slo-classes") -> "SloClasses":
        """Build classes from the plain values of a file; `origin` names it in errors.

        Raises:
            ConfigError: a key or a value that is not valid.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: must hold a mapping with 'classes', not {type(values).__name__}.")
        _check_names(values, ("default", "classes"), origin)
        listed = values.get("classes")
        if not isinstance(listed, Mapping) or not 1 <= len(listed) <= MOST_CLASSES:
            raise ConfigError(
                f"{origin}: classes {'missing' if listed is None else short(listed)}: must be a mapping of 1 to "
                f"{MOST_CLASSES} names to their SLOs."
            )
        classes = tuple(_class(name, of_class, origin) for name, of_class in listed.items())
        plain = next((each.name for each in classes if not each.batch), classes[0].name)
        default = values.get("default", plain)
        if not isinstance(default, str):
            raise ConfigError(f"{origin}: default {short(default)}: must be the name of a class.")
        return cls(classes, default, origin)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values; `from_mapping` takes them back."""
        blank = asdict(SloClass(""))
        listed = {}
        for each in self.classes:
            said = {
                key: value for key, value in asdict(each).items() if value != blank[key] and key != "name"
            }
            listed[each.name] = {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}
        return {"default": self.default, "classes": listed}

    def changed(self, values: object) -> "SloClasses":
        """Return the classes with other values; requests are bound by those from now on.

        Args:
            values: `{"classes": {NAME: {...}}}`, with what is to change; None puts a value back to its default.

        Raises:
            ConfigError: something that is not valid, or cannot be changed.
        """
        origin, mine = "slo_classes", self.to_mapping()
        listed = values.get("classes") if isinstance(values, Mapping) else None
        if not isinstance(values, Mapping) or set(values) != {"classes"} or not isinstance(listed, Mapping):
            raise ConfigError(
                f"{origin} {short(values)}: must be {{'classes': {{NAME: {{...}}}}}} with what is to change."
            )
        for name, of_class in listed.items():
            if name not in mine["classes"]:
                raise ConfigError(
                    f"{origin}: classes {short(name)}: no such class; {nearest_hint(name, mine['classes'])}"
                )
            if not isinstance(of_class, Mapping):
                raise ConfigError(
                    f"{origin}: classes.{name} {short(of_class)}: must be a mapping of its SLOs."
                )
            for key in of_class:
                if key in _KEYS and key not in WHILE_SERVING:
                    raise ConfigError(
                        f"{origin}: classes.{name}.{key}: can only be given when the server starts."
                    )
            _check_names(of_class, WHILE_SERVING, f"{origin}: classes.{name}")
            merged = {**mine["classes"][name], **of_class}
            mine["classes"][name] = {key: value for key, value in merged.items() if value is not None}
        return SloClasses.from_mapping(mine, origin)

    def named(self, name: object) -> SloClass | None:
        """Return the class of a name or a service tier; None where it stands for none."""
        for each in self.classes:
            if name == each.name:
                return each
        return next((each for each in self.classes if name in each.service_tiers), None)

    @property
    def default_class(self) -> SloClass:
        """The class of requests that name none."""
        return next(each for each in self.classes if each.name == self.default)

    def allowing(self, ttft_slo_s: float) -> SloClass:
        """Return the loosest class whose SLO for the first token is at most a time; where none does, the tightest."""
        with_ttft = [each for each in self.classes if each.ttft_slo_s is not None and not each.batch]
        if not with_ttft:
            return self.default_class
        within = [each for each in with_ttft if (each.ttft_slo_s or 0.0) <= ttft_slo_s]
        if within:
            return max(within, key=lambda each: each.ttft_slo_s or 0.0)
        return min(with_ttft, key=lambda each: each.ttft_slo_s or 0.0)

    def least(self, key: str) -> float:
        """Return the tightest SLO of a kind (`ttft_slo_s`, `tbt_slo_s`), seconds; infinite without any."""
        stated = [getattr(each, key) for each in self.classes if not each.batch]
        return min([value for value in stated if value is not None], default=math.inf)

    @property
    def refuses(self) -> bool:
        """Whether any class refuses what it cannot keep."""
        return any(each.when_late == "refuse" for each in self.classes)

    @property
    def has_batch(self) -> bool:
        """Whether any class is batch work."""
        return any(each.batch for each in self.classes)


@dataclass(frozen=True, slots=True)
class AskedSlo:
    """What a request asks for.

    Attributes:
        tbt_slo_s, ttft_slo_s: its wishes, seconds; None for none.
        class_name: the class, or the service tier, that it names; None for none.
        tenant: whose it is.
    """

    tbt_slo_s: float | None = None
    ttft_slo_s: float | None = None
    class_name: str | None = None
    tenant: str = ""

    def bind(self, classes: SloClasses) -> Bond:
        """Return what it is bound to: its own wishes, but never tighter than the SLOs of its class.

        One that names no class and wishes for a time to first token is of the loosest class that has one as tight. A
        wish for what the class has no SLO for binds to nothing.
        """
        found = classes.named(self.class_name) if self.class_name is not None else None
        if found is None and self.class_name is None and self.ttft_slo_s is not None:
            found = classes.allowing(self.ttft_slo_s)
        found = found or classes.default_class
        tbt_slo_s = _allowed(found.tbt_slo_s, self.tbt_slo_s)
        return Bond(tbt_slo_s, _allowed(found.ttft_slo_s, self.ttft_slo_s), found, self.tenant)


def _allowed(ttft_slo_s: float | None, wish_s: float | None) -> float | None:
    return ttft_slo_s if ttft_slo_s is None or wish_s is None else max(ttft_slo_s, wish_s)


def read_classes(path: str | Path) -> SloClasses:
    """Read a class file, YAML or JSON.

    Raises:
        ConfigError: it cannot be read or holds something that is not valid; the message names file, key and value.
    """
    origin = f"--slo-classes {str(path)!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{origin}: is not text ({error}).") from error
    return SloClasses.from_mapping(parse_plain(text, origin), origin)


def _check_names(values: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {short(key)}; {nearest_hint(str(key), known)}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(value: object, what: str, most: float, least: float = 0.0) -> None:
    """Raise ConfigError naming `what` if `value` is not a finite number above 0, from `least` to `most`."""
    # NaN is below nothing; an int may be too large for a float, and is compared as it is.
    if not _is_number(value) or not 0 < value <= most or value < least:
        bound = f"of at least {least:g}" if least else "above 0"
        raise ConfigError(f"{what} {short(value)}: must be a number {bound} and at most {most:g}.")


def slo_ms(value: object, what: str) -> float:
    """Return an SLO, milliseconds; `what` names it in the error.

    Raises:
        ConfigError: it is no number, or one that no clock measures or nobody means.
    """
    # NaN is above nothing; an int may be too large for a float, and is compared as it is.
    if not _is_number(value) or not LEAST_SLO_MS <= value <= MAX_SLO_MS:
        raise ConfigError(
            f"{what} {short(value)}: must be a number of milliseconds from {LEAST_SLO_MS:g} to {MAX_SLO_MS:,.0f}."
        )
    return float(value)


def _check_class_name(name: object, origin: str) -> str:
    if (
        not isinstance(name, str)
        or not name.isascii()
        or not name.replace("-", "").replace("_", "").isalnum()
    ):
        raise ConfigError(f"{origin}: classes {short(name)}: a name has letters, digits, - and _ only.")
    if len(name) > MOST_NAME_CHARACTERS:
        raise ConfigError(
            f"{origin}: classes {short(name)}: a name has at most {MOST_NAME_CHARACTERS} characters."
        )
    if name == NO_TIER:
        raise ConfigError(f"{origin}: classes {name!r}: {_NO_TIER_WHY}")
    return name


_NO_TIER_WHY = "is the service tier of requests that ask for none, and stands for no class; see default."


def _class(name: object, values: object, origin: str) -> SloClass:
    name = _check_class_name(name, origin)
    where = f"{origin}: classes.{name}"
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} {short(values)}: must be a mapping of its SLOs.")
    _check_names(values, _KEYS, where)
    for key in ("ttft_slo_ms", "tbt_slo_ms"):
        if key in values:
            slo_ms(values[key], f"{where}.{key}")
    for key, most, least in (("weight", MOST_WEIGHT, 0.0), ("max_wait_s", MAX_SLO_MS / 1e3, LEAST_WAIT_S)):
        if key in values:
            check_number(values[key], f"{where}.{key}", most, least)
    if values.get("when_late", "serve") not in WHEN_LATE:
        late = values["when_late"]
        raise ConfigError(f"{where}.when_late {short(late)}: unknown; {nearest_hint(str(late), WHEN_LATE)}")
    if not isinstance(batch := values.get("batch", False), bool):
        raise ConfigError(f"{where}.batch {short(batch)}: must be true or false.")
    tiers = values.get("service_tiers", ())
    if not isinstance(tiers, list | tuple):
        raise ConfigError(f"{where}.service_tiers {short(tiers)}: must be a list.")
    for tier in tiers:
        if tier == NO_TIER:
            raise ConfigError(f"{where}.service_tiers {tier!r}: {_NO_TIER_WHY}")
        if tier not in SERVICE_TIERS:
            raise ConfigError(
                f"{where}.service_tiers {short(tier)}: unknown; valid: {', '.join(SERVICE_TIERS)}."
            )
    made = SloClass(name, **{**values, "service_tiers": tuple(tiers)})
    _check_unheeded(made, values, where)
    return made


def _check_unheeded(made: SloClass, values: Mapping[str, Any], where: str) -> None:
    """Refuse what was asked for and would be ignored."""
    if made.batch:
        for key in ("ttft_slo_ms", "tbt_slo_ms", "when_late"):
            if key in values:
                raise ConfigError(
                    f"{where}.{key} {short(values[key])}: batch work has no SLO; leave it out, or batch."
                )
        if made.weight != 1.0:  # what all have that state none
            raise ConfigError(
                f"{where}.weight {made.weight:g}: has no effect on batch work; leave it out, or batch."
            )
    elif "max_wait_s" in values:
        raise ConfigError(f"{where}.max_wait_s {values['max_wait_s']:g}: has no effect without batch: true.")
    if made.when_late != "serve" and made.ttft_slo_ms is None:
        raise ConfigError(f"{where}.when_late {made.when_late!r}: has no effect without ttft_slo_ms.")
