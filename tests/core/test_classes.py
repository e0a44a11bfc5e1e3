"""Class files: read strictly, with a sentence per error; and what a request is bound to by them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sarathi.core.classes import AskedSlo, SloClasses, read_classes
from vllm_sarathi.core.config import ConfigError, SarathiConfig
from vllm_sarathi.core.plain import parse_plain

YAML = """
default: standard
classes:
  interactive: {ttft_slo_ms: 500, tbt_slo_ms: 50, weight: 4, when_late: refuse, service_tiers: [priority]}
  standard: {ttft_slo_ms: 2000, tbt_slo_ms: 100, when_late: relegate}
  plain:
  night: {batch: true, max_wait_s: 60, service_tiers: [flex]}
"""


@pytest.fixture
def classes(tmp_path: Path) -> SloClasses:
    path = tmp_path / "classes.yaml"
    path.write_text(YAML)
    return read_classes(path)


def _tenfold(level: int) -> str:
    """Return a list in YAML of ten to the power of `level` values, by aliases."""
    inner = "1" if not level else f"&a{level} {_tenfold(level - 1)}"
    return "[" + inner + f", *a{level}" * (9 if level else 0) + "]"


ALIASES = f"classes: {{a: {{weight: {_tenfold(12)}}}}}"


def test_a_file_says_the_same_in_yaml_and_in_json(classes: SloClasses, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(classes.to_mapping()))
    assert read_classes(path) == classes
    assert [each.name for each in classes.classes] == ["interactive", "standard", "plain", "night"]
    assert classes.least("ttft_slo_s") == 0.5
    assert classes.least("tbt_slo_s") == 0.05
    assert classes.refuses
    assert classes.has_batch


def test_settings_carry_the_classes_as_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(YAML)
    config = SarathiConfig(slo_classes=str(path))  # type: ignore[arg-type]
    assert SarathiConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("classes: 3", "classes 3: must be a mapping of 1 to 32 names"),
        ("classes: {}", "classes {}: must be a mapping of 1 to 32 names"),
        ("[1]", "must hold a mapping with 'classes', not list"),
        ("klasses: {a: {}}", "unknown key 'klasses'; did you mean 'classes'?"),
        ("classes: {a: {ttft_slo: 3}}", "classes.a: unknown key 'ttft_slo'; did you mean 'ttft_slo_ms'?"),
        (
            "classes: {a: {ttft_slo_ms: -1}}",
            "classes.a.ttft_slo_ms -1: must be a number of milliseconds",
        ),
        ("classes: {a: {ttft_slo_ms: .nan}}", "classes.a.ttft_slo_ms nan: must be a number of milliseconds"),
        (
            "classes: {a: {ttft_slo_ms: 5.0e-324}}",
            "classes.a.ttft_slo_ms 5e-324: must be a number of milliseconds from 0.1",
        ),
        ("classes: {a: {tbt_slo_ms: 0.09}}", "classes.a.tbt_slo_ms 0.09: must be a number of milliseconds"),
        ("classes: {a: {tbt_slo_ms: .inf}}", "classes.a.tbt_slo_ms inf: must be a number of milliseconds"),
        (
            "classes: {a: {batch: true, max_wait_s: 1.0e-9}}",
            "max_wait_s 1e-09: must be a number of at least 0.001",
        ),
        (
            "classes: {a: {service_tiers: [auto]}}",
            "service_tiers 'auto': is the service tier of requests that ask",
        ),
        ("classes: {auto: {}}", "classes 'auto': is the service tier of requests that ask for none"),
        ("classes: {%s: {}}" % ("x" * 257), "xxx...: a name has at most 256 characters."),
        ("classes: {a: {tbt_slo_ms: true}}", "classes.a.tbt_slo_ms True: must be a number of milliseconds"),
        ("classes: {a: {weight: '3'}}", "classes.a.weight '3': must be a number above 0"),
        (
            "classes: {a: {ttft_slo_ms: 1, when_late: refuze}}",
            "when_late 'refuze': unknown; did you mean 'refuse'?",
        ),
        ("classes: {a: {when_late: refuse}}", "when_late 'refuse': has no effect without ttft_slo_ms"),
        ("classes: {a: {batch: maybe}}", "classes.a.batch 'maybe': must be true or false"),
        (
            "classes: {a: {batch: true, tbt_slo_ms: 3}}",
            "classes.a.tbt_slo_ms 3: batch work has no SLO",
        ),
        ("classes: {a: {batch: true, weight: 3}}", "classes.a.weight 3: has no effect on batch work"),
        ('{"classes": {"a": {}', "is not valid JSON"),
        ("classes: {a: {max_wait_s: 3}}", "classes.a.max_wait_s 3: has no effect without batch: true"),
        ("classes: {a: {service_tiers: [gold]}}", "classes.a.service_tiers 'gold': unknown; valid: default"),
        ("classes: {a: {service_tiers: flex}}", "classes.a.service_tiers 'flex': must be a list"),
        (
            "classes: {a: {service_tiers: [flex]}, b: {service_tiers: [flex]}}",
            "classes.b.service_tiers 'flex': stands for class 'a' already",
        ),
        ("classes: {a: {service_tiers: [flex]}, flex: {}}", "'flex': stands for class 'flex' already"),
        ("classes: {a: {}, a: {}}", "key 'a': is given twice"),
        ('{"classes": {"a": {}, "a": {}}}', "key 'a': is given twice"),
        ("classes: {1: {}}", "key 1: must be a name"),
        ("classes: {yes: {}}", "key True: must be a name; in quotes where it is taken for something else"),
        ("classes: {a: &a {weight: 2}, b: {<<: *a}}", "key '<<': keys cannot be merged in; write them out"),
        ("classes: {'a b': {}}", "classes 'a b': a name has letters, digits, - and _ only"),
        ("default: b\nclasses: {a: {}}", "default 'b': no such class; valid: a."),
        ("classes: [", "is not valid YAML"),
        ("classes: {a: {weight: !!int abc}}", "is not valid YAML"),
        ("classes: {a: {weight: 2020-13-45}}", "is not valid YAML"),
        ("classes: {a: {batch: !!bool maybe}}", "is not valid YAML"),
        ('{"classes": ', "is not valid JSON"),
        ("classes: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("{" * 5000, "is n"),
        (ALIASES, "classes.a.weight a list of very many values: must be"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        SarathiConfig(slo_classes=str(path))  # type: ignore[arg-type]
    assert said in str(raised.value)
    assert f"--slo-classes '{path}'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_classes(tmp_path / "none.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["ttft_slo_ms", "tbt_slo_ms", "weight", "when_late", "batch", "max_wait_s", "service_tiers"]
)


@settings(deadline=None, derandomize=True, database=None)
@given(
    JSON
    | st.fixed_dictionaries({"classes": st.dictionaries(st.text(max_size=4), st.dictionaries(KEYS, JSON))})
)
def test_any_value_is_classes_or_a_config_error(values: Any) -> None:
    try:
        made = SloClasses.from_mapping(values)
    except ConfigError:
        return
    assert SloClasses.from_mapping(made.to_mapping()) == made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ttft_slo_ms": 3}, "--ttft-slo-ms 3: has no effect with --slo-classes"),
        ({"allow_request_slo": True}, "--allow-request-slo True: has no effect with --slo-classes"),
        ({"prefill_order": "sjf"}, "--slo-classes orders prompts by their SLOs"),
        ({"token_budget": 256}, "has no effect with --token-budget 256"),
        ({"fairness_header": "a b"}, "must be the name of an HTTP header"),
    ],
)
def test_settings_that_would_be_ignored_beside_classes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SarathiConfig.from_mapping({"slo_classes": {"classes": {"a": {}}}, **settings})


def test_a_fairness_header_needs_classes() -> None:
    with pytest.raises(ConfigError, match="has no effect without --slo-classes"):
        SarathiConfig(fairness_header="x-tenant")


def test_a_class_is_found_by_name_tier_or_wish(classes: SloClasses) -> None:
    def name(**asked: Any) -> str:
        bond = AskedSlo(**asked).bind(classes)
        assert bond.slo_class is not None
        return bond.slo_class.name

    assert name() == "standard"
    assert name(class_name="interactive") == "interactive"
    assert name(class_name="priority") == "interactive"
    assert name(class_name="flex") == "night"
    assert name(ttft_slo_s=2.0) == "standard"
    assert name(ttft_slo_s=1.9) == "interactive"
    assert name(ttft_slo_s=0.1) == "interactive"
    assert name(class_name="plain", ttft_slo_s=0.1) == "plain"


def test_a_wish_is_never_tighter_than_the_slo_of_its_class(classes: SloClasses) -> None:
    bond = AskedSlo(0.01, 0.1, "interactive").bind(classes)
    assert (bond.tbt_slo_s, bond.ttft_slo_s) == (0.05, 0.5)
    bond = AskedSlo(0.08, 0.9, "interactive").bind(classes)
    assert (bond.tbt_slo_s, bond.ttft_slo_s) == (0.08, 0.9)
    bond = AskedSlo(0.01, 0.1, "plain").bind(classes)
    assert (bond.tbt_slo_s, bond.ttft_slo_s) == (None, None)
    bond = AskedSlo(0.01, 0.1, "night").bind(classes)
    assert (bond.tbt_slo_s, bond.ttft_slo_s) == (math.inf, None)
    assert bond.batch


def test_a_mapping_of_yaml_may_begin_as_one_of_json_does() -> None:
    assert parse_plain("{classes: {a: {weight: 2}}}", "f") == {"classes": {"a": {"weight": 2}}}
