"""StepController: the one place that decides a step, in the live engine, in the simulator and in tests."""

import importlib
import math
from dataclasses import replace

from vllm_sarathi.core.classes import AskedSlo, Bond
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.gate import Gate
from vllm_sarathi.core.order import make_order
from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.order.classes import ClassOrder
from vllm_sarathi.core.policies import POLICIES
from vllm_sarathi.core.policy import Policy, PolicyMaker
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import ONE_STAGE, Pipeline, StepPlan, StepRecord, StepShape, StepView

NOBODY = Turn(())


def _make_policy(config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> Policy:
    make: PolicyMaker = importlib.import_module(POLICIES[config.scheduler]).make
    return make(config, model, pipeline)


class StepController:
    """Answers each StepView with a StepPlan, and learns from each StepRecord.

    Args:
        config: the settings.
        pipeline: the stages of the device.

    Attributes:
        gate: tells which SLOs can be kept, where there are classes; else None.
        relegated: the requests of the step planned last whose SLO cannot be kept any more, and that give way for it.
    """

    def __init__(self, config: SarathiConfig, pipeline: Pipeline = ONE_STAGE) -> None:
        self.config = config
        self.pipeline = pipeline
        self.model = StepTimeModel()
        self.policy = _make_policy(config, self.model, pipeline)
        self.order = make_order(config, self.model, pipeline)
        self.gate: Gate | None = None
        if isinstance(self.order, ClassOrder):
            self.gate = Gate(self.order.pace, self.order.pace_alone)
        self.relegated: frozenset[str] = frozenset()

    def reconfigure(self, config: SarathiConfig) -> None:
        """Go on with other settings; what was learnt of the device and of the requests stays.

        Args:
            config: all of the settings, valid as they are.
        """
        policy = _make_policy(config, self.model, self.pipeline)
        policy.take_over(self.policy)
        self.config, self.policy = config, policy
        if isinstance(self.order, ClassOrder):  # it keeps whose turn it is, and the gate whom it has let in
            self.order.reconfigure(config)
        else:
            self.order = make_order(config, self.model, self.pipeline)

    @property
    def tbt_slo_s(self) -> float | None:
        """The time-between-tokens SLO, seconds; None where there is none, or none is known yet."""
        return self.policy.tbt_slo_s

    def plan(self, view: StepView) -> StepPlan:
        """Decide the next step; the answer is always within the engine's limits."""
        policy, order, turn = self.policy, self.order, NOBODY
        self.relegated = frozenset()
        prompts = view.prefills or view.waiting or view.unseen_waiting
        if prompts:
            turn = order.turn(view)
            if isinstance(order, ClassOrder):
                self.relegated = order.relegated
            policy.longest_step_s = (
                math.inf if view.closed else order.longest_step_s(policy.decode_step_s, policy.tbt_slo_s)
            )
        plan = policy.plan(view, turn)
        assert 1 <= plan.token_budget <= view.max_tokens, plan
        if prompts:
            order.planned(plan.token_budget - view.decode_tokens)
        return plan

    def predict(self, shape: StepShape) -> float | None:
        """Return the seconds that a step is expected to take; None before anything has been learnt."""
        return self.model.predict(shape) if self.model.ready else None

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        self.policy.observe(record)
        self.order.observe(record)

    def bind(self, slo: AskedSlo, tokens: int) -> Bond:
        """Return what a new request is bound to, and charge its tenant for the tokens that are to be prefilled.

        Args:
            slo: what it asks for.
            tokens: of its prompt.
        """
        assert self.config.slo_classes is not None
        assert isinstance(self.order, ClassOrder)
        bond = slo.bind(self.config.slo_classes)
        assert bond.slo_class is not None
        return replace(bond, tag=self.order.tag(bond.slo_class, bond.tenant, tokens))

    def claims(self, bond: Bond) -> bool:
        """True for a request that others of its class may not pass while it waits for room."""
        return isinstance(self.order, ClassOrder) and self.order.claims(bond)

    def gives_way(self, request_id: str) -> bool:
        """True for a running request of batch work that may be preempted for those who go before it."""
        return isinstance(self.order, ClassOrder) and self.order.gives_way(request_id)

    def arrived(self, request_id: str, most_answer_tokens: int) -> None:
        """Note a request, and how long its answer may become."""
        self.policy.arrived(request_id, most_answer_tokens)

    def ended(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Learn from a request that has ended."""
        self.policy.ended(request_id, prompt_tokens, answer_tokens)
        if isinstance(self.order, ClassOrder):
            self.order.ended(request_id)
