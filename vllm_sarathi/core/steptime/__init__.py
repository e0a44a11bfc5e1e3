"""How long a step takes: learnt from the steps as they happen, with a margin for what cannot be predicted."""
