"""The ablation without hybrid batches (Sarathi-Serve, arXiv 2403.02310, section 5.4): chunks and decodes in turn."""

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline, decodes_only
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline, Reason, StepPlan, StepView

CHUNK_TOKENS = 512
"""The paper's strict budget, where no token budget is given."""


class ChunkedOnly(Baseline):
    """A step of chunks, then a step of decodes."""

    waiting_seen = 1

    def __init__(self, config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> None:
        super().__init__(config, model, pipeline)
        self._most_tokens = config.token_budget or CHUNK_TOKENS
        self._decodes_next = False

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        prompts = bool(view.prefills or view.waiting)
        if view.decodes and (self._decodes_next or not prompts):
            self._decodes_next = False
            return decodes_only(view)
        self._decodes_next = True
        return turn.plan(view, self.room(view, turn.prompts(view)), Reason.CHUNK, decodes=False)


make = ChunkedOnly
