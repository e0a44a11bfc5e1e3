"""Leaves: one thin adapter per framework; nothing imports them."""
