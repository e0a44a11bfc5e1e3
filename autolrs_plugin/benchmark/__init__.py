"""Judges: reference tasks, peers, tables and plots."""
