"""An idle system: single long prompts, one after the other, to a stock server and to ours.

All servers are up at once and only one of them is busy, so that whatever else the machine does falls on all alike.
There are two of each, for one process can be several percent quicker than another of the same program. Each prompt goes
to all; who is asked first changes from prompt to prompt.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.live.contenders import OURS, parse_contender
from vllm_sarathi.benchmark.live.server import SERVED_NAME, SERVER_FLAGS, serve, server_env
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord, StreamRequest, play
from vllm_sarathi.core.config import STOCK_SCHEDULER

NAME = "idle"
CONTENDERS = (parse_contender(OURS), parse_contender(STOCK_SCHEDULER))
STARTED = (*CONTENDERS, *CONTENDERS[::-1])
"""The servers in the order in which they are started: neither kind is the earlier one on the whole."""

PROMPTS = 12
QUICK_PROMPTS = 4
PROMPT_CHARACTERS = 6500
"""About 1,700 tokens: one step of the stock server's default budget."""
OUTPUT_TOKENS = 8

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
"""English prose that every Python carries: the language reference."""


def idle_requests(count: int) -> list[StreamRequest]:
    """Return `count` long prompts, no two alike."""
    return [
        StreamRequest(f"{NAME} {number}", TEXT[start : start + PROMPT_CHARACTERS], OUTPUT_TOKENS)
        for number, start in enumerate(range(0, count * PROMPT_CHARACTERS, PROMPT_CHARACTERS))
    ]


def run_idle(
    model: str,
    tbt_slo_ms: float,
    count: int,
    out: Path,
    stages: Stages,
    server_flags: Sequence[str] = SERVER_FLAGS,
) -> dict[str, list[StreamRecord]]:
    """Send `count` long prompts one by one, and return what became of them by contender, from both its servers.

    Raises:
        ServerError: a server did not come up.
    """
    records: dict[str, list[StreamRecord]] = {contender.label: [] for contender in CONTENDERS}
    with ExitStack() as stack:
        servers: list[tuple[str, str]] = []
        for number, contender in enumerate(STARTED):
            flags = contender.flags(tbt_slo_ms, tbt_slo_ms)
            stages.begin(f"{NAME}: starting {' '.join(flags)}")
            server = serve(
                model,
                [*server_flags, *flags],
                log_path=out / f"{NAME}-{contender.label}-{number}-{tbt_slo_ms:g}ms.server.log",
                env=server_env(model),
            )
            servers.append((contender.label, stack.enter_context(server).base_url))
        stages.begin(f"{NAME}: {count} prompts to each, by turns", total=len(servers) * count)
        for number, request in enumerate(idle_requests(count)):
            first = number % len(servers)
            for label, base_url in servers[first:] + servers[:first]:
                [record] = asyncio.run(play(base_url, SERVED_NAME, [request])).records
                records[label].append(_after(records[label], record))
                stages.advance(1)
    return records


def _after(earlier: list[StreamRecord], record: StreamRecord) -> StreamRecord:
    """Put a request's times after those of the one before it: each was played on a clock of its own."""
    last = next((each.deliveries[-1].at_s for each in reversed(earlier) if each.deliveries), 0.0)
    return replace(
        record,
        sent_s=record.sent_s + last,
        deliveries=tuple(Delivery(each.at_s + last, each.tokens) for each in record.deliveries),
    )
