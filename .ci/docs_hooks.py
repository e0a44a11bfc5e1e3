"""Makes the parts of the documentation that come from the code.

Such a part stands between `<!-- from the code: NAME -->` and `<!-- /NAME -->`; PARTS lists the names. mkdocs calls
`on_page_markdown` for each page of the site. `python .ci/docs_hooks.py` writes the parts into the pages themselves,
for those who read them on GitHub.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer.main

MARKER = re.compile(r"<!-- from the code: ([\w-]+) -->\n(?:.*\n<!-- /\1 -->\n)?", re.S)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its parts filled in; an unknown name is an error."""
    return MARKER.sub(lambda found: _part(found[1]), markdown)


def _part(name: str) -> str:
    return f"<!-- from the code: {name} -->\n\n{PARTS[name]().strip()}\n\n<!-- /{name} -->\n"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def serve_flags() -> str:
    """Return the table of the flags that the plugin adds to `vllm serve`."""
    from vllm_sarathi.core.config import SarathiConfig
    from vllm_sarathi.engine.plugin import DEST_PREFIX, GROUP_TITLE, add_flags

    parser = argparse.ArgumentParser()
    add_flags(parser)
    (group,) = (group for group in parser._action_groups if group.title == GROUP_TITLE)
    defaults = {setting.name: setting.default for setting in fields(SarathiConfig)}
    rows = []
    for action in group._group_actions:
        default = defaults.get(action.dest.removeprefix(DEST_PREFIX))
        flag = " ".join(filter(None, (action.option_strings[0], action.metavar)))
        rows.append((f"`{flag}`", _shown(default), action.help or ""))
    return table(("flag", "default", "meaning"), rows)


def _shown(default: Any) -> str:
    # A number of 0 equals False, and is a default to show.
    said = default is not None and default is not False and default != "" and default != ()
    return f"`{default}`" if said and not callable(default) else ""


def commands_of(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield each command of a command line with its whole name; groups are gone through."""
    if hasattr(command, "commands"):
        for part, inner in command.commands.items():
            yield from commands_of(f"{name} {part}", inner)
    else:
        yield name, command


def command_line(name: str, app: typer.Typer) -> str:
    """Return a section for each command: what it does, its arguments and options."""
    parts = []
    for whole, command in commands_of(name, typer.main.get_command(app)):
        rows = [_option(param) for param in command.params if param.name not in ("help", "context")]
        parts += [
            f"## `{whole}`",
            command.help or "",
            table(("option", "default", "meaning"), rows) if rows else "",
        ]
    return "\n\n".join(part for part in parts if part)


def _option(param: Any) -> tuple[str, str, str]:
    """Return an option's, or an argument's, row."""
    text = getattr(param, "help", None) or ""
    if param.param_type_name == "argument":
        return f"`{param.metavar or param.name.upper()}`", "required", text
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    return names, "required" if param.required else _shown(param.default), text


def serving_command_line() -> str:
    """Return the sections of `vllm-sarathi`."""
    from vllm_sarathi.cli import app

    return command_line("vllm-sarathi", app)


def tuning_command_line() -> str:
    """Return the sections of `autolrs`."""
    from autolrs_plugin.cli import app

    return command_line("autolrs", app)


def metrics() -> str:
    """Return the table of the Prometheus metrics."""
    from vllm_sarathi.core.figures import FIGURES, PREFIX, Kind

    rows = []
    for figure in FIGURES.values():
        name = PREFIX + figure.name + ("_total" if figure.kind is Kind.COUNTER else "")
        by_class = "`slo_class`" if figure.by_class else ""
        rows.append((f"`{name}`", figure.kind.value, by_class, figure.help))
    return table(("metric", "kind", "label beside `engine`", "meaning"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "serve-flags": serve_flags,
    "vllm-sarathi": serving_command_line,
    "autolrs": tuning_command_line,
    "metrics": metrics,
}


def write_pages(folder: Path) -> None:
    """Write the parts into all pages below a folder."""
    for page in sorted(folder.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (filled := on_page_markdown(text)) != text:
            page.write_text(filled, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    write_pages(Path(__file__).parent.parent / "docs")
