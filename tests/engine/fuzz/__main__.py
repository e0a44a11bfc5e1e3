"""`python -m tests.engine.fuzz --steps 100000 [--seed 0] [--policy stock]`: the fuzz by itself, as long as you like."""

import argparse
import logging
import os
import sys

os.environ.update(
    VLLM_LOGGING_LEVEL="CRITICAL", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
)


def main() -> int:
    """Search; return 1 where something of ours breaks."""
    from tests.engine.fuzz.search import search

    logging.getLogger("vllm").setLevel(logging.CRITICAL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="scheduler steps to take")
    parser.add_argument("--seed", type=int, default=0, help="number of the first life")
    parser.add_argument(
        "--policy", default=None, help="one policy for all lives; 'stock' for vLLM's own scheduler"
    )
    chosen = parser.parse_args()
    result = search(chosen.steps, chosen.seed, chosen.policy, lambda finding: print(finding, flush=True))
    print(f"{result.steps:,} steps in {result.lives:,} lives from seed {chosen.seed}")
    for kind, count in result.counts.most_common():
        print(f"{count:5d} x {kind}")
    for kind, count in result.upstream.most_common():
        print(f"{count:5d} x in stock vLLM, too: {kind}")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
