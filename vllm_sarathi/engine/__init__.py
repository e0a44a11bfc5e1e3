"""Obeys: the only place that knows vLLM."""
