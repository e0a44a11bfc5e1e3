"""Prices of devices: a file of the user's, YAML or JSON.

currency: USD
per_hour: {h100: 3.00, h200: 3.80}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.core.plain import parse_plain
from vllm_sarathi.simulation.devices.roofline import DEVICES

KEYS = ("currency", "per_hour")


@dataclass(frozen=True)
class Prices:
    """What devices cost.

    Attributes:
        per_hour: of one device for an hour, by name.
        currency: in what.
        origin: the file, for errors.
    """

    per_hour: Mapping[str, float]
    currency: str
    origin: str

    def of(self, devices: Sequence[str] | None) -> dict[str, float]:
        """Return the prices of some devices; of all that have one for None.

        Raises:
            ConfigError: no device, an unknown one, or one that has no price.
        """
        if devices is None:
            return dict(self.per_hour)
        if not devices:
            raise ConfigError(f"--devices: names none; {self.origin} has {', '.join(self.per_hour)}.")
        for name in devices:
            if name not in DEVICES:
                raise ConfigError(f"--devices {name!r}: unknown; {nearest_hint(name, DEVICES)}")
            if name not in self.per_hour:
                raise ConfigError(
                    f"{self.origin}: has no price of {name!r}; it has {', '.join(self.per_hour)}: add a line under "
                    "per_hour."
                )
        return {name: self.per_hour[name] for name in devices}


def read_prices(path: Path) -> Prices:
    """Read a price file.

    Raises:
        ConfigError: it cannot be read, or a key or a value is not valid; the message names it.
    """
    origin = f"--prices {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{origin}: cannot be read ({error}).") from error
    values = parse_plain(text, origin)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: must hold a mapping with 'per_hour', not {type(values).__name__}.")
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"{origin}: unknown key {key!r}; {nearest_hint(str(key), KEYS)}")
    listed = values.get("per_hour")
    if not isinstance(listed, Mapping) or not listed:
        raise ConfigError(f"{origin}: per_hour: must be a mapping of devices to their prices for an hour.")
    for name, price in listed.items():
        if name not in DEVICES:
            raise ConfigError(
                f"{origin}: per_hour.{name}: unknown device; {nearest_hint(str(name), DEVICES)}"
            )
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 < price < math.inf:
            raise ConfigError(f"{origin}: per_hour.{name} {price!r}: must be a number above 0.")
    currency = values.get("currency", "USD")
    if not isinstance(currency, str):
        raise ConfigError(f"{origin}: currency {currency!r}: must be a word, as USD.")
    return Prices({name: float(price) for name, price in listed.items()}, currency, origin)
