"""The command `top`: a server's SLOs in a terminal."""

from typing import Annotated

import typer

UrlArgument = Annotated[str, typer.Argument(help="The server's address, such as http://127.0.0.1:8000.")]
IntervalOption = Annotated[
    float, typer.Option(help="Seconds between two scrapes, over which rates are taken.")
]
OnceOption = Annotated[bool, typer.Option("--once", help="Scrape twice, print, and end.")]
JsonOption = Annotated[bool, typer.Option("--json", help="With --once: print JSON.")]


def top(
    url: UrlArgument,
    interval: IntervalOption = 2.0,
    once: OnceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Watch a server's SLOs: attainment, waiting requests, and headroom."""
    from vllm_sarathi.top.watch import check_options, print_once, watch

    address = check_options(url, interval, once, as_json)
    if once:
        print_once(address, interval, as_json)
    else:
        watch(address, interval)
