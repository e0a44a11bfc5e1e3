"""Controller: the one place that decides a step, in the live engine, in the simulator and in tests."""

from dataclasses import replace

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.cost_model import CostModel
from vllm_sarathi.core.policies import (
    ChunkedOnly,
    FixedBudget,
    HybridOnly,
    Orca,
    Policy,
    PrefillFirst,
    Pressure,
    RequestLevel,
)
from vllm_sarathi.core.slo import SloBudget
from vllm_sarathi.core.views import StepPlan, StepRecord, StepShape, StepView

CHUNK_TOKENS = 512
"""The paper's strict budget, for `chunked-only` without one of its own."""

BASELINES: dict[str, type[Policy]] = {
    "prefill-first": PrefillFirst,
    "orca": Orca,
    "request-level": RequestLevel,
    "pressure": Pressure,
    "hybrid-only": HybridOnly,
}


class Controller:
    """Answers each StepView with a StepPlan, and learns from each StepRecord.

    Args:
        config: the settings.
        steps_per_token: steps that end between two tokens of a request: the depth of a pipeline, else 1.
    """

    def __init__(self, config: SarathiConfig, steps_per_token: int = 1) -> None:
        self.config = config
        self.model = CostModel()
        self.policy: Policy
        self._most_tokens: int | None = None
        if config.scheduler == "chunked-only":
            self.policy = ChunkedOnly(config.token_budget or CHUNK_TOKENS)
        elif config.scheduler in BASELINES:
            self.policy = BASELINES[config.scheduler]()
            self._most_tokens = config.token_budget
        elif config.token_budget is not None:
            self.policy = FixedBudget(config.token_budget)
        else:
            self.policy = SloBudget(config, self.model, steps_per_token)

    @property
    def tbt_slo_s(self) -> float | None:
        """The promised time between tokens, seconds; None where there is none, or none is known yet."""
        return self.policy.tbt_slo_s if isinstance(self.policy, SloBudget) else None

    def plan(self, view: StepView) -> StepPlan:
        """Decide the next step; the answer is always within the engine's limits."""
        if self._most_tokens is not None:
            view = replace(view, max_tokens=min(self._most_tokens, view.max_tokens))
        plan = self.policy.plan(view)
        assert 1 <= plan.token_budget <= view.max_tokens, plan
        return plan

    def predict(self, shape: StepShape) -> float | None:
        """Return the seconds that a step is expected to take; None before anything has been learnt."""
        return self.model.predict(shape) if self.model.ready else None

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        self.policy.observe(record)
