"""The documents, and what can be read out of them: code blocks, commands, links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.test_house import ROOT

PROJECT = "https://github.com/vllm-sarathi/vllm-sarathi"
RAW = "https://raw.githubusercontent.com/vllm-sarathi/vllm-sarathi"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")


def page_id(path: Path) -> str:
    """Return the name of a page in a test's id."""
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: the word behind the fence; may be empty.
        text: what is in it.
    """

    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    return [Block(*found.groups()) for found in FENCE.finditer(text)]


def section_of(text: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one of its level or a higher one."""
    level = len(heading) - len(heading.lstrip("#"))
    rest = text.partition(f"\n{heading}\n")[2]
    assert rest, f"no heading {heading!r}"
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.M)[0]


def prose_of(text: str) -> str:
    """Return a page without its code, its quoted file names and its link targets."""
    text = re.sub(r"<!--.*?-->", " ", FENCE.sub(" ", text), flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", INLINE.sub(" ", text))


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield each line of the `bash` blocks of a page as words, without its comment and its environment variables.

    A backslash at the end of a line continues it.
    """
    for block in blocks_of(text):
        if block.language == "bash":
            yield from _words(block.text.replace("\\\n", " ").splitlines())


OURS = r"(vllm-sarathi|autolrs|vllm serve|make|pip install) \S"
"""How a command begins that a page may show anywhere: one of this project, or one that installs it."""


def commands_in_text(text: str) -> Iterator[list[str]]:
    """Yield the lines of the `text` blocks of a page that begin with one of our commands, as words."""
    for block in blocks_of(text):
        if block.language == "text":
            lines = block.text.replace("\\\n", " ").splitlines()
            yield from _words([line for line in lines if re.match(OURS, line)])


def commands_in_docstring(text: str) -> Iterator[list[str]]:
    """Yield the lines of an example's docstring that are commands, as words."""
    lines = [line.strip() for line in text.splitlines()]
    yield from _words([line for line in lines if re.match(rf"{OURS}|python \S+\.py", line)])


def mentioned_in(text: str) -> Iterator[list[str]]:
    """Yield what is mentioned of our commands in the text of a page, as words; it need not be a whole command line."""
    spans = INLINE.findall(FENCE.sub("", text))
    yield from _words([s for s in spans if re.match(OURS, s)])


def _words(lines: list[str]) -> Iterator[list[str]]:
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def links_of(text: str) -> Iterator[str]:
    """Yield the target of each link and picture."""
    yield from re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}
