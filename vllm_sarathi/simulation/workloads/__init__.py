"""Workloads: who sends what, and when. `registry` names them all, for simulations and for live runs."""
