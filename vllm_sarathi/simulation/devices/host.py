"""What the host takes around a step where nothing has been measured, and what a request spends outside the engine."""

HOST_S = 1.5e-3
"""Input preparation and launch on the host in one step; in asynchronous scheduling the device works meanwhile."""

OUTSIDE_S = 0.0
"""What a request spends outside the engine until its first token is there: HTTP, tokenizer, detokenizer, queues."""
