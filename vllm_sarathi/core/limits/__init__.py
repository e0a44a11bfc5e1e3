"""The limits on a step's prefill: one small object each, (view, candidate) -> (tokens, reason)."""
