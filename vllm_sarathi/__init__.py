"""A latency-promise scheduler for vLLM, after Sarathi-Serve (arXiv 2403.02310)."""

__version__ = "0.1.0"
