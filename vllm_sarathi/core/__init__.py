"""Decides: what the next step holds. numpy only; no vLLM, no torch."""
