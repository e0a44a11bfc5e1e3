"""What the documents say holds: commands parse, code compiles, links lead somewhere, messages are those of the code.

Every page is looked at, those at the top level included. The code of some is run: see `tests/autolrs/test_readme.py`.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from autolrs_plugin.cli import app as autolrs
from tests.pages import (
    PAGES,
    PROJECT,
    RAW,
    anchors_of,
    blocks_of,
    commands_in_docstring,
    commands_in_text,
    commands_of,
    links_of,
    mentioned_in,
    page_id,
    prose_of,
)
from tests.test_house import BLOCKER, MODULES, ROOT
from tests.words import RETIRED
from vllm_sarathi.benchmark.plan.load import LoadAsked, load_of
from vllm_sarathi.benchmark.plan.report import serve_words
from vllm_sarathi.benchmark.plan.search import Candidate
from vllm_sarathi.cli import app as vllm_sarathi
from vllm_sarathi.core.config import SarathiConfig, flag_name
from vllm_sarathi.engine.plugin import GROUP_TITLE, flag_settings
from vllm_sarathi.engine.vllm.contract import TESTED_VERSIONS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TYPER = {"vllm-sarathi": vllm_sarathi, "autolrs": autolrs}
PLACEHOLDERS = {"MS": "50", "N": "200", "S": "30", "A,B": "1e-4,1", "KEY=VALUE": "tbt_mode=pace", "RATE": "2"}
"""Words that stand for a number or the like; other words in capitals are names, and any name parses."""


def parse_typer(words: list[str]) -> None:
    """Parse a command line of ours as the command does, without running it."""
    command: Any = typer.main.get_command(TYPER[words[0]])
    name, rest = words[0], words[1:]
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"{name}: has no command {rest[0]!r}"
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    command.make_context(name, list(rest))


def is_incomplete(error: BaseException) -> bool:
    """Whether an error says that an option or an argument is missing, and no more than that."""
    # typer brings a click of its own in some versions.
    return type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")


@pytest.fixture(scope="session")
def serve_parser() -> Any:
    """The parser of `vllm serve`, with the plugin's flags."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(required=True)
    ServeSubcommand().subparser_init(subparsers)
    return parser


def parse_serve(parser: Any, words: list[str]) -> None:
    """Parse a `vllm serve` command line, and check our settings together."""
    if any(word.startswith("--help") for word in words):
        assert words[-1] == f"--help={GROUP_TITLE}"
        return
    settings = flag_settings(parser.parse_args(words[1:]))
    if settings.get("scheduler") != "default":
        SarathiConfig.from_mapping(settings)


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


OF_OTHERS = {"axolotl", "curl", "docker", "hadolint", "ray", "rm", "torchrun"}
"""Commands that a page may show and that are not looked into."""

USERS_SCRIPTS = {"train.py"}


def check_command(words: list[str], parser: Any) -> None:
    """Check one command line; one of a kind that is not known is an error."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[0] in TYPER:
        parse_typer(words)
    elif words[:2] == ["vllm", "serve"]:
        parse_serve(parser, words)
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= make_targets()
    elif words[:2] == ["pip", "install"]:
        for extras in re.findall(r"vllm-sarathi\[([\w,-]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(PYPROJECT["optional-dependencies"]), extras
            assert "vllm-sarathi" not in " ".join(words) or "--no-deps" not in words, (
                "it would leave out what vllm-sarathi needs, too"
            )
    elif words[0] == "python":
        assert words[1] in USERS_SCRIPTS or (ROOT / words[1]).is_file(), words[1]
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-")), words
    else:
        assert words[:2] == ["pip", "uninstall"] or words[0] in OF_OTHERS, (
            f"{words[0]} is in no list of commands"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_parse(page: Path, serve_parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    shown = [*commands_of(text), *commands_in_text(text)]
    for words, whole in [*((w, True) for w in shown), *((w, False) for w in mentioned_in(text))]:
        try:
            check_command(words, serve_parser)
        except (Exception, SystemExit) as error:
            if whole or not is_incomplete(error):
                pytest.fail(f"{' '.join(words)}: {error!r} {capsys.readouterr().err}")


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_commands_of_an_example_parse(path: Path, serve_parser: Any) -> None:
    found = list(commands_in_docstring(ast.get_docstring(ast.parse(path.read_text())) or ""))
    assert found, "the example does not say how to run it"
    for words in found:
        check_command(words, serve_parser)


def test_a_command_in_a_block_of_text_is_found() -> None:
    block = "```text\nvllm-sarathi top URL \\\n  --once\nSarathi: 9 running, it's fine\n```\n"
    assert list(commands_in_text(block)) == [["vllm-sarathi", "top", "URL", "--once"]]


@pytest.mark.parametrize(
    "line", ["vlm serve MODEL", "vllm bench serve", "python examples/gone.py", "pytest tests/gone.py"]
)
def test_a_command_that_nobody_knows_is_an_error(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(line.split(), None)


@pytest.mark.parametrize("scheduler", ["sarathi", "sarathi@512", "default", "default@2048", "orca"])
def test_the_command_of_a_plan_parses(serve_parser: Any, scheduler: str, tmp_path: Path) -> None:
    classes = tmp_path / "classes.yaml"
    classes.write_text("classes: {chat: {ttft_slo_ms: 500, tbt_slo_ms: 50}}\n")
    candidate = Candidate("Qwen/Qwen3-30B-A3B", "h100", 2, 2, True, "fp8", scheduler)
    plain = load_of(LoadAsked(requests=20, rate_qps=1.0, tbt_slo_ms=37.5, ttft_slo_ms=2000.0), 32768)
    by_class = load_of(LoadAsked(requests=20, rate_qps=1.0, slo_classes=classes), 32768)
    for load, file in ((plain, None), (by_class, classes)):
        parse_serve(serve_parser, serve_words(candidate, load, file))


def test_the_commands_of_the_baselines_parse(serve_parser: Any) -> None:
    paths = list((ROOT / "bench/baselines").glob("*.json"))
    assert paths
    for path in paths:
        for command in json.loads(path.read_text())["commands"]:
            check_command(command.split(), serve_parser)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_what_it_is(page: Path) -> None:
    """One that does not would be looked at by no test."""
    known = {"bash", "json", "mermaid", "python", "text", "yaml"}
    text = page.read_text()
    assert {block.language for block in blocks_of(text)} <= known
    assert 2 * len(blocks_of(text)) == len(re.findall(r"^ *```", text, re.M)), (
        "a block is indented or not closed"
    )


NOT_INSTALLED = {"axolotl", "llamafactory"}
"""Packages of which a page shows code, that `make setup` does not install."""


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def defined_in(path: Path) -> set[str]:
    """Return the names that a module of ours defines or imports, at its top level or lazily."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
                names |= set(ast.literal_eval(node.value))
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_compiles_and_its_imports_are_there(page: Path) -> None:
    for block in blocks_of(page.read_text()):
        if block.language != "python":
            continue
        for module, name in imported(ast.parse(block.text)):
            if module.partition(".")[0] in NOT_INSTALLED:
                continue
            spec = importlib.util.find_spec(module)
            assert spec is not None, f"no module {module}"
            assert spec.origin is not None
            if name is not None and module.partition(".")[0] in ("vllm_sarathi", "autolrs_plugin"):
                assert name in defined_in(Path(spec.origin)), f"{module} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_json_and_yaml_are_valid(page: Path) -> None:
    for block in blocks_of(page.read_text()):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def local_path(address: str) -> Path | None:
    """Return the file or folder that an address of this project shows; None for an address of somewhere else."""
    for start in (f"{PROJECT}/blob/main/", f"{PROJECT}/tree/main/", f"{RAW}/main/"):
        if address.startswith(start):
            return ROOT / address.removeprefix(start)
    return None


def test_an_address_of_the_project_is_a_file_here() -> None:
    assert local_path(f"{PROJECT}/blob/main/docs/index.md") == ROOT / "docs/index.md"
    assert local_path(f"{RAW}/main/docs/images/timeline.png") == ROOT / "docs/images/timeline.png"
    assert local_path(PYPROJECT["urls"]["Issues"]) is None


def test_the_readme_has_no_relative_link() -> None:
    """The package index shows it, too, where such a link leads nowhere."""
    text = (ROOT / "README.md").read_text()
    assert not [link for link in links_of(text) if "://" not in link and not link.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target:
            path = local_path(target)
            if path is None or path.is_dir():
                continue
        else:
            path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors_of(path.read_text()), f"{link}: no such heading"


def test_every_page_is_in_the_navigation_or_in_operations() -> None:
    """Pages on operations may be left out of it: mkdocs finds them by their links."""
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/-]+\.md)$", text, re.M))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed <= pages
    assert {page for page in pages - listed if not page.startswith("operations/")} == set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_words_are_those_of_the_glossary(page: Path) -> None:
    found = {each[0] for each in re.finditer(RETIRED, prose_of(page.read_text()), re.I)}
    assert not found, f"see docs/glossary.md: {sorted(found)}"


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    first, last = (".".join(map(str, version)) for version in TESTED_VERSIONS)
    assert f"| {first} to {last} " in text


# What is made from the code.


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """The hook that mkdocs runs."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".ci/docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_part_is_on_a_page(hooks: ModuleType) -> None:
    wanted = [name for page in PAGES for name in hooks.MARKER.findall(page.read_text())]
    assert sorted(wanted) == sorted(hooks.PARTS)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_parts_on_a_page_are_those_of_the_code(hooks: ModuleType, page: Path) -> None:
    text = page.read_text()
    assert hooks.on_page_markdown(text) == text, "run python .ci/docs_hooks.py"


def test_a_default_of_zero_is_shown(hooks: ModuleType) -> None:
    assert [hooks._shown(value) for value in (0, 0.0, "0", 1)] == ["`0`", "`0.0`", "`0`", "`1`"]
    assert [hooks._shown(value) for value in (None, False, "", ())] == [""] * 4


def test_every_flag_is_in_the_table(hooks: ModuleType) -> None:
    text = hooks.PARTS["serve-flags"]()
    for setting in fields(SarathiConfig):
        assert f"| `{flag_name(setting.name)}" in text
    assert "| `--token-budget N` |  | Tokens per step" in text
    assert "| `--prefill-max-wait-s S` | `30.0` |" in text


@pytest.mark.parametrize("name", TYPER)
def test_every_command_and_option_has_its_row(hooks: ModuleType, name: str) -> None:
    text = hooks.PARTS[name]()
    for whole, command in hooks.commands_of(name, typer.main.get_command(TYPER[name])):
        section = text.partition(f"## `{whole}`\n")[2].partition("\n## ")[0]
        assert command.help.split("\n")[0] in section
        for param in command.params:
            if param.name not in ("help", "context"):
                assert param.opts[-1] in section or f"`{param.metavar or param.name.upper()}`" in section


@pytest.mark.parametrize("name", TYPER)
def test_a_paragraph_of_a_commands_help_is_one_line(hooks: ModuleType, name: str) -> None:
    """Typer keeps line breaks, which would fall in mid-sentence."""
    for whole, command in hooks.commands_of(name, typer.main.get_command(TYPER[name])):
        assert "\n" not in command.help.replace("\n\n", ""), whole


def test_the_parts_need_neither_vllm_nor_torch() -> None:
    """The documentation is built where they are not installed."""
    blocked = {"vllm", "torch", "transformers", "scipy", "sklearn", "matplotlib"}
    code = BLOCKER.format(blocked=blocked, names=[]) + (
        "import runpy\nfor part in runpy.run_path('.ci/docs_hooks.py')['PARTS'].values(): assert part()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# Messages.


def said_by_the_code() -> str:
    """Return all text in the packages, each string in one piece with a gap where a value goes."""
    texts = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[\w.]*[rsdg]", "…", node.value))
    return "\n".join(texts)


def test_the_messages_in_troubleshooting_are_those_of_the_code() -> None:
    said = said_by_the_code()
    text = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.+?)` \|", text, re.M)
    assert len(messages) > 60
    gone = [
        message
        for message in messages
        if not all(
            part in said for part in re.split(r"…", message.replace("\\|", "|")) if len(part.strip()) > 3
        )
    ]
    assert not gone


def test_the_hint_of_an_adapter_names_what_it_needs() -> None:
    """AutoLRS itself, and the framework."""
    hints = [
        set(extras.split(","))
        for path in (ROOT / "autolrs_plugin/integrations").glob("*.py")
        for extras in re.findall(r"pip install 'vllm-sarathi\[([\w,-]+)\]'", path.read_text())
    ]
    assert len(hints) >= 4
    assert all("autolrs" in extras and extras <= set(PYPROJECT["optional-dependencies"]) for extras in hints)


# The project.


def test_the_version_is_stated_once() -> None:
    stated = [
        path
        for path in (*MODULES, ROOT / "CITATION.cff", ROOT / "mkdocs.yml")
        if re.search(r"^(__version__|version) ?[=:]", path.read_text(), re.M)
    ]
    assert not stated


def test_the_citation_is_valid() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["authors"] == [{"name": "The vllm-sarathi developers"}]
    assert citation["license"] == PYPROJECT["license"]
    assert citation["repository-code"] == PYPROJECT["urls"]["Source"] == PROJECT


def test_the_workflows_run_what_is_supported() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    pythons = {found[1] for c in PYPROJECT["classifiers"] if (found := re.search(r"Python :: (3\.\d+)$", c))}
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == pythons
    assert set(jobs["wheel"]["strategy"]["matrix"]["python"]) == pythons
    (compat,) = re.findall(r"^VERSIONS=\((.*)\)$", (ROOT / ".ci/compat").read_text(), re.M)
    assert jobs["vllm"]["strategy"]["matrix"]["vllm"] == compat.split()
    first, last = TESTED_VERSIONS
    assert [tuple(map(int, v.split(".")[:2])) for v in (compat.split()[0], compat.split()[-1])] == [
        first,
        last,
    ]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_what_a_workflow_calls_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for command in filter(None, (step.get("run") for step in job["steps"])):
            words = command.split()
            if words[0] == "make":
                assert words[1] in make_targets()
            elif words[0].startswith(".ci/"):
                assert (ROOT / words[0]).stat().st_mode & 0o100
