"""How a Python program or a command line names the scheduler, and what it then finds in the engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine

from tests.engine.real.engines import SETTINGS, RealEngine, buildable_after_numba, prompt
from vllm_sarathi import SarathiConfig, SarathiScheduler

pytestmark = pytest.mark.slow


@contextmanager
def closing(llm: LLM) -> Iterator[LLM]:
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def scheduler_of(engine: LLMEngine) -> Any:
    return engine.engine_core.engine_core.scheduler


def build(model: Path, **options: Any) -> LLM:
    with buildable_after_numba():
        return LLM(str(model), **{**SETTINGS, **options})


def test_the_name_alone_finds_its_own_budget(tiny: Path) -> None:
    limits = {"max_model_len": 1024, "max_num_batched_tokens": 1024}

    def scene(engine: RealEngine) -> None:
        engine.add("stream", prompt(1, 20), max_tokens=60)
        engine.step(5)
        engine.add("long", prompt(0, 900))

    with closing(build(tiny, scheduler_cls="vllm_sarathi.SarathiScheduler", **limits)) as llm:
        engine = RealEngine(llm, budget=1024)
        run = engine.play(scene)
    assert type(engine.scheduler) is SarathiScheduler
    assert run.steps[0].scheduled == {"stream": 20}  # nothing decodes: nothing to hold back for
    beside = next(step for step in run.steps if "long" in step.scheduled)
    assert beside.scheduled["stream"] == 1
    assert run.chunks("long") > 1


def test_the_class_itself_may_be_named(tiny: Path) -> None:
    with closing(build(tiny, scheduler_cls=SarathiScheduler)) as llm:
        assert type(scheduler_of(llm.llm_engine)) is SarathiScheduler


def test_generate_answers_as_without_us(tiny: Path) -> None:
    prompts = ["a", "many words " * 20, "some words " * 5]
    answers = []
    for options in ({}, SarathiConfig(token_budget=20).engine_args()):
        with closing(build(tiny, **options)) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)
            answers.append([output.outputs[0].text for output in outputs])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], Scheduler),
        (["--scheduler", "default"], Scheduler),
        (["--scheduler", "sarathi", "--token-budget", "32"], SarathiScheduler),
    ],
    ids=["no flag", "default", "sarathi"],
)
def test_the_flag_decides_whose_scheduler_is_in_the_engine(
    tiny: Path, flags: list[str], expected: type
) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--num-gpu-blocks-override=16"]
    args = EngineArgs.from_cli_args(parser.parse_args([f"--model={tiny}", *words, *flags]))
    with buildable_after_numba():
        engine = LLMEngine.from_engine_args(args)
    try:
        scheduler = scheduler_of(engine)
        assert type(scheduler) is expected
        if expected is Scheduler:
            ours = [name for name, value in vars(scheduler).items() if is_ours(value)]
            assert not ours
            assert engine.vllm_config.scheduler_config.scheduler_cls is None
            assert engine.vllm_config.additional_config == {}
            assert not is_ours(Scheduler.schedule)
            assert not is_ours(Scheduler.update_from_output)
    finally:
        engine.engine_core.shutdown()


def is_ours(value: object) -> bool:
    """True for an object of a class of ours, or a function of ours."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.startswith("vllm_sarathi")
