"""What the host takes around a step, and what a request spends outside the engine."""

HOST_S = 1.5e-3
"""Input preparation and launch on the host in one step; in asynchronous scheduling the device works meanwhile."""

HOST_SEQUENCE_S = 39e-6
"""What the host takes for each sequence of a step: scheduling, inputs, and taking in its token."""

OUTSIDE_S = 0.0
"""What a request spends outside the engine until its first token is there: HTTP, tokenizer, detokenizer, queues."""
