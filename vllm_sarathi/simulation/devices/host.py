"""What the host takes around a step where nothing has been measured."""

HOST_S = 1.5e-3
"""Input preparation and launch on the host in one step; in asynchronous scheduling the device works meanwhile."""
