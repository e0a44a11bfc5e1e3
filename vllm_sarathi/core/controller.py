"""Controller: the one place that decides a step, in the live engine, in the simulator and in tests."""

from vllm_sarathi.core.config import DEFAULT_TOKEN_BUDGET, SarathiConfig
from vllm_sarathi.core.policies import FixedBudget, Policy
from vllm_sarathi.core.views import StepPlan, StepView


class Controller:
    """Answers each StepView with a StepPlan that its policy makes.

    Args:
        config: the settings.
    """

    def __init__(self, config: SarathiConfig) -> None:
        self.config = config
        self._policy: Policy = FixedBudget(config.token_budget or DEFAULT_TOKEN_BUDGET)

    def plan(self, view: StepView) -> StepPlan:
        """Decide the next step; the answer is always within the engine's limits."""
        plan = self._policy.plan(view)
        assert 1 <= plan.token_budget <= view.max_tokens, plan
        return plan
