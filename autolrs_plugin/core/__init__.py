"""Decides: which learning rate to try, for how long. No torch."""
