"""`plan`: its pick against an exhaustive search, its bounds, what it prints, and what a mistake is told."""

import json
import random
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vllm_sarathi.benchmark.common import farm
from vllm_sarathi.benchmark.plan import load as plan_load
from vllm_sarathi.benchmark.plan import report as plan_report
from vllm_sarathi.benchmark.plan import search as benchmark
from vllm_sarathi.benchmark.plan.bounds import Bound, bound
from vllm_sarathi.benchmark.plan.load import Load, LoadAsked, load_of
from vllm_sarathi.benchmark.plan.prices import read_prices
from vllm_sarathi.benchmark.plan.search import Board, Candidate, Verdict, candidates_of, fewest, search
from vllm_sarathi.cli import app
from vllm_sarathi.core.config import CONFIG_KEY, ConfigError, config_from_additional
from vllm_sarathi.engine.vllm.internals import engine_args_class
from vllm_sarathi.simulation.devices.roofline import DEVICES
from vllm_sarathi.simulation.fleet.group import Here
from vllm_sarathi.simulation.model_limits import max_tokens_of
from vllm_sarathi.simulation.models import CHECKPOINTS, MODELS
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest


class Task:
    """One that is done."""

    def __init__(self, output: Any) -> None:
        self.output = output


class Inline:
    """Workers in this process."""

    count = 1

    def submit(self, function: Any, value: Any) -> Task:
        return Task(function(value))

    def any_of(self, tasks: Iterable[Task]) -> Task:
        return next(iter(tasks))

    def output(self, task: Task) -> Any:
        return task.output


ASKED = LoadAsked("uniform", 40, rate_qps=8.0, tbt_slo_ms=60.0, ttft_slo_ms=3000.0)
MAX_TOKENS = 32768
PRICES = {"a100": 1.8, "h100": 3.0, "l4": 0.8}


@pytest.fixture(scope="module")
def load() -> Load:
    return load_of(ASKED, MAX_TOKENS)


@pytest.mark.parametrize("answer", [1, 2, 7, 8, 31])
@pytest.mark.parametrize(("least", "most"), [(1, benchmark.MOST_REPLICAS), (1, 40), (2, 31)])
def test_the_fewest_are_found(answer: int, least: int, most: int) -> None:
    asked: list[int] = []

    def carried(replicas: int) -> bool:
        asked.append(replicas)
        return replicas >= answer

    assert fewest(carried, least, most) == max(answer, least)
    assert len(asked) == len(set(asked)) <= 12
    assert fewest(lambda replicas: False, 1, 3) is None
    assert fewest(carried, 5, 4) is None


def verdict(device: str, cost: float, scheduler: str = "sarathi") -> Verdict:
    return Verdict(Candidate("m", device, scheduler=scheduler), Bound(1.0), replicas=1, cost=cost)


def test_who_cannot_be_first_or_second_is_left() -> None:
    board = Board({"a": 2.0, "b": 3.0, "c": 1.0})
    assert board.most_replicas(Candidate("m", "c")) == benchmark.MOST_REPLICAS
    board.verdicts = [verdict("a", 10.0), verdict("a", 12.0, "default")]
    assert board.most_replicas(Candidate("m", "a")) == 4  # five cost the same
    assert board.most_replicas(Candidate("m", "c")) == 39  # no runner-up yet: within four times the first
    board.verdicts.append(verdict("b", 15.0))
    assert board.most_replicas(Candidate("m", "c")) == 14
    assert board.most_replicas(Candidate("m", "b")) == 4
    board.prune = False
    assert board.most_replicas(Candidate("m", "c")) == benchmark.MOST_REPLICAS


def test_of_two_that_cost_the_same_the_first_that_was_named_is_taken() -> None:
    first, second = verdict("a", 10.0), replace(verdict("a", 10.0, "default"), place=1)
    for finished in ([first, second], [second, first]):
        assert Board({"a": 2.0}, finished).ranked() == [first]


@pytest.mark.parametrize("seed", range(40))
def test_the_pick_is_that_of_an_exhaustive_search(
    load: Load, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """On devices of any speed, with bounds that are as far off as they like to be on their side."""
    chance = random.Random(seed)
    speed: dict[Candidate, float] = {}
    best: dict[str, Bound] = {}
    candidates = candidates_of("m", PRICES, ("sarathi", "default@512"), most_devices=4)
    for each in candidates:
        speed[each] = chance.uniform(0.1, 3.0) * each.devices
        most = max(best[each.deployment].most_qps, speed[each]) if each.deployment in best else speed[each]
        best[each.deployment] = Bound(most * chance.uniform(1.0, 2.0))
    for name in chance.sample(list(best), 2):
        best[name] = Bound(refused="too large", kind="memory")

    def carries(candidate: Candidate, load: Load, replicas: int) -> bool:
        return load.rate_qps / replicas <= speed[candidate]

    monkeypatch.setattr(benchmark, "carries", carries)
    monkeypatch.setattr(benchmark, "bound", lambda name, load: best[name])
    busy = replace(load, rate_qps=chance.uniform(1.0, 200.0))
    board = search(candidates, busy, PRICES, Inline())
    every = search(candidates, busy, PRICES, Inline(), prune=False)
    assert len(every.verdicts) == len(board.verdicts) == len(candidates)
    ours, all_of_them = board.ranked(), every.ranked()
    assert ours[0].cost == all_of_them[0].cost
    if all_of_them[1].cost <= benchmark.MOST_TIMES * ours[0].cost:
        assert ours[1].cost == all_of_them[1].cost
    assert sum(v.runs for v in board.verdicts) < 0.7 * sum(v.runs for v in every.verdicts)


def test_a_skew_is_that_of_each_candidate_and_of_experts_alone() -> None:
    made = candidates_of("m", PRICES, ("sarathi",), most_devices=2, experts=True, skew=1.2)
    assert {each.deployment.partition(":")[2] for each in made} >= {"tp1skew1.2", "tp2epskew1.2"}
    with pytest.raises(ConfigError, match=r"--skew 1.2: is of the loads of experts, and m has none"):
        candidates_of("m", PRICES, ("sarathi",), skew=1.2)
    with pytest.raises(ConfigError, match="--skew 10: must be from 0"):
        candidates_of("m", PRICES, ("sarathi",), experts=True, skew=10)


@pytest.mark.parametrize("command", [("bench", "devices"), ("bench", "classes")])
def test_more_requests_than_fit_into_memory_are_refused(command: tuple[str, ...]) -> None:
    refused = CliRunner().invoke(app, [*command, "--requests", "100000000000"])
    assert refused.exit_code != 0
    assert "--requests 100000000000: at most 10,000,000." in str(refused.output) + str(refused.exception)


@pytest.mark.slow
def test_a_bound_is_above_what_runs_show(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_load, "LEAST_SPAN_S", 12.0)
    candidate = Candidate("mistral-7b", "a100")
    known = bound(candidate.deployment, load)
    assert not benchmark.carries(candidate, replace(load, rate_qps=1.3 * known.most_qps), 1)
    assert benchmark.carries(candidate, replace(load, rate_qps=0.2 * known.most_qps), 1)


def test_a_bound_refuses_only_what_cannot_be(load: Load) -> None:
    known = bound("mistral-7b/a100:tp1", load)
    assert known.most_qps > 0
    assert known.source == "roofline"
    held = bound("falcon-180b/a100:tp1", load)
    assert held.kind == "memory"
    assert "GB of weights" in held.refused
    slow = bound(
        "mistral-7b/a100:tp1", load_of(LoadAsked("uniform", 40, rate_qps=1.0, tbt_slo_ms=2.0), MAX_TOKENS)
    )
    assert slow.kind == "slo"
    assert "ms between its tokens, more than 2" in slow.refused
    late = bound(
        "mistral-7b/a100:tp1", load_of(LoadAsked("uniform", 40, rate_qps=1.0, ttft_slo_ms=20.0), MAX_TOKENS)
    )
    assert late.kind == "slo"
    assert "has its first token after" in late.refused


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """One of 40 requests in 20 s, every tenth of which has a long prompt."""
    path = tmp_path / "trace.csv"
    lines = [f"{0.5 * i},{7000 if i % 10 == 9 else 500 + i},20" for i in range(40)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]))
    return path


def test_no_more_is_planned_for_than_the_model_takes(trace: Path) -> None:
    asked = LoadAsked(trace=trace, requests=20, tbt_slo_ms=60.0)
    with pytest.raises(
        ConfigError, match=r"7000 \+ 20 tokens are more than the model's 4096; --too-long skip"
    ):
        load_of(asked, 4096)
    left = load_of(replace(asked, too_long="skip"), 4096)
    assert (left.skipped, left.longest) == (4, 1024)
    assert load_of(asked, 8192).longest == 7168
    assert load_of(asked, 7100).longest == 7100
    assert "7100" in plan_report.serve_words(Candidate("mistral-7b", "a100"), load_of(asked, 7100), None)
    short = load_of(LoadAsked("arxiv", 20, too_long="skip", rate_qps=1.0, tbt_slo_ms=60.0), 4096)
    assert short.skipped == plan_load.MOST_REQUESTS - len(short.requests) > 0


def test_a_trace_that_comes_at_once_needs_a_rate(trace: Path) -> None:
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "3,500,10\n" * 4)
    asked = LoadAsked(trace=trace, requests=20, tbt_slo_ms=60.0)
    with pytest.raises(
        ConfigError, match=r"--rate: is missing; the requests of --trace \S+ arrive all at once"
    ):
        load_of(asked, MAX_TOKENS)
    run = load_of(replace(asked, rate_qps=4.0), MAX_TOKENS).at(4.0)
    assert run[-1].arrival_s == pytest.approx(30.0, rel=0.01)


def test_a_short_trace_begins_again_so_that_a_run_is_long_enough(trace: Path) -> None:
    made = load_of(LoadAsked(trace=trace, requests=20, tbt_slo_ms=60.0), MAX_TOKENS)
    assert made.rate_qps == pytest.approx(2.0)
    run = made.at(20.0)
    assert run[-1].arrival_s == pytest.approx(30.0, rel=0.01)
    assert [r.prompt_tokens for r in run[40:80]] == [r.prompt_tokens for r in run[:40]]
    assert all(after.arrival_s > before.arrival_s for before, after in pairwise(run))
    prefixed = [SimulatedRequest(float(i), 2000, 10, prefix=(0, 1 + i)) for i in range(3)]
    again = plan_load.repeated(prefixed, 8)
    assert len(again) == 8
    assert len({r.prefix for r in again}) == 8
    assert len({r.prefix[0] for r in again}) == 3


@pytest.mark.parametrize(("name", "tokens"), [("llama2-70b", 4096), ("Qwen/Qwen3-8B", 40960)])
def test_a_model_says_what_it_takes(name: str, tokens: int) -> None:
    assert max_tokens_of(name) == tokens


def test_classes_set_slos_by_the_kind_of_request(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(
        "classes:\n  interactive: {ttft_slo_ms: 500, tbt_slo_ms: 50}\n  normal: {ttft_slo_ms: 2000}\n"
        "  batch: {batch: true}\n"
    )
    made = load_of(LoadAsked("classes", 40, rate_qps=1.0, slo_classes=path), MAX_TOKENS)
    by_kind = {r.kind: (r.ttft_slo_ms, r.tbt_slo_ms) for r in made.requests}
    assert by_kind == {"interactive": (500, 50), "normal": (2000, None), "batch": (None, None)}
    assert dict(made.settings)["slo_classes"]["default"] == "interactive"
    plain = load_of(LoadAsked("chat", 40, rate_qps=1.0, slo_classes=path), MAX_TOKENS)
    assert {r.kind for r in plain.requests} == {"interactive"}


def test_each_class_has_to_be_kept(load: Load) -> None:
    """Many who are kept do not make up for a few who are not."""
    from vllm_sarathi.simulation.simulator import RequestLog

    few = SimulatedRequest(0.0, 10, 2, ttft_slo_ms=100.0, kind="few")
    many = SimulatedRequest(0.0, 10, 2, ttft_slo_ms=100.0, kind="many")
    kept = [RequestLog(many, 0.0, [0.01, 0.02], True) for _ in range(99)]
    late = RequestLog(few, 0.0, [5.0, 5.01], True)
    assert load.kept(kept)
    assert not load.kept([*kept, late])


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.yaml"
    path.write_text("per_hour: {a100: 1.8, h100: 3.0}\n")
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything run in this process."""
    from contextlib import nullcontext

    monkeypatch.setattr(farm, "open_workers", lambda *_: nullcontext(Inline()))
    monkeypatch.setattr("vllm_sarathi.benchmark.capacity.fleet.open_lines", lambda *_: nullcontext([Here()]))


def test_a_plan_says_what_to_buy_and_how_to_start_it(here: None, prices: Path, tmp_path: Path) -> None:
    done = invoke(
        "--model", "mistral-7b", "--prices", prices, "--rate", 2, "--workload", "uniform", "--requests", 20,
        "--tbt-slo-ms", 60, "--ttft-slo-ms", 3000, "--most-devices", 1, "--schedulers", "sarathi",
        "--json", tmp_path / "rows.json", "--ray-serve", tmp_path / "serve.yaml",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["schema"] == 1
    first, second = written["rows"]
    assert (first["state"], second["state"]) == ("chosen", "runner-up")
    assert written["margin"] == second["cost_per_hour"] / first["cost_per_hour"] - 1 >= 0
    assert first["cost_per_hour"] == first["devices"] * {"a100": 1.8, "h100": 3.0}[first["device"]]
    assert min(first["kept"].values()) >= 0.95
    assert "vllm serve mistralai/Mistral-7B-Instruct-v0.2 --max-model-len" in done.output
    assert "--ttft-slo-ms 3000" in done.output
    assert "on a100, step times: roofline" in done.output
    served = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"][0]["args"]["llm_configs"][
        0
    ]
    assert served["deployment_config"]["num_replicas"] == first["replicas"]


@pytest.mark.parametrize("scheduler", ["sarathi", "sarathi@512", "default@2048", "orca"])
def test_the_engine_of_a_ray_serve_file_can_be_built(load: Load, scheduler: str) -> None:
    candidate = Candidate("Qwen/Qwen3-30B-A3B", "h100", 2, 2, True, "fp8", scheduler)
    text = plan_report.ray_serve_text(candidate, load, 3)
    [application] = yaml.safe_load(text)["applications"]
    engine = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert set(engine) <= {field.name for field in fields(engine_args_class())}
    config = config_from_additional(engine.get("additional_config"))
    assert CONFIG_KEY in engine.get("additional_config", {}) or scheduler.startswith("default")
    assert config.token_budget == (512 if scheduler == "sarathi@512" else None)
    assert config.tbt_slo_ms == (60.0 if scheduler == "sarathi" else None)


def test_each_short_name_stands_for_a_checkpoint() -> None:
    assert list(CHECKPOINTS) == list(MODELS)
    assert {name.rpartition("-")[2] in CHECKPOINTS[name].lower() for name in MODELS} == {True}


@pytest.mark.parametrize("name", DEVICES)
def test_a_ray_serve_file_names_only_devices_that_ray_knows(load: Load, name: str) -> None:
    accelerators = pytest.importorskip("ray.util.accelerators.accelerators")
    known = {value for key, value in vars(accelerators).items() if key.isupper()}
    text = plan_report.ray_serve_text(Candidate("Qwen/Qwen3-8B", name), load, 1)
    [model] = json.loads(text)["applications"][0]["args"]["llm_configs"]
    assert model.get("accelerator_type") == (name.upper() if name.upper() in known else None)


@pytest.mark.parametrize(
    ("model", "precision", "served"),
    [
        ("Qwen/Qwen3-235B-A22B", "nvfp4", "nvidia/Qwen3-235B-A22B-NVFP4"),
        ("Qwen/Qwen3-8B", "nvfp4", "NVFP4_CHECKPOINT"),
        ("Qwen/Qwen3-8B", "fp8", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", None, "Qwen/Qwen3-8B"),
        ("qwen3-32b", None, "Qwen/Qwen3-32B"),
    ],
)
def test_a_plan_asks_vllm_for_no_quantization_that_it_has_not(
    load: Load, model: str, precision: str | None, served: str
) -> None:
    pytest.importorskip("aiconfigurator_core")
    candidate = Candidate(model, "b200", precision=precision)
    words = plan_report.serve_words(candidate, load, None)
    assert words[2] == served
    asked = words[words.index("--quantization") + 1 :][:1] if "--quantization" in words else []
    known = quantization_methods()
    assert asked == (["fp8"] if precision == "fp8" else [])
    assert set(asked) <= known
    assert "nvfp4" not in known
    assert bool(plan_report.checkpoint_lines(candidate)) is (precision == "nvfp4")
    [application] = yaml.safe_load(plan_report.ray_serve_text(candidate, load, 1))["applications"]
    [config] = application["args"]["llm_configs"]
    assert config["model_loading_config"]["model_source"] == served
    assert config["engine_kwargs"].get("quantization") == next(iter(asked), None)


def quantization_methods() -> set[str]:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return set(QUANTIZATION_METHODS)


def test_where_no_number_of_replicas_is_enough_the_error_says_how_many_were_tried() -> None:
    load = load_of(LoadAsked("chat", 20, rate_qps=1e6, tbt_slo_ms=60.0), MAX_TOKENS)
    candidate = Candidate("mistral-7b", "a100")
    board = Board({"a100": 1.0}, [Verdict(candidate, Bound(most_qps=20.0))])
    said = r"no number of replicas up to 4,096 carries 1e\+06 requests/s; even with 244 a second on each"
    with pytest.raises(ConfigError, match=said):
        plan_report.choose(board, load)


def test_of_those_that_hold_as_fleets_the_cheapest_are_taken(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tried as long as one of them can be the choice or the runner-up."""
    more = {"a": None, "b": 3, "c": 1, "d": 0, "e": 0}  # replicas beyond the share; None for never
    tried: list[str] = []

    def checked(verdict: Verdict, load: Load, unit_cost: float) -> plan_report.Checked | None:
        tried.append(verdict.candidate.device)
        added = more[verdict.candidate.device]
        cost = verdict.cost + (added or 0) * unit_cost
        return None if added is None else plan_report.Checked(verdict, 1 + added, cost, {})

    monkeypatch.setattr(plan_report, "checked", checked)
    costs = {"a": 1.0, "b": 2.0, "c": 2.5, "d": 4.0, "e": 5.0}
    board = Board(costs, [verdict(name, cost) for name, cost in costs.items()])
    found = plan_report.choose(board, load)
    assert [(each.verdict.candidate.device, each.cost) for each in found] == [("d", 4.0), ("c", 5.0)]
    assert tried == ["a", "b", "c", "d"]
    assert board.verdicts[0].why == "router"
    # The runner-up is another deployment, not another scheduler.
    board.verdicts = [verdict("a", 1.0), verdict("e", 5.0), verdict("e", 6.0, "default")]
    assert [each.verdict.candidate.scheduler for each in plan_report.choose(board, load)] == ["sarathi"]


def test_where_no_fleet_holds_the_table_is_printed_and_replicas_are_counted(
    here: None, prices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_report, "checked", lambda *_: None)
    done = invoke(
        "--model", "mistral-7b", "--prices", prices, "--rate", 2, "--workload", "uniform", "--requests", 20,
        "--tbt-slo-ms", 60, "--most-devices", 1, "--schedulers", "sarathi", "--devices", "a100",
        "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.exit_code == 1
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["state"] == "router"
    said = " ".join(done.output.split())
    assert "1 candidates" in said
    assert f"one of {row['replicas']} replicas of mistral-7b/a100:tp1 should by the share of one" in said
    assert f"even {row['replicas'] + plan_report.MORE_REPLICAS} are not enough" in said


COMMON = ["--model", "mistral-7b", "--rate", 1, "--tbt-slo-ms", 60]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mistral-8b", *COMMON[2:]], "--model: unknown model 'mistral-8b'"),
        (["--model", "mistral-8b", *COMMON[2:]], "did you mean 'mistral-7b'"),
        (["--model", "mistral-8b", *COMMON[2:]], "folder with its config.json: --model FOLDER"),
        (["--model", "mistral-7b", "--rate", 1], "no SLO is stated"),
        (["--model", "mistral-7b", "--tbt-slo-ms", 60], "--rate: is missing"),
        ([*COMMON, "--devices", "l4"], "has no price of 'l4'; it has a100, h100"),
        ([*COMMON, "--devices", ","], "--devices: names none; --prices"),
        (
            ["--model", "mistral-7b", "--rate", 1e-300, "--tbt-slo-ms", 60],
            "--rate 1e-300: 300 requests would",
        ),
        ([*COMMON, "--devices", "h10"], "--devices 'h10': unknown; did you mean 'h100'"),
        ([*COMMON, "--attainment", 1], "--attainment 1.0: must be a share"),
        ([*COMMON, "--schedulers", "orka"], "unknown scheduler; did you mean 'orca'"),
        ([*COMMON, "--precisions", "fp9"], "--precisions 'fp9': unknown; did you mean 'fp8'"),
        ([*COMMON, "--requests", 3], "--requests 3: must be"),
        ([*COMMON, "--requests", 10**12], "--requests 1000000000000: at most 10,000,000"),
        (
            ["--model", "Qwen/Qwen3-32B-FP8", *COMMON[2:], "--precisions", "checkpoint,nvfp4"],
            "--precisions nvfp4: Qwen/Qwen3-32B-FP8 is quantized already",
        ),
        (
            ["--model", "falcon-180b", *COMMON[2:], "--too-long", "skip", "--most-devices", 1],
            "the model fits on none of the candidates; falcon-180b/",
        ),
        (
            ["--model", "falcon-180b", *COMMON[2:], "--too-long", "skip", "--most-devices", 1],
            "GB of weights",
        ),
        (
            ["--model", "llama2-70b", *COMMON[2:], "--workload", "arxiv"],
            "of 6000 requests are longer than the model's 4096 tokens",
        ),
        ([*COMMON, "--too-long", "cut"], "--too-long 'cut': unknown; valid: refuse, skip"),
        (
            [*COMMON[:4], "--tbt-slo-ms", 1, "--most-devices", 1],
            "no deployment can meet the SLOs; the nearest",
        ),
    ],
)
def test_a_mistake_is_one_sentence(here: None, prices: Path, arguments: list[Any], said: str) -> None:
    done = invoke("--prices", prices, *arguments)
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("per_hour: {h10: 3}", "per_hour.h10: unknown device; did you mean 'h100'"),
        ("per_hour: {h100: -3}", "per_hour.h100 -3: must be a number above 0"),
        ("per_hour: {h100: free}", "per_hour.h100 'free': must be a number"),
        ("per_hour: {}", "per_hour: must be a mapping"),
        ("per_hours: {h100: 3}", "unknown key 'per_hours'; did you mean 'per_hour'"),
        ("- h100", "must hold a mapping"),
        ("per_hour: [", "is not valid YAML"),
    ],
)
def test_a_price_file_that_is_wrong_is_told_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--prices") as error:
        read_prices(path)
    assert said in str(error.value)


def test_the_example_of_prices_can_be_read() -> None:
    assert read_prices(Path("examples/prices.yaml")).per_hour["h100"] > 0


def test_a_run_is_long_enough_for_its_queue_to_be_felt(load: Load) -> None:
    assert len(load.at(0.5)) == 40
    fast = load.at(20.0)
    assert fast[-1].arrival_s == pytest.approx(30.0, rel=0.01)
