"""Plain values out of texts that people write: YAML or JSON, no key twice, nothing but data."""

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from vllm_sarathi.core.errors import ConfigError, short

MERGE_TAG = "tag:yaml.org,2002:merge"


def parse_plain(text: str, origin: str) -> object:
    """Return the plain values of a text in YAML or JSON; `origin` names it in errors.

    Raises:
        ConfigError: it is neither, or names a key twice.
    """
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: no_twins(pairs, origin))
        except RecursionError as error:
            raise ConfigError(f"{origin}: is nested too deeply.") from error
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            with suppress(ConfigError):  # a mapping of YAML may begin like that, too
                if isinstance(value := _parse_yaml(text, origin), dict):
                    return value
            raise ConfigError(f"{origin}: is not valid JSON ({error}).") from error
    return _parse_yaml(text, origin)


def _parse_yaml(text: str, origin: str) -> object:
    try:
        import yaml  # vLLM brings it; JSON needs nothing
    except ModuleNotFoundError as error:
        raise ConfigError(f"{origin}: YAML needs pip install pyyaml; JSON works without.") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """Plain values only, and no key twice."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        if any(key.tag == MERGE_TAG for key, _ in node.value):
            raise ConfigError(f"{origin}: key '<<': keys cannot be merged in; write them out.")
        return no_twins(loader.construct_pairs(node, deep=True), origin)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except RecursionError as error:
        raise ConfigError(f"{origin}: is nested too deeply.") from error
    except ConfigError:
        raise
    # What a tag or a date cannot be made of is raised as it comes.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{origin}: is not valid YAML ({said}).") from error


def no_twins(pairs: Iterable[tuple[Any, Any]], origin: str) -> dict[Any, Any]:
    """Return pairs as a mapping; of two equal keys the first would be lost without a word."""
    made: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ConfigError(
                f"{origin}: key {short(key)}: must be a name; in quotes where it is taken for something else."
            )
        if key in made:
            raise ConfigError(f"{origin}: key {short(key)}: is given twice.")
        made[key] = value
    return made
