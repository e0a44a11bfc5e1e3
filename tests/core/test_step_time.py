"""The step-time model against devices whose truth is known, and against a slow twin."""

import itertools
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from tests.core.devices import roofline
from vllm_sarathi.core.steptime.drift import FASTER_STEPS, SLOWER_STEPS, DriftDetector
from vllm_sarathi.core.steptime.features import SCALES, SIZE, features, numbers
from vllm_sarathi.core.steptime.margin import MISSES_PLANNED, Margin
from vllm_sarathi.core.steptime.model import FORGETTING, KEPT_STEPS, PRIOR_STEPS, StepTimeModel
from vllm_sarathi.core.steptime.nonnegative import nonnegative_least_squares
from vllm_sarathi.core.types import StepShape, chunk_work


def random_shape(rng: random.Random) -> StepShape:
    decodes, chunk = rng.randint(1, 32), rng.choice([0, 0, 16, 40, 100, 250, 600])
    return StepShape(
        tokens=decodes + chunk,
        decodes=decodes,
        decode_context_tokens=decodes * rng.randint(50, 1500),
        prefill_work=chunk_work(rng.randint(0, 3000), chunk),
        sequences=decodes + (chunk > 0),
    )


def learn(model: StepTimeModel, device: Any, steps: int, seed: int = 0, noise: float = 0.0) -> list[float]:
    """Let the model learn; return the relative errors of its predictions, each made before its step."""
    rng, errors = random.Random(seed), []
    for _ in range(steps):
        shape = random_shape(rng)
        errors.append(abs(model.predict(shape) / device(shape) - 1))
        model.observe(shape, device(shape) * (1 + noise * rng.gauss(0, 1)))
    return errors


def test_a_roofline_is_learnt_within_200_steps() -> None:
    errors = sorted(learn(StepTimeModel(), roofline(), 300)[200:])
    assert errors[50] <= 0.02
    assert errors[90] <= 0.06


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_a_device_that_changes_is_learnt_anew(speed: float) -> None:
    model = StepTimeModel()
    learn(model, roofline(), 400)
    errors = sorted(learn(model, roofline(speed), 200, seed=1)[100:])
    assert errors[50] <= 0.03


def test_what_decodes_alone_take_is_learnt_where_nothing_else_is_done() -> None:
    model, shape = StepTimeModel(), StepShape(32, 32, 40_000, 0.0, 32)
    learn(model, roofline(), 400)
    for _ in range(200):  # too little of a change to be taken for another device
        model.observe(shape, 1.1 * roofline()(shape))
    assert model.predict(shape) == pytest.approx(1.1 * roofline()(shape), rel=0.03)


def test_the_online_fit_follows_its_slow_twin() -> None:
    model, rng, device = StepTimeModel(), random.Random(3), roofline()
    rows, targets = [], []
    for step in range(120):
        shape = random_shape(rng)
        unit = max(model.predict(shape), 0.5 * device(shape))
        model.observe(shape, device(shape))
        rows.append(features([numbers(shape)])[0] * SCALES / unit)
        targets.append(device(shape) / unit)
        if step in (20, 60, 119):
            weights = np.sqrt(FORGETTING ** np.arange(step, -1, -1.0))
            twin = lsq_linear(np.array(rows) * weights[:, None], np.array(targets) * weights, (0, np.inf)).x
            predicted = features([numbers(random_shape(rng)) for _ in range(50)]) @ (twin * SCALES)
            rng_again = random.Random(3)
            assert all(math.isfinite(x) for x in predicted)
            shapes = [random_shape(rng_again) for _ in range(step)]
            ours = np.array([model.predict(s) for s in shapes])
            theirs = features([numbers(s) for s in shapes]) @ (twin * SCALES)
            # The online fit weighs a surprise in a familiar kind of step less, so the two agree, not coincide.
            assert np.median(np.abs(ours / theirs - 1)) < 0.02


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_the_nonnegative_solver_finds_the_optimum(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(size + 3, size))
    a, b = m.T @ m + 1e-6 * np.eye(size), rng.normal(size=size)
    u = nonnegative_least_squares(a, b, rng.random(size) > 0.5)
    gradient = a @ u - b
    assert (u >= 0).all()
    assert (gradient >= -1e-6).all()
    assert abs(float(u @ gradient)) < 1e-6


def test_coefficients_are_physical_and_predictions_rise_with_tokens() -> None:
    model = StepTimeModel()
    learn(model, roofline(), 300, noise=0.2)
    assert all(c >= 0 for c in model.coefficients)
    times = [model.seconds(n, 8, 4000, 0.0, 9) for n in range(8, 3000, 7)]
    assert all(a <= b for a, b in itertools.pairwise(times))


def test_outliers_hardly_move_it() -> None:
    model, rng, device = StepTimeModel(), random.Random(5), roofline()
    learn(model, device, 200)
    for i in range(300):
        shape = random_shape(rng)
        model.observe(shape, device(shape) * (20 if i % 100 == 50 else 1))
    errors = sorted(learn(model, device, 100, seed=9))
    assert errors[50] < 0.03
    assert model.margin < 1.3


@pytest.mark.parametrize("clock", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_broken_clock_teaches_nothing(clock: float) -> None:
    model = StepTimeModel()
    learn(model, roofline(), 50)
    before = model.coefficients
    for _ in range(10):
        model.observe(random_shape(random.Random(1)), clock)
    assert model.coefficients == before


def test_the_margin_covers_the_attainment_over_noisy_steps_and_little_more() -> None:
    model, rng, device = StepTimeModel(), random.Random(7), roofline()
    learn(model, device, 300, noise=0.1)
    over = 0
    for _ in range(2000):
        shape = random_shape(rng)
        seconds = device(shape) * (1 + 0.1 * rng.gauss(0, 1))
        over += seconds > model.predict(shape) * model.margin
        model.observe(shape, seconds)
    assert 0.1 * MISSES_PLANNED * 0.01 < over / 2000 < 0.01
    assert 0.07 < model.relative_error < 0.14


def test_what_was_learnt_is_a_prior_after_a_restart() -> None:
    model, device = StepTimeModel(), roofline()
    learn(model, device, 300)
    again = StepTimeModel()
    again.load(json.loads(json.dumps(model.to_mapping())))
    assert sorted(learn(again, device, 30, seed=2))[15] < 0.05


@pytest.mark.parametrize(
    "change",
    [
        {"knots": [0]},
        {"a": [[1.0]]},
        {"b": [float("nan")] * SIZE},
        {"weight": 0},
        {"spread": float("nan")},
        {"a": np.diag([-1.0] + [1.0] * (SIZE - 1)).tolist()},
        {"a": np.triu(np.ones((SIZE, SIZE))).tolist()},
        {"b": [-1.0] * SIZE},
        {"kinds": []},
    ],
)
def test_a_foreign_memory_is_refused(change: dict[str, Any]) -> None:
    model = StepTimeModel()
    learn(model, roofline(), 30)
    values = model.to_mapping()
    if change.keys() <= values.keys():
        values |= change
    else:
        values["kinds"][0] |= change
    with pytest.raises(ValueError):
        StepTimeModel().load(values)


def test_a_prior_is_not_ready_before_it_could_have_failed() -> None:
    model, again = StepTimeModel(), StepTimeModel()
    learn(model, roofline(), 300)
    again.load(model.to_mapping())
    readiness = []
    for seed in range(SLOWER_STEPS + 1):
        readiness.append(again.ready)
        learn(again, roofline(), 1, seed)
    assert readiness == [False] * SLOWER_STEPS + [True]


def test_memories_of_memories_do_not_grow_heavier() -> None:
    model = StepTimeModel()
    learn(model, roofline(), 300)
    for seed in range(5):
        again = StepTimeModel()
        again.load(model.to_mapping())
        learn(again, roofline(), 3, seed)
        model = again
    assert max(kind["weight"] for kind in model.to_mapping()["kinds"]) < PRIOR_STEPS + 4


def test_absorbing_several_steps_at_once_is_absorbing_them_one_by_one() -> None:
    at_once, one_by_one, rng = StepTimeModel(), StepTimeModel(), random.Random(5)
    for step in range(203):
        # The device becomes three times slower between two solutions.
        shape = StepShape(rng.randrange(20, 600), 8, 4000, rng.random() * 1e6, 9)
        seconds = roofline(1.0 if step < 150 else 1 / 3)(shape) * rng.uniform(0.97, 1.03)
        for model in (at_once, one_by_one):
            model.observe(shape, seconds)
        one_by_one.to_mapping()
    ours, twin = at_once.to_mapping(), one_by_one.to_mapping()
    for mine, its in zip(ours["kinds"], twin["kinds"], strict=True):
        assert mine["kind"] == its["kind"]
        np.testing.assert_allclose(mine["a"], its["a"], rtol=0.02)
        np.testing.assert_allclose(mine["b"], its["b"], rtol=0.02)


def test_misses_that_come_a_dozen_steps_apart_raise_the_margin() -> None:
    model, rng = StepTimeModel(), random.Random(0)

    def step(late: float) -> None:
        shape = StepShape(200 + rng.randrange(60), 8, 4000, 20_000.0, 9)
        model.observe(shape, (0.03 + shape.tokens / 2000) * rng.gauss(1.0, 0.01) * late)

    for _ in range(400):
        step(1.0)
    before = model.margin
    for i in range(60):
        step(1.12 if i % 12 == 0 else 1.0)
    assert model.margin > before + 0.04


def test_a_kind_of_step_is_not_forgotten_by_seeing_others() -> None:
    model, device = StepTimeModel(), roofline()
    learn(model, device, 300)
    alone = StepShape(8, 8, 4000, 0.0, 8)
    for _ in range(5000):
        model.observe(alone, device(alone))
    hybrid = StepShape(264, 8, 4000, chunk_work(0, 256), 9)
    assert model.predict(hybrid) == pytest.approx(device(hybrid), rel=0.05)
    assert min(kind["weight"] for kind in model.to_mapping()["kinds"]) <= KEPT_STEPS
    assert _hybrid_weight(model) == pytest.approx(KEPT_STEPS, rel=0.1)


def _hybrid_weight(model: StepTimeModel) -> float:
    """The weight of the kind of hybrid steps that most is known of."""
    return max(kind["weight"] for kind in model.to_mapping()["kinds"] if kind["kind"][1] == 1)


@pytest.mark.parametrize("prompt_tokens", [17, 60, 300, 700, 2000])
def test_the_first_decodes_of_a_cold_start_do_not_tell_that_the_device_became_slower(
    prompt_tokens: int,
) -> None:
    """One client: its prompt is read alone, then it decodes. What decodes alone take was not known before."""

    def took_s(shape: StepShape) -> float:
        return 0.02 + 0.0004 * shape.tokens + 0.0006 * shape.decodes

    model = StepTimeModel()
    first = StepShape(prompt_tokens, 0, 0, chunk_work(0, prompt_tokens), 1)
    model.observe(first, took_s(first))
    decode = StepShape(1, 1, prompt_tokens, 0.0, 1)
    for _ in range(200):
        model.observe(decode, took_s(decode))
    assert model.predict(first) == pytest.approx(took_s(first), rel=0.1)
    hybrid = StepShape(301, 1, prompt_tokens, chunk_work(0, 300), 2)
    assert took_s(hybrid) * 0.5 < model.predict(hybrid) < took_s(hybrid) * 2.5


def test_what_prompts_cost_outlives_a_night_in_which_decodes_become_slower_and_faster() -> None:
    model, device = StepTimeModel(), roofline()
    learn(model, device, 300)
    alone = StepShape(8, 8, 4000, 0.0, 8)
    for cycle in range(40):
        for _ in range(700):
            model.observe(alone, device(alone) * (1.6 if cycle % 2 else 1.0))
    for _ in range(700):
        model.observe(alone, device(alone))
    hybrid = StepShape(264, 8, 4000, chunk_work(0, 256), 9)
    assert _hybrid_weight(model) >= 0.9 * KEPT_STEPS
    # Never shorter than it takes; and no longer than it takes with whoever slowed the decodes down.
    assert 0.97 * device(hybrid) <= model.predict(hybrid) <= 1.05 * 1.6 * device(hybrid)


def test_decodes_that_become_faster_say_nothing_of_prompts() -> None:
    model, device = StepTimeModel(), roofline()
    learn(model, device, 300)
    alone = StepShape(8, 8, 4000, 0.0, 8)
    for _ in range(700):
        model.observe(alone, device(alone) / 2)
    hybrid = StepShape(264, 8, 4000, chunk_work(0, 256), 9)
    assert model.predict(hybrid) >= 0.9 * device(hybrid)


def test_after_a_long_time_without_prompts_the_margin_is_wider() -> None:
    model, device = StepTimeModel(), roofline()
    learn(model, device, 600)
    before = model.margin
    alone = StepShape(8, 8, 4000, 0.0, 8)
    for _ in range(1000):
        model.observe(alone, device(alone))
    assert model.margin >= before + 0.1
    learn(model, device, 60, seed=1)
    assert model.margin <= before + 0.02


def test_a_curve_that_is_concave_first_and_then_straight_is_learnt() -> None:
    def mixture(shape: StepShape) -> float:
        """Experts wake up with the first tokens; each further one costs the same."""
        return 0.004 + 0.02 * (1 - math.exp(-shape.tokens / 60)) + 2e-5 * shape.tokens

    model = StepTimeModel()
    learn(model, mixture, 300)
    for tokens in (20, 50, 100, 200, 500):
        shape = StepShape(tokens, 16, 8000, chunk_work(0, tokens - 16), 17)
        assert model.predict(shape) == pytest.approx(mixture(shape), rel=0.06)


def test_a_neighbour_that_comes_and_goes_leaves_the_device_as_slow_as_it_is_with_him() -> None:
    model, rng, device = StepTimeModel(), random.Random(2), roofline()
    learn(model, device, 300)
    late = []
    for step in range(3000):
        shape = random_shape(rng)
        seconds = device(shape) * (1.6 if step // 40 % 2 else 1.0)
        if step > 1500 and shape.sequences > shape.decodes:
            late.append(seconds > model.predict(shape) * model.margin)
        model.observe(shape, seconds)
    assert sum(late) / len(late) <= 0.02


def test_noise_between_two_prompts_does_not_add_up() -> None:
    model, rng, device = StepTimeModel(), random.Random(4), roofline()
    learn(model, device, 400, noise=0.03)
    alone, short = StepShape(8, 8, 4000, 0.0, 8), StepShape(48, 8, 4000, chunk_work(0, 40), 9)
    long = StepShape(608, 8, 4000, chunk_work(0, 600), 9)  # not seen again
    before = model.predict(long)
    for _ in range(60):
        for _ in range(130):
            model.observe(alone, device(alone) * (1 + 0.03 * rng.gauss(0, 1)))
        model.observe(short, device(short) * (1 + 0.03 * rng.gauss(0, 1)))
    learn(model, device, 8, noise=0.03)  # so that it is solved for
    assert model.predict(long) == pytest.approx(before, rel=0.05)


def test_a_device_that_became_slower_between_two_prompts_stays_so() -> None:
    model, device = StepTimeModel(), roofline(0.6)
    learn(model, roofline(), 400)
    alone, short = StepShape(8, 8, 4000, 0.0, 8), StepShape(48, 8, 4000, chunk_work(0, 40), 9)
    long = StepShape(608, 8, 4000, chunk_work(0, 600), 9)
    for _ in range(200):
        model.observe(alone, device(alone))
    for _ in range(8):
        model.observe(short, device(short))
    assert model.predict(long) == pytest.approx(device(long), rel=0.1)


def test_decodes_alone_are_not_held_slower_each_time_that_a_neighbour_comes() -> None:
    model, rng, device = StepTimeModel(), random.Random(8), roofline()
    learn(model, device, 400)
    alone = StepShape(8, 8, 4000, 0.0, 8)
    for cycle in range(12):
        for _ in range(100):
            chunk = rng.choice((100, 250, 600))
            shape = StepShape(8 + chunk, 8, 4000, chunk_work(0, chunk), 9)
            model.observe(shape, device(shape) * (1.5 if cycle % 2 else 1.0))
    assert 0.9 * device(alone) <= model.predict(alone) <= 1.6 * device(alone)


def test_while_a_neighbour_is_away_the_device_counts_as_slow_as_beside_him() -> None:
    model, rng, device = StepTimeModel(), random.Random(9), roofline()
    learn(model, device, 400)
    shape = StepShape(258, 8, 4000, chunk_work(0, 250), 9)
    for cycle in range(16):
        for _ in range(30):
            slowness = 1.0 if cycle % 2 else 1.6
            model.observe(shape, device(shape) * slowness * (1 + 0.01 * rng.gauss(0, 1)))
    assert model.predict(shape) == pytest.approx(1.6 * device(shape), rel=0.05)
    assert model.margin <= 1.2


def test_what_was_only_assumed_to_be_slower_is_taken_back_by_a_few_steps() -> None:
    model, device = StepTimeModel(), roofline()
    learn(model, device, 400)
    alone, hybrid = StepShape(8, 8, 4000, 0.0, 8), StepShape(258, 8, 4000, chunk_work(0, 250), 9)
    for _ in range(12):  # prefill alone has become slower
        model.observe(hybrid, 1.6 * device(hybrid))
    assert model.predict(alone) >= 1.3 * device(alone)
    for _ in range(4):
        model.observe(alone, device(alone))
    assert model.predict(alone) <= 1.1 * device(alone)


def test_two_pauses_among_many_steps_do_not_widen_the_margin_and_many_do() -> None:
    shape = StepShape(608, 8, 4000, chunk_work(0, 600), 9)
    factors = []
    for every in (120, 20):
        margin, rng = Margin(), random.Random(6)
        for step in range(400):
            margin.observe(
                shape, 0.1, (2.0 if step % every == 7 else 1.0) * (1 + 0.01 * rng.gauss(0, 1)), True
            )
        margin.renew()
        factors.append(margin.factor)
    assert factors[0] <= 1.08
    assert factors[1] >= 1.5


def test_a_device_in_one_of_two_states_has_the_margin_of_the_slower() -> None:
    margin, rng = Margin(), random.Random(6)
    shape = StepShape(608, 8, 4000, chunk_work(0, 600), 9)
    for _ in range(400):
        margin.observe(shape, 0.1, rng.choice((0.93, 1.07)) * (1 + 0.003 * rng.gauss(0, 1)), True)
    margin.renew()
    assert 1.07 <= margin.factor <= 1.11


def test_a_slowness_that_comes_back_is_in_the_prediction_and_not_in_the_margin_as_well() -> None:
    detector = DriftDetector()
    for ratio, steps in ((1.6, SLOWER_STEPS), (0.6, FASTER_STEPS), (1.6, SLOWER_STEPS)):
        changes = [detector.look(ratio) for _ in range(steps)]
        assert changes[-1] == ratio
        assert detector.change_steps == steps
