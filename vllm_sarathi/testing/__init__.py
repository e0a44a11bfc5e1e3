"""For those who write a policy: `check_policy` plays requests on the real scheduler, and says what breaks."""

from vllm_sarathi.testing.conformance import check_policy

__all__ = ["check_policy"]
