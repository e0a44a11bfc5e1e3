"""What the step-time model knows: it forgets nothing, and the shapes of devices are not only convex."""

import math
import random
from dataclasses import dataclass

import pytest

from tests.engine.cases.conftest import SLO_S, MakeEngine, warm_up
from tests.engine.virtual import LinearDevice, VirtualEngine, Work, share_kept
from vllm_sarathi import SarathiConfig

GAP_OVER_SLO = 1.05

# --- A quiet night: decodes alone for long, then a long prompt ---

NIGHT = LinearDevice(token_s=0.0008, context_token_s=1e-8)
CHATS = 4


def night(
    make_engine: MakeEngine, sarathi: SarathiConfig | None, steps: int, **engine_args: int
) -> VirtualEngine:
    """Live a day of prompts beside four chats and a night of decodes alone; then a prompt of 6,000 tokens comes."""
    engine = make_engine(
        sarathi, NIGHT, num_blocks=40_000, max_model_len=1 << 18, max_num_seqs=16, **engine_args
    )
    for number in range(CHATS):
        engine.add(f"chat{number}", 40, max_tokens=200_000)
    engine.keep_steps = False
    warm_up(engine, prompts=40)
    engine.run(steps)
    engine.add("long", 6000, max_tokens=5)
    engine.run_until_answered("long", most_s=200)
    return engine


@pytest.mark.parametrize("slo_ms", [150.0, None], ids=["150ms", "auto"])
@pytest.mark.parametrize("steps", [0, 500, 3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_decodes_alone_do_not_make_the_model_forget(
    make_engine: MakeEngine, steps: int, slo_ms: float | None
) -> None:
    ours = night(make_engine, SarathiConfig(tbt_slo_ms=slo_ms, calibration_dir="none"), steps)
    context = sum(r.num_computed_tokens for r in ours.scheduler.running if r.request_id.startswith("chat"))
    slo_s = slo_ms / 1e3 if slo_ms else 5 * NIGHT(Work(CHATS, CHATS, context, 0.0, 0))
    worst_s = max(ours.gaps_s(ours.arrived_s["long"], "chat"))
    assert worst_s <= GAP_OVER_SLO * slo_s, f"worst gap of {worst_s:.3f} s for an SLO of {slo_s:.3f} s"
    # And it reads: as fast as the largest fixed budget that keeps the SLO.
    budget = int((slo_s - NIGHT(Work(CHATS, CHATS, context, 0.0, 0))) / NIGHT.token_s) + CHATS
    stock = night(make_engine, None, 0, max_num_batched_tokens=budget)
    assert ours.ttft_s("long") <= 1.2 * stock.ttft_s("long")


# --- Prompts that cost a fixed time, near the SLO ---


@dataclass(frozen=True)
class FixedCostDevice:
    """Any prefill costs 12 ms besides its tokens, as where kernels change."""

    prefill_s: float = 0.012

    def __call__(self, work: Work) -> float:
        return LinearDevice()(work) + (self.prefill_s if work.prefill_tokens else 0.0)


@pytest.mark.parametrize("max_wait_s", [5.0, 30.0])
@pytest.mark.parametrize("order", ["fcfs", "deadline"])
@pytest.mark.parametrize("over_decodes", [1.1, 1.3])
def test_neither_prompts_nor_gaps_starve_just_above_what_decodes_take(
    make_engine: MakeEngine, over_decodes: float, order: str, max_wait_s: float
) -> None:
    """The SLO is just above a step of decodes, and below any step that reads: the few gaps that give way are enough."""
    device = FixedCostDevice()
    slo_s = over_decodes * device(Work(8, 8, 8 * 500, 0.0, 0))
    sarathi = SarathiConfig(
        tbt_slo_ms=slo_s * 1e3, prefill_order=order, prefill_max_wait_s=max_wait_s, calibration_dir="none"
    )

    def serve(config: SarathiConfig | None) -> tuple[float, float]:
        """Return the worst TTFT and the share of gaps that keep the SLO."""
        engine = make_engine(config, device)
        for number in range(8):
            engine.add(f"chat{number}", 40, max_tokens=8000)
        engine.run(100)
        start_s, names = engine.now_s, [f"p{number}" for number in range(5)]
        for name in names:
            engine.add(name, 500, max_tokens=2)
            engine.run_to(engine.now_s + 20)
        engine.run_until_answered(*names, most_s=100)
        return max(engine.ttft_s(name) for name in names), share_kept(engine.gaps_s(start_s, "chat"), slo_s)

    ours_s, kept = serve(sarathi)
    stock_s, _ = serve(None)
    assert kept >= 0.99, f"{kept:.1%} of the gaps kept, worst TTFT {ours_s:.1f} s"
    # Once it has waited so long, it is read within as few seconds as 1% of the gaps allow.
    assert ours_s <= max_wait_s + 10 * stock_s, f"worst TTFT {ours_s:.1f} s, {kept:.1%} of the gaps kept"


# --- A mixture of experts: concave where each token wakes another expert ---


@dataclass(frozen=True)
class MixtureDevice:
    """Seconds of a step of a mixture of experts: the weights of those that are awake, then the tokens."""

    step_s: float = 0.006
    experts_s: float = 0.012
    awake_tokens: float = 96.0
    token_s: float = 2e-5
    context_token_s: float = 4e-8

    def __call__(self, work: Work) -> float:
        awake = 1 - math.exp(-work.tokens / self.awake_tokens)
        return (
            self.step_s
            + self.experts_s * awake
            + self.token_s * work.tokens
            + self.context_token_s * work.context_tokens
        )


def chat_load(engine: VirtualEngine, rate: float, seed: int, requests: int = 150) -> None:
    """Serve chats that come at this rate: prompts of about 1,000 tokens, answers of about 150."""
    rng = random.Random(seed)
    at_s, arrivals = engine.now_s, []
    for number in range(requests):
        at_s += rng.expovariate(rate)
        arrivals.append((at_s, f"r{number}", rng.randrange(200, 1800), rng.randrange(50, 250)))
    for due_s, name, prompt, answer in arrivals:
        engine.run_to(due_s)
        engine.add(name, prompt, max_tokens=answer, arrival_s=due_s)
        engine.arrived_s[name] = due_s
    engine.run_until(lambda: len(engine.finished_s) == requests)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("rate", [6.0, 12.0])
def test_a_mixture_of_experts_is_read_as_fast_as_by_the_best_fixed_budget(
    make_engine: MakeEngine, rate: float, seed: int
) -> None:
    slo_s = 0.030

    def serve(config: SarathiConfig | None, budget: int = 2048) -> tuple[float, float]:
        """Return the share of gaps that keep the SLO and the mean TTFT."""
        engine = make_engine(
            config, MixtureDevice(), num_blocks=20_000, max_num_batched_tokens=budget, max_num_seqs=128
        )
        engine.keep_steps = False
        chat_load(engine, rate, seed)
        ttfts_s = [engine.ttft_s(name) for name in engine.arrived_s]
        return share_kept(engine.gaps_s(0.0), slo_s), sum(ttfts_s) / len(ttfts_s)

    fixed = {budget: serve(None, budget) for budget in (128, 192, 256, 384, 512, 768, 1024)}
    best_s = min(ttft_s for kept, ttft_s in fixed.values() if kept >= 0.99)
    kept, ttft_s = serve(SarathiConfig(tbt_slo_ms=slo_s * 1e3, calibration_dir="none"))
    assert kept >= 0.99, f"{kept:.2%} of the gaps kept; fixed budgets {fixed}"
    assert ttft_s <= 1.05 * best_s, f"mean TTFT {ttft_s:.3f} s; fixed budgets {fixed}"


# --- The default SLO follows the batch that decodes ---

CROWD = LinearDevice(step_s=0.0371, decode_s=0.0025)


def test_the_default_slo_follows_from_one_chat_to_many(make_engine: MakeEngine) -> None:
    """Five times a decode step: of the 49 chats that are there, not of the one that was there for long."""

    def crowd(config: SarathiConfig | None) -> VirtualEngine:
        engine = make_engine(config, CROWD, num_blocks=20_000)
        engine.keep_steps = False
        engine.add("chat", 40, max_tokens=6000)
        warm_up(engine)
        engine.run(3000)
        names = [f"chat{number}" for number in range(48)]
        for name in names:
            engine.add(name, 40, max_tokens=1000)
        engine.run_until_answered(*names)
        engine.run(20)
        engine.add("prompt", 1300, max_tokens=5)
        engine.run_until_answered("prompt")
        return engine

    ours, stock = crowd(SarathiConfig(calibration_dir="none")), crowd(None)
    context = sum(r.num_computed_tokens for r in ours.scheduler.running)
    slo_s = 5 * CROWD(Work(49, 49, context, 0.0, 0))
    worst_s = max(ours.gaps_s(ours.arrived_s["prompt"], "chat"))
    assert worst_s <= GAP_OVER_SLO * slo_s, f"worst gap {worst_s:.3f} s for an SLO of {slo_s:.3f} s"
    assert ours.ttft_s("prompt") <= 1.2 * stock.ttft_s("prompt")


def test_a_device_that_slows_down_is_noticed_within_a_few_gaps(make_engine: MakeEngine) -> None:
    """A stale prediction means a smaller step: three times slower from one step to the next."""
    slow = False

    def device(work: Work) -> float:
        return LinearDevice()(work) * (3.0 if slow else 1.0)

    engine = make_engine(
        SarathiConfig(tbt_slo_ms=SLO_S * 1e3, calibration_dir="none"), device, num_blocks=20_000
    )
    for number in range(4):
        engine.add(f"chat{number}", 40, max_tokens=4000)
    warm_up(engine)
    slow, start_s = True, engine.now_s
    for number in range(3):
        engine.add(f"p{number}", 3000, max_tokens=5)
    engine.run_until_answered("p0", "p1", "p2", most_s=100)
    gaps_s = engine.gaps_s(start_s, "chat0")
    assert sum(gap > SLO_S * GAP_OVER_SLO for gap in gaps_s) <= 4, [round(g, 3) for g in gaps_s if g > SLO_S]
    assert engine.ttft_s("p2") <= 60
