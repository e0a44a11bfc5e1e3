"""Judges: live runs, tables and plots."""
