"""Looks at a server once, or until told to stop."""

import json
import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vllm_sarathi.top.scrape import Scrape, TopError, fetch, metrics_url, parse
from vllm_sarathi.top.view import compare, render

LEAST_INTERVAL_S, MOST_INTERVAL_S = 0.1, 3600.0
TIMEOUT_S = 10.0


def check_options(url: str, interval_s: float, once: bool, as_json: bool) -> str:
    """Return the address of the server's /metrics.

    Raises:
        TopError: an option is wrong.
    """
    if not LEAST_INTERVAL_S <= interval_s <= MOST_INTERVAL_S:
        raise TopError(
            f"--interval {interval_s:g}: must be a number of seconds from {LEAST_INTERVAL_S:g} to "
            f"{MOST_INTERVAL_S:g}."
        )
    if as_json and not once:
        raise TopError("--json: valid with --once.")
    return metrics_url(url)


def print_once(address: str, interval_s: float, as_json: bool) -> None:
    """Look twice and print what happened between.

    Raises:
        TopError: the server does not answer, or has no figures of ours.
    """
    before = _look(address)
    time.sleep(interval_s)
    view = compare(address, before, _look(address))
    if as_json:
        print(json.dumps(view.to_mapping(), indent=2, allow_nan=False))
    else:
        Console().print(render(view))


def watch(address: str, interval_s: float) -> None:
    """Show the server until Ctrl-C; one that does not answer for a while is asked again.

    Raises:
        TopError: it does not answer to begin with, or has no figures of ours.
    """
    before = _look(address)
    with Live(Text(f"connecting to {address} ..."), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                try:
                    after = _look(address)
                except TopError as error:
                    live.update(Text(str(error), style="bold red"), refresh=True)
                    continue
                live.update(render(compare(address, before, after)), refresh=True)
                before = after
        except KeyboardInterrupt:
            return


def _look(address: str) -> Scrape:
    return parse(fetch(address, TIMEOUT_S), address, time.monotonic())
