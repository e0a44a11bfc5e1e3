"""Another subclass of vLLM's scheduler beside ours: by the mixin, and by name."""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sarathi import SarathiConfig, SarathiMixin, SarathiScheduler
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.engine.composition import scheduler_base
from vllm_sarathi.testing.modelled import ModelledEngine

EXAMPLE = Path(__file__).parents[2] / "examples" / "beside_another_scheduler.py"
NAME = "beside_another_scheduler"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(NAME, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)
    return module


def tokens_of(config: Any, scheduler_cls: Any = None, in_flight: int = 1) -> tuple[dict[str, list[int]], Any]:
    engine = ModelledEngine(config, scheduler_cls=scheduler_cls, in_flight=in_flight)
    for i, length in enumerate((100, 7, 180, 30)):
        engine.add(f"r{i}", length, max_tokens=9)
    most = 0
    while not engine.idle():
        most = max(most, sum(engine.step().scheduled.values()))
    assert most <= 32
    assert engine.scheduler.faults.total == 0
    return engine.outputs, engine.scheduler


@pytest.mark.parametrize("way", ["mixin", "name"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_theirs_sees_each_step_that_ours_sizes(make_config: Any, example: Any, way: str, mode: str) -> None:
    if (way, mode) == ("mixin", "async"):
        pytest.skip("who composes by hand names the asynchronous parent by hand")
    in_flight = 2 if mode == "async" else 1
    ours = SarathiConfig(token_budget=32)
    expected, plain = tokens_of(make_config(ours, mode), in_flight=in_flight)
    if way == "mixin":
        answered, scheduler = tokens_of(make_config(ours, mode), example.Both)
    else:
        named = SarathiConfig(token_budget=32, scheduler_base=f"{NAME}.InstrumentedScheduler")
        answered, scheduler = tokens_of(make_config(named, mode), in_flight=in_flight)
        assert isinstance(scheduler, SarathiScheduler)
    assert answered == expected
    assert isinstance(scheduler, SarathiMixin)
    assert isinstance(scheduler, example.InstrumentedScheduler)
    assert isinstance(scheduler, AsyncScheduler) == (mode == "async")
    published = [step["tokens"] for step in scheduler.published if step["tokens"]]
    assert sum(published) == sum(map(len, expected.values())) + 100 + 7 + 180 + 30 - 4
    assert max(published) <= 32
    assert not isinstance(plain, example.InstrumentedScheduler)


def test_ours_comes_before_theirs_and_theirs_before_vllms(make_config: Any, example: Any) -> None:
    named = SarathiConfig(scheduler_base=f"{NAME}.InstrumentedScheduler")
    engine = ModelledEngine(make_config(named, "async"))
    order = type(engine.scheduler).__mro__
    places = [
        order.index(kind) for kind in (SarathiMixin, example.InstrumentedScheduler, AsyncScheduler, Scheduler)
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.at.All", "--scheduler-base 'nowhere.at.All': cannot be imported"),
        ("json.JSONDecoder", "must be a subclass of vllm.v1.core.sched.scheduler.Scheduler"),
        ("json.loads", "must be a subclass of"),
        ("json.nothing", "cannot be imported"),
    ],
)
def test_what_is_no_scheduler_is_refused(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scheduler_base(path, Scheduler)


@pytest.mark.parametrize("path", ["Scheduler", "a..b", "a.b c", "", 3])
def test_what_is_no_path_is_refused_at_once(path: Any) -> None:
    with pytest.raises(ConfigError, match="must be the dotted path of a class"):
        SarathiConfig(scheduler_base=path)


def test_a_config_is_not_changed_by_who_it_builds(make_config: Any, example: Any) -> None:
    config = make_config(SarathiConfig(scheduler_base=f"{NAME}.InstrumentedScheduler"))
    before = copy.copy(config.scheduler_config.scheduler_cls)
    ModelledEngine(config)
    assert config.scheduler_config.scheduler_cls == before
