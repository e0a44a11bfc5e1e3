"""Who plans each step. A new policy is one file here and one line below; `--scheduler` takes the names."""

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vllm_sarathi.core.policies.base import PolicyMaker

POLICIES = {
    "sarathi": "slo:make",
    "prefill-first": "prefill_first:PrefillFirst",
    "orca": "orca:Orca",
    "request-level": "request_level:RequestLevel",
    "pressure": "pressure:Pressure",
    "chunked-only": "chunked_only:ChunkedOnly",
    "hybrid-only": "hybrid_only:HybridOnly",
}
"""Name to file and maker. By string: the names are needed where numpy must not be loaded."""


def policy_maker(name: str) -> "PolicyMaker":
    """Return what makes the policy of a name from POLICIES."""
    module, _, maker = POLICIES[name].partition(":")
    return cast("PolicyMaker", getattr(importlib.import_module(f"{__name__}.{module}"), maker))
