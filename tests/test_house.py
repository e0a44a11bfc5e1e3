"""The rules of the house, read off the code: who may import whom, how large a module may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.words import RETIRED
from vllm_sarathi.core.policies import POLICIES
from vllm_sarathi.engine.vllm.contract import TESTED_VERSIONS

ROOT = Path(__file__).parent.parent
PACKAGES = ("vllm_sarathi", "autolrs_plugin")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DOCUMENTS = {
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CITATION.cff",
    "docs",
    "mkdocs.yml",
}
TOP_LEVEL = {
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "Makefile",
    *PACKAGES,
    "tests",
    "examples",
    "bench",
    *DOCUMENTS,
}

FRONT_DOOR = ""
"""The package itself: its version, and the public names that it imports lazily."""

MAY_IMPORT = {
    "vllm_sarathi.core": {"core"},
    "vllm_sarathi.engine": {"core", "engine"},
    "vllm_sarathi.simulation": {"core", "engine", "simulation"},
    "vllm_sarathi.benchmark": {"core", "engine", "simulation", "benchmark", FRONT_DOOR},
    "vllm_sarathi.top": {"core", "top"},
    "vllm_sarathi.testing": {"core", "engine", "testing"},
    "vllm_sarathi.cli": {"core", "simulation", "benchmark", "top", "cli", FRONT_DOOR},
    "vllm_sarathi": {"core", "engine"},
    "autolrs_plugin.core": {"core"},
    "autolrs_plugin.report": {"core"},
    "autolrs_plugin.training": {"core", "report", "training"},
    "autolrs_plugin.integrations": {"core", "report", "training", "integrations"},
    "autolrs_plugin.testing": {"core", "training"},
    "autolrs_plugin.benchmark": {"core", "training", "integrations", "benchmark", FRONT_DOOR},
    "autolrs_plugin.cli": {"core", "report", "integrations", "benchmark", "cli", FRONT_DOOR},
    "autolrs_plugin": {"integrations"},
}
"""What each top-level module of a package may import of its own package, in an import statement or by a string."""

NAMED_FOR_VLLM = ("vllm_sarathi.core.config", "vllm_sarathi.SarathiScheduler")
"""The one name that is not imported where it stands: the setting that vLLM gets, whose engine imports it."""

COMPUTED_IMPORTS = {
    "vllm_sarathi.core.controller",
    "vllm_sarathi.engine.composition",
    "vllm_sarathi.engine.vllm.internals",
}
"""What imports modules by names that are no literals: a policy of core's, the user's `--scheduler-base`, vLLM's."""

IMPORTERS = {"import_module", "import_internal", "__import__"}

BENCHMARK_PACKAGES = {
    "common": {"common"},
    "capacity": {"common", "capacity"},
    "plan": {"common", "capacity", "plan"},
    "paper": {"common", "capacity", "paper"},
    "live": {"common", "capacity", "live"},
    "profile": {"common", "capacity", "live", "profile"},
}
"""What each package of `vllm_sarathi.benchmark` may import of the others."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    """Return the package that relative imports of a file start from."""
    return name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, at any depth."""
    package = package_of(path)
    yield from (name for name in called_imports(ast.parse(path.read_text()), package) if name is not None)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def called_imports(tree: ast.AST, package: str) -> Iterator[str | None]:
    """Yield the dotted name of what each call in a file imports; None where no literals say it.

    Args:
        tree: the file.
        package: its package, which a name with a dot in front is relative to unless another one is given.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] not in IMPORTERS:
            continue
        given = [arg.value if isinstance(arg, ast.Constant) else ast.unparse(arg) for arg in node.args]
        literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if not literal or not isinstance(given[0], str) or len(node.args) > 2:
            yield None
            continue
        name = given[0].lstrip(".")
        dots = len(given[0]) - len(name)
        keywords = {
            k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords
        }
        base = keywords.get("package", given[1] if len(given) > 1 else package)
        base = package if base == "__package__" else base
        if not dots:
            yield None if "level" in keywords else name
        elif isinstance(base, str) and re.fullmatch(r"\w+(\.\w+)*", base):
            yield ".".join([*base.split(".")[: len(base.split(".")) - dots + 1], name])
        else:
            yield None


def strings_of(path: Path) -> Iterator[str]:
    """Yield the dotted names of our modules that stand in a file as strings; of an f-string, its fixed beginning."""
    for node in ast.walk(ast.parse(path.read_text())):
        first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            name = first.value.rstrip(".") if isinstance(node, ast.JoinedStr) else first.value
            if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+(:[\w.]+)?", name):
                yield name.replace(":", ".")


def named_by(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, or names for somebody to import."""
    yield from imports_of(path)
    yield from (name for name in strings_of(path) if (name_of(path), name) != NAMED_FOR_VLLM)


def section_of(target: str) -> str:
    """Return the top-level module of its package that a name is in."""
    package, _, rest = target.partition(".")
    section = rest.partition(".")[0]
    here = ROOT / package / section
    return section if here.is_dir() or here.with_suffix(".py").is_file() else FRONT_DOOR


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = name_of(path).partition(".")[0]
    section = section_of(name_of(path))
    other = next(p for p in PACKAGES if p != package)
    for target in named_by(path):
        assert not (target + ".").startswith(other + "."), (
            f"{name_of(path)} names the other package: {target}"
        )
        if (target + ".").startswith(package + "."):
            allowed = MAY_IMPORT[f"{package}.{section}".rstrip(".")]
            assert section_of(target) in allowed, f"{name_of(path)} imports {target}"


def test_a_computed_import_stands_only_where_it_is_listed() -> None:
    found = {
        name_of(path)
        for path in MODULES
        if None in called_imports(ast.parse(path.read_text()), package_of(path))
    }
    assert found == COMPUTED_IMPORTS
    assert all(module.startswith("vllm_sarathi.core.policies.") for module in POLICIES.values())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ('import_module("vllm_sarathi.engine.memory")', "vllm_sarathi.engine.memory"),
        ('importlib.import_module(".engine.memory", "vllm_sarathi")', "vllm_sarathi.engine.memory"),
        ('import_module(".engine.memory", package="vllm_sarathi")', "vllm_sarathi.engine.memory"),
        ('import_module("..engine.memory", __package__)', "vllm_sarathi.engine.memory"),
        ('import_module(".v1", "vllm")', "vllm.v1"),
        ("import_module(name)", None),
        ('import_module(".memory", parent)', "parent.memory"),
        ('import_module(".memory", package=parent)', None),
        ('import_module(".memory", parent())', None),
        ('import_module(name="vllm_sarathi.engine")', None),
        ('__import__("engine.memory", globals(), locals(), (), 2)', None),
        ('__import__("engine.memory", level=2)', None),
    ],
)
def test_what_a_call_imports_is_known(call: str, name: str | None) -> None:
    """A name that is relative to a package by a string, too."""
    assert list(called_imports(ast.parse(call), "vllm_sarathi.core")) == [name]


@pytest.mark.parametrize("name", BENCHMARK_PACKAGES)
def test_the_packages_of_the_benchmark_build_on_each_other(name: str) -> None:
    benchmark = ROOT / "vllm_sarathi" / "benchmark"
    assert {path.name for path in benchmark.iterdir() if (path / "__init__.py").exists()} == {
        *BENCHMARK_PACKAGES
    }
    for path in (benchmark / name).rglob("*.py"):
        for target in named_by(path):
            if target.startswith("vllm_sarathi.benchmark."):
                assert target.split(".")[2] in BENCHMARK_PACKAGES[name], f"{name_of(path)} imports {target}"


def test_imports_have_no_cycle() -> None:
    names = {name_of(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        targets = {t if t in names else t.rpartition(".")[0] for t in imports_of(path)}
        # A package's __init__ is imported before its modules; only its lazy names point back.
        graph[name_of(path)] = {t for t in targets & names if "." in t and t != name_of(path)}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_one_package_names_vllm_internals(path: Path) -> None:
    """No import of vLLM, and no string that names a module of it or something in one, stands elsewhere."""
    if name_of(path).startswith("vllm_sarathi.engine.vllm"):
        return
    assert not [t for t in imports_of(path) if t == "vllm" or t.startswith("vllm.")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.fullmatch(r"vllm(\.\w+)+(:[\w.]+)?", node.value), (
                f"{node.value!r} names an internal"
            )


WORDS = ROOT / "tests/words.py"
"""The list of the retired words themselves."""

TEXTS = sorted(
    path
    for folder in (*PACKAGES, "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path != WORDS
)


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_texts_are_in_the_words_of_the_field(path: Path) -> None:
    assert not [found[0] for found in re.finditer(RETIRED, path.read_text(), re.I)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 70, f"{node.name} is long"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_pickle_and_no_shell(path: Path) -> None:
    assert not {t.partition(".")[0] for t in imports_of(path)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "shelve",
        "marshal",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            shell = keywords.get("shell")
            assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False)
            if ast.unparse(node.func) == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True"


BLOCKER = """
import importlib, sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("vllm_sarathi", {"vllm", "torch", "transformers", "scipy", "sklearn", "matplotlib"}),
        ("autolrs_plugin", {"vllm", "torch", "transformers"}),
    ],
)
def test_core_imports_without_the_heavy_libraries(package: str, blocked: set[str]) -> None:
    names = [package] + [name_of(p) for p in MODULES if name_of(p).startswith(f"{package}.core")]
    code = BLOCKER.format(blocked=blocked, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_engine_without_vllm_names_the_extra() -> None:
    code = BLOCKER.format(blocked={"vllm"}, names=[]) + "from vllm_sarathi import SarathiScheduler"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "pip install 'vllm-sarathi[vllm]'" in done.stderr.splitlines()[-1]


def top_level() -> set[str]:
    """Return what is at the top of the repository."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return {line.partition("/")[0] for line in listed.stdout.splitlines()}


def test_the_top_level_holds_what_it_may() -> None:
    assert {top for top in top_level() if not top.startswith(".")} <= TOP_LEVEL


def test_the_source_distribution_holds_it_all() -> None:
    """Its tests run from it; setuptools adds the packages and four files by itself."""
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    named = {name for line in lines if line.startswith(("graft ", "include ")) for name in line.split()[1:]}
    by_itself = {*PACKAGES, "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert named | by_itself == top_level()


def test_the_table_of_versions_is_of_the_tested_ones() -> None:
    """`make compat` writes it; a version in it has passed."""
    text = (ROOT / "docs/compatibility.md").read_text()
    rows = re.findall(r"^\| (\d+)\.(\d+)\.\d+ \|(.*)$", text.partition("<!-- compat")[2], re.M)
    first, last = TESTED_VERSIONS
    checked = {(int(major), int(minor)) for major, minor, _ in rows}
    assert {first, last} <= checked <= {(first[0], minor) for minor in range(first[1], last[1] + 1)}
    assert not [row for row in rows if "failed" in row[2]]
