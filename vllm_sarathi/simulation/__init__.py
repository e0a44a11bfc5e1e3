"""SIMULATES: virtual time, the real vLLM scheduler, a modelled device."""
