"""What clients ask for: read once when a request arrives, so that nothing bad reaches a step.

An OpenAI client sends `vllm_xargs: {"tbt_slo_ms": 30, "ttft_slo_ms": 500, "slo_class": "interactive"}`, a Python one
`SamplingParams(extra_args={...})`; what comes in headers, `engine.http` puts there. It is plain data from outside: any
value may be anything. Over HTTP `engine.http` has turned away what is no SLO; what a Python client asks for is passed
over where it is none.
"""

import functools
from collections.abc import Mapping
from typing import Any

from vllm_sarathi.core.classes import MOST_NAME_CHARACTERS, AskedSlo, slo_ms
from vllm_sarathi.core.config import ConfigError, SarathiConfig
from vllm_sarathi.engine.vllm.internals import logger

CLASS_KEY, TENANT_KEY = "slo_class", "slo_tenant"
TBT_KEY, TTFT_KEY = "tbt_slo_ms", "ttft_slo_ms"

NOTHING = AskedSlo()


def read_asked_slo(extra_args: object, config: SarathiConfig) -> AskedSlo:
    """Return what a request's extra arguments ask for; what is not valid is passed over, and logged."""
    classes = config.slo_classes
    if not isinstance(extra_args, Mapping) or not (config.allow_request_slo or classes is not None):
        return NOTHING
    least_ms = 0.0 if classes is not None else config.min_request_slo_ms
    tbt_slo_s, ttft_slo_s = (_seconds(extra_args, key, least_ms) for key in (TBT_KEY, TTFT_KEY))
    if classes is None:
        asked = AskedSlo(tbt_slo_s, ttft_slo_s)
    else:
        name = extra_args.get(CLASS_KEY)
        if name is not None and (not isinstance(name, str) or classes.named(name) is None):
            _say_unknown(str(name)[:80], classes.default)
            name = classes.default
        tenant = extra_args.get(TENANT_KEY)
        tenant = tenant[:MOST_NAME_CHARACTERS] if isinstance(tenant, str) else ""
        asked = AskedSlo(tbt_slo_s, ttft_slo_s, name, tenant)
    return NOTHING if asked == NOTHING else asked


@functools.lru_cache(maxsize=64)
def _say_unknown(name: str, default: str) -> None:
    """Say once that a class is not known; names come from outside, so not for all of any number."""
    logger.warning(
        "Requests ask for the class %r, which is unknown: they get the default class, %r.", name, default
    )


def _seconds(extra_args: Mapping[Any, Any], key: str, least_ms: float) -> float | None:
    value = extra_args.get(key)
    if value is None:
        return None
    try:
        return max(slo_ms(value, key), least_ms) / 1e3
    except ConfigError as error:
        logger.info("A request goes on without the SLO that it asked for. %s", error)
        return None
