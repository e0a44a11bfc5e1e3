"""The plugin: flags on vLLM's own command line, checks before a model loads, nothing where it is not used."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_sarathi import SarathiConfig, SarathiScheduler
from vllm_sarathi.core.config import CONFIG_KEY, SCHEDULER_CLS, ConfigError, config_from_additional
from vllm_sarathi.engine import plugin
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.engine.vllm.internals import logger


@pytest.fixture
def parser(model_folder: Path) -> FlexibleArgumentParser:
    """A parser as `vllm serve` makes it, with the plugins loaded and a model that is on the disk."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    parser.set_defaults(model=str(model_folder))
    return parser


def engine_args(parser: Any, *flags: str) -> Any:
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(flags)))


def settings(args: Any) -> SarathiConfig:
    return config_from_additional(args.additional_config)


def test_the_flag_names_our_scheduler(parser: Any) -> None:
    args = engine_args(parser, "--scheduler", "sarathi", "--token-budget", "64")
    assert args.scheduler_cls == SCHEDULER_CLS
    assert settings(args) == SarathiConfig(token_budget=64)


def test_a_flag_of_ours_alone_turns_it_on(parser: Any) -> None:
    assert engine_args(parser, "--token-budget=64").scheduler_cls == SCHEDULER_CLS


@pytest.mark.parametrize("flags", [[], ["--scheduler", "default"]])
def test_stock_leaves_nothing_of_ours(parser: Any, flags: list[str]) -> None:
    args = engine_args(parser, *flags)
    assert args.scheduler_cls is None
    assert CONFIG_KEY not in args.additional_config


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--prefill-order", "deadline", "--ttft-slo-ms", "2000"], {"ttft_slo_ms": 2000}),
        (["--ttft-slo-ms", "2000", "--prefill-order", "deadline"], {"ttft_slo_ms": 2000}),
        (["--min-request-slo-ms", "20", "--allow-request-slo"], {"min_request_slo_ms": 20}),
    ],
)
def test_flags_that_need_one_another_are_read_together(
    parser: Any, flags: list[str], wanted: dict[str, Any]
) -> None:
    assert wanted.items() <= settings(engine_args(parser, *flags)).to_mapping().items()


def test_a_file_may_be_called_by_a_number(parser: Any) -> None:
    assert settings(engine_args(parser, "--step-trace", "7")).step_trace == "7"


def test_additional_config_of_others_is_kept_wherever_it_stands(parser: Any) -> None:
    other = ["--additional-config", '{"other": {"a": 1}}']
    for flags in ([*other, "--token-budget", "64"], ["--token-budget", "64", *other]):
        args = engine_args(parser, *flags)
        assert args.additional_config["other"] == {"a": 1}
        assert settings(args).token_budget == 64


def test_flags_win_over_the_file(parser: Any, tmp_path: Path) -> None:
    path = tmp_path / "sarathi.json"
    path.write_text(json.dumps({"scheduler": "sarathi", "token_budget": 32}))
    assert settings(engine_args(parser, "--sarathi-config", str(path))).token_budget == 32
    both = engine_args(parser, "--sarathi-config", str(path), "--token-budget", "64")
    assert settings(both).token_budget == 64


def test_vllms_own_yaml_file_takes_our_flags(parser: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("scheduler: sarathi\ntoken-budget: 48\n")
    args = engine_args(parser, "--config", str(path))
    assert args.scheduler_cls == SCHEDULER_CLS
    assert settings(args).token_budget == 48


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many", ""])
def test_a_bad_budget_ends_the_command_line_with_one_sentence(parser: Any, capsys: Any, value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        engine_args(parser, f"--token-budget={value}")
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--token-budget" in last
    assert "must be a whole number of at least 1" in last


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--scheduler", "saratih"], "unknown scheduler; did you mean 'sarathi'?"),
        (["--scheduler", "default", "--token-budget", "64"], "has no effect with --scheduler default"),
        (["--scheduler-base", "c.D", "--scheduler-cls", "a.B"], "names another scheduler"),
        (["--slo-classes", "/nowhere.yaml"], "--slo-classes '/nowhere.yaml': cannot be read"),
        (["--fairness-header", "x-tenant"], "has no effect without --slo-classes"),
        (["--sarathi-config", "/nowhere.json"], "'/nowhere.json': cannot be read"),
        (["--ttft-slo-ms", "2000"], "has no effect without --prefill-order deadline"),
    ],
)
def test_what_cannot_work_ends_the_command_line(
    parser: Any, capsys: Any, flags: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        engine_args(parser, *flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_scheduler_goes_on_below_ours(parser: Any) -> None:
    args = engine_args(parser, "--scheduler", "sarathi", "--scheduler-cls", "a.B")
    assert args.scheduler_cls == SCHEDULER_CLS
    assert config_from_additional(args.additional_config).scheduler_base == "a.B"


def test_classes_are_read_with_the_command_line(parser: Any, tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("classes: {a: {ttft_slo_ms: 500}}")
    args = engine_args(parser, "--slo-classes", str(path))
    path.unlink()  # the engine core may be on another machine
    classes = config_from_additional(args.additional_config).slo_classes
    assert classes is not None
    assert classes.default_class.ttft_slo_s == 0.5


def test_a_bad_value_in_the_file_names_the_setting(parser: Any, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "sarathi.json"
    path.write_text('{"token_budget": 0}')
    with pytest.raises(SystemExit):
        engine_args(parser, "--sarathi-config", str(path))
    assert "--token-budget 0: must be" in capsys.readouterr().err


def test_a_taken_name_is_left_to_its_owner(model_folder: Path, warned: list[str]) -> None:
    parser = FlexibleArgumentParser(prog="vllm")
    parser.add_argument("--scheduler", default="theirs")
    AsyncEngineArgs.add_cli_args(parser)
    parser.add_argument("--token-budget", type=float)  # a plugin that is loaded after ours
    args = parser.parse_args(
        ["--model", str(model_folder), "--scheduler=x", "--token-budget=0.5", "--sarathi-scheduler=sarathi"]
    )
    assert (args.scheduler, args.token_budget) == ("x", 0.5)
    assert AsyncEngineArgs.from_cli_args(args).scheduler_cls == SCHEDULER_CLS
    parser.format_help()
    owner = "belongs to vLLM or another plugin; vllm-sarathi's is --sarathi-"
    assert warned == [f"--scheduler {owner}scheduler.", f"--token-budget {owner}token-budget."]


def test_registering_again_changes_nothing() -> None:
    load_general_plugins()
    before = (EngineArgs.add_cli_args, EngineArgs.create_engine_config)
    plugin.register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before


def test_registering_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_sarathi.engine.plugin as p; p.register();"
        "print([m for m in ('vllm', 'torch', 'numpy', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The checks that need the engine's own limits.


def create(model_folder: Path, sarathi: SarathiConfig | None = None, **fields: Any) -> Any:
    defaults = {"skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 256, "dtype": "float32"}
    ours = sarathi.engine_args() if sarathi is not None else {}
    return EngineArgs(model=str(model_folder), **{**defaults, **ours, **fields}).create_engine_config()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_num_batched_tokens": 256}, "--token-budget 300: above the engine's limit of 256 tokens"),
        ({"max_num_scheduled_tokens": 128}, "--token-budget 300: above the engine's limit of 128 tokens"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "chunked prefill is off"),
    ],
)
def test_what_the_engine_cannot_keep_is_refused_before_a_model_loads(
    model_folder: Path, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        create(model_folder, SarathiConfig(token_budget=300), max_num_seqs=16, **fields)


def test_a_budget_below_one_speculative_decode_is_refused(model_folder: Path) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with pytest.raises(ConfigError, match="--token-budget 3: below the 4 tokens"):
        create(model_folder, SarathiConfig(token_budget=3), speculative_config=ngram)
    create(model_folder, SarathiConfig(token_budget=4), speculative_config=ngram)


def test_the_command_line_gets_a_sentence_instead_of_a_traceback(
    parser: Any, model_folder: Path, capsys: Any
) -> None:
    flags = [
        "--skip-tokenizer-init",
        "--max-num-seqs=16",
        "--max-num-batched-tokens=256",
        "--token-budget=300",
    ]
    args = engine_args(parser, *flags)
    with pytest.raises(SystemExit) as stop:
        args.create_engine_config()
    assert stop.value.code == 2
    assert "error: --token-budget 300: above the engine's limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "named", [SCHEDULER_CLS, SarathiScheduler, "vllm_sarathi.engine.scheduler.SarathiScheduler"]
)
def test_our_scheduler_is_known_by_path_and_by_class(model_folder: Path, named: Any) -> None:
    with pytest.raises(ConfigError):
        create(
            model_folder,
            scheduler_cls=named,
            additional_config={CONFIG_KEY: {"token_budget": 10**6}},
        )


def test_a_pooling_model_is_handed_to_stock_with_a_warning(tmp_path: Path, warned: list[str]) -> None:
    folder = config_folder(
        tmp_path / "bert", architectures=["BertModel"], model_type="bert", type_vocab_size=2
    )
    config = create(folder, SarathiConfig(token_budget=64), runner="pooling")
    assert config.scheduler_config.scheduler_cls is None
    assert warned == [
        f"{folder} is a pooling model, which generates no tokens: vLLM's own scheduler serves it."
    ]


def test_a_new_budget_changes_no_compile_cache_key(model_folder: Path) -> None:
    hashes = {create(model_folder, SarathiConfig(token_budget=n)).compute_hash() for n in (64, 128)}
    assert len(hashes) == 1


# Other doors into vLLM.

DOORS = {
    "serve": ["-m", "vllm.entrypoints.cli.main", "serve", "--help=Sarathi"],
    "api_server": ["-m", "vllm.entrypoints.openai.api_server", "--help=Sarathi"],
}


@pytest.mark.parametrize("door", DOORS)
def test_the_help_group_is_there(door: str) -> None:
    done = subprocess.run(
        [sys.executable, *DOORS[door]], capture_output=True, text=True, check=True, timeout=300
    )
    assert "Sarathi:" in done.stdout
    for flag in ("--scheduler {sarathi,", "--token-budget N", "--sarathi-config FILE.json"):
        assert flag in done.stdout


def test_a_budget_above_the_limit_ends_vllm_serve(model_folder: Path) -> None:
    flags = [
        "--skip-tokenizer-init",
        "--max-num-seqs=16",
        "--max-num-batched-tokens=256",
        "--token-budget=300",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_folder), *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2
    # Some versions of vLLM write the process's name before it.
    assert "error: --token-budget 300: above the engine's limit of 256" in done.stderr.splitlines()[-1]


def test_a_namespace_without_our_flags_is_served_by_stock(model_folder: Path) -> None:
    # Code that builds a Namespace by hand has never heard of us.
    assert AsyncEngineArgs.from_cli_args(argparse.Namespace(model=str(model_folder))).scheduler_cls is None


def test_the_logger_is_a_child_of_vllms() -> None:
    assert logger.name.startswith("vllm.")
