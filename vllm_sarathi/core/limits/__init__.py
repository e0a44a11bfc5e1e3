"""What bounds the prefill of a step: one small object each, (view, candidate) -> (tokens, reason)."""
