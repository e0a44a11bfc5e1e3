"""The highest rate that a deployment carries, in simulation; tables of it."""
