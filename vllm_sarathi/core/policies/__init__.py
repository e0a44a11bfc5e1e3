"""Who plans each step. A new policy is one file here and one line below; `--scheduler` takes the names."""

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
