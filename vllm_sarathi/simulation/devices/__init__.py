"""How long a device takes for a step: from measured kernels, from a data sheet, and with what disturbs either."""
