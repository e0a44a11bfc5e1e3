"""Who takes part in the live benchmark: schedulers by name, with a fixed budget where the name ends in @N."""

from dataclasses import dataclass

from vllm_sarathi.benchmark.live.scale import AS_WRITTEN, Scale
from vllm_sarathi.benchmark.live.server import MAX_NUM_SEQS
from vllm_sarathi.core.config import NO_CALIBRATION, STOCK_SCHEDULER, ConfigError, nearest_hint
from vllm_sarathi.core.spec import SchedulerSpec

OURS = "sarathi"
DEADLINE = "sarathi-deadline"
"""Ours with `--prefill-order deadline` and `--ttft-slo-ms`."""
SHORTEST = "sarathi-sjf"
"""Ours with `--prefill-order sjf`."""

NAMES = (OURS, DEADLINE, SHORTEST, STOCK_SCHEDULER)
STATIC_BUDGETS = (64, 96, 160, 256, 448)
"""The sweep of stock vLLM, tokens per step: what fits beside the decodes in 150, 250 and 500 ms lies in between."""
QUICK_BUDGETS = (96, 160)


@dataclass(frozen=True)
class Contender:
    """A scheduler in the benchmark.

    Attributes:
        label: as `--schedulers` takes it, `sarathi` or `default@80`.
        name: the scheduler, one of NAMES.
        token_budget: its fixed budget; None where it has none (ours) or vLLM's own default (stock).
    """

    label: str
    name: str
    token_budget: int | None

    @property
    def is_stock(self) -> bool:
        """True for vLLM's own scheduler."""
        return self.name == STOCK_SCHEDULER

    @property
    def knows_slo(self) -> bool:
        """True where the SLO changes what it does; the others run once and are judged by each SLO."""
        return not self.is_stock and self.token_budget is None

    def flags(self, tbt_slo_ms: float, ttft_slo_ms: float) -> list[str]:
        """Its flags of `vllm serve`."""
        if self.is_stock:
            budget = [] if self.token_budget is None else ["--max-num-batched-tokens", str(self.token_budget)]
            return ["--scheduler", STOCK_SCHEDULER, *budget]
        flags = ["--scheduler", "sarathi"]
        if self.token_budget is not None:
            return [*flags, "--token-budget", str(self.token_budget)]
        # What an earlier run has learnt of this machine would be a head start that a new user does not have.
        flags += ["--tbt-slo-ms", f"{tbt_slo_ms:g}", "--calibration-dir", NO_CALIBRATION]
        if self.name == DEADLINE:
            flags += ["--prefill-order", "deadline", "--ttft-slo-ms", f"{ttft_slo_ms:g}"]
        elif self.name == SHORTEST:
            flags += ["--prefill-order", "sjf"]
        return flags


def parse_contender(label: str) -> Contender:
    """Return the contender that `label` names.

    Raises:
        ConfigError: no such scheduler, or a budget that it cannot have.
    """
    name, budget = SchedulerSpec.parse(label)
    if name not in NAMES:
        raise ConfigError(f"--schedulers {label!r}: unknown scheduler; {nearest_hint(name, NAMES)}")
    if budget is None:
        return Contender(label, name, None)
    if name in (DEADLINE, SHORTEST):
        raise ConfigError(f"--schedulers {label!r}: {name} follows its SLOs and takes no fixed budget.")
    if name == STOCK_SCHEDULER and budget < MAX_NUM_SEQS:  # vLLM refuses one below its number of sequences
        raise ConfigError(
            f"--schedulers {label!r}: the budget after '@' must be at least {MAX_NUM_SEQS} tokens."
        )
    return Contender(label, name, budget)


def parse_contenders(labels: str) -> list[Contender]:
    """Return the contenders in a list with commas; each once.

    Raises:
        ConfigError: as parse_contender; or nobody is named.
    """
    named = dict.fromkeys(label.strip() for label in labels.split(",") if label.strip())
    if not named:
        raise ConfigError(
            f"--schedulers {labels!r}: names no scheduler; valid: {', '.join(NAMES)}, or NAME@N."
        )
    return [parse_contender(label) for label in named]


def default_contenders(quick: bool, scale: Scale = AS_WRITTEN) -> list[Contender]:
    """Ours, stock, and the sweep of stock; `quick` sweeps less.

    The sweep is of the budgets whose steps take the same shares of an SLO as on the reference device. A slower or
    faster device needs none other: what takes 250 ms there takes the SLO that 250 ms are scaled to. Only where
    prompts are longer are budgets, in the same proportion.
    """
    budgets = [scale.budget(tokens) for tokens in (QUICK_BUDGETS if quick else STATIC_BUDGETS)]
    return parse_contenders(
        ",".join([OURS, DEADLINE, STOCK_SCHEDULER, *(f"{STOCK_SCHEDULER}@{budget}" for budget in budgets)])
    )
