"""What a device and the scheduler itself cost, and whether the simulation is right."""
