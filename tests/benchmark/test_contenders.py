"""Schedulers by name, and the flags of their servers."""

import pytest

from vllm_sarathi.benchmark.live.contenders import default_contenders, parse_contender, parse_contenders
from vllm_sarathi.benchmark.live.server import MAX_NUM_SEQS
from vllm_sarathi.core.config import ConfigError


@pytest.mark.parametrize(
    ("label", "flags"),
    [
        ("default", "--scheduler default"),
        ("default@80", "--scheduler default --max-num-batched-tokens 80"),
        ("sarathi", "--scheduler sarathi --tbt-slo-ms 250 --calibration-dir none"),
        ("sarathi@256", "--scheduler sarathi --token-budget 256"),
        (
            "sarathi-deadline",
            "--scheduler sarathi --tbt-slo-ms 250 --calibration-dir none --prefill-order deadline"
            " --ttft-slo-ms 2000",
        ),
        ("sarathi-sjf", "--scheduler sarathi --tbt-slo-ms 250 --calibration-dir none --prefill-order sjf"),
    ],
)
def test_a_name_is_the_flags_of_a_server(label: str, flags: str) -> None:
    assert parse_contender(label).flags(250.0, 2000.0) == flags.split()


def test_only_who_knows_the_slo_runs_for_each() -> None:
    knowing = {
        label: parse_contender(label).knows_slo
        for label in ("default", "default@80", "sarathi@256", "sarathi", "sarathi-deadline")
    }
    assert [label for label, knows in knowing.items() if knows] == ["sarathi", "sarathi-deadline"]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("sarathy", "'sarathy': unknown scheduler; did you mean 'sarathi'"),
        (
            "sarathi,stock",
            "'stock': unknown scheduler; valid: default, sarathi, sarathi-deadline, sarathi-sjf",
        ),
        ("default@many", "'default@many': .* whole number"),
        ("default@", "'default@': .* whole number"),
        ("default@-80", "'default@-80': .* whole number"),
        ("sarathi@2.5", "'sarathi@2.5': .* whole number"),
        (f"default@{MAX_NUM_SEQS - 1}", f"at least {MAX_NUM_SEQS} tokens"),
        ("sarathi@0", "at least 1 tokens"),
        ("sarathi-deadline@80", "takes no fixed budget"),
        (" , ", "names no scheduler"),
    ],
)
def test_who_is_unknown_is_refused_by_name(labels: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_contenders(labels)


def test_names_are_taken_once_and_in_order() -> None:
    assert [each.label for each in parse_contenders("default@80, sarathi,default@80")] == [
        "default@80",
        "sarathi",
    ]


def test_the_sweep_is_of_five_stock_budgets() -> None:
    contenders = default_contenders(quick=False)
    assert sum(each.is_stock and each.token_budget is not None for each in contenders) == 5
    assert {each.label for each in default_contenders(quick=True)} < {each.label for each in contenders}
