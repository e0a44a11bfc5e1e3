"""Whose prompt is prefilled first: `fcfs`, `sjf` or `deadline`, with any policy."""

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.order.arrival import ArrivalOrder
from vllm_sarathi.core.order.base import Order
from vllm_sarathi.core.order.classes import ClassOrder
from vllm_sarathi.core.order.deadline import DeadlineOrder
from vllm_sarathi.core.order.shortest import ShortestFirst
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline


def make_order(config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> Order:
    """Return the order that the settings name."""
    if config.slo_classes is not None:
        return ClassOrder(config, model, pipeline)
    if config.prefill_order == "deadline":
        return DeadlineOrder(config, model, pipeline)
    if config.prefill_order == "sjf":
        return ShortestFirst(config.prefill_max_wait_s)
    return ArrivalOrder()
