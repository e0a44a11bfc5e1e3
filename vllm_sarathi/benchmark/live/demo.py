"""The demo: one short scenario, played against the stock scheduler and against Sarathi, on a real model.

Several chats are streaming when long prompts land among them. Stock vLLM reads a long prompt in steps as
large as its own token limit, and every stream waits for such a step to end; Sarathi reads it in pieces that
fit beside the decodes.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.common.results import write_results
from vllm_sarathi.benchmark.live.measures import summarise_streams
from vllm_sarathi.benchmark.live.server import SERVED_NAME, SERVER_FLAGS, serve, server_env
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord, StreamRequest, play
from vllm_sarathi.benchmark.live.timeline import draw_timeline
from vllm_sarathi.core.files import write_whole

LONG_PREFIX = "long"

CHATS = (
    "Explain how a bicycle stays upright, step by step and in detail.",
    "Tell me a long story about a lighthouse keeper and a storm.",
    "Write a detailed guide to baking bread at home for a beginner.",
    "Describe the water cycle for a school class, with many examples.",
    "Write a long letter to a friend about a week in the mountains.",
    "Explain what a computer does when it starts, in as much detail as you can.",
)
CHAT_TOKENS = 160
CHAT_EVERY_TOKENS = 3

# English prose that every Python carries: the language reference.
LONG_TOPICS = ("specialnames", "compound", "types", "formatstrings")
LONG_CHARACTERS = 6500
LONG_TOKENS = 32
LONG_FIRST_TOKEN = 15
LONG_EVERY_TOKENS = 35
"""The last chat's tokens are the clock, so that each prompt lands among all chats on any machine."""

# A client that was kept from running for longer than this has noted its tokens too late to tell a stall from none.
CLIENT_STALL_LIMIT_S = 0.5
TAKES = 3

WARM_UP_TOPIC = "string-methods"


def long_prompt(topic: str) -> str:
    """A prompt of about 1,700 tokens of English."""
    return f"Summarise this text in a few sentences.\n\n{topics[topic][:LONG_CHARACTERS]}"


def scenario() -> list[StreamRequest]:
    """The chats, one shortly after the other, and the long prompts that land among them."""
    chats = [
        StreamRequest(
            f"chat {number}",
            prompt,
            CHAT_TOKENS,
            after=(f"chat {number - 1}", CHAT_EVERY_TOKENS) if number > 1 else None,
        )
        for number, prompt in enumerate(CHATS, start=1)
    ]
    longs = [
        StreamRequest(
            f"{LONG_PREFIX} {number}",
            long_prompt(topic),
            LONG_TOKENS,
            after=(chats[-1].name, LONG_FIRST_TOKEN + (number - 1) * LONG_EVERY_TOKENS),
        )
        for number, topic in enumerate(LONG_TOPICS, start=1)
    ]
    return chats + longs


def warm_up() -> list[StreamRequest]:
    """One short and one long request: first calls pay for caches and threads, which are not compared."""
    return [
        StreamRequest("warm-up chat", "Say hello.", 8),
        StreamRequest("warm-up long", long_prompt(WARM_UP_TOPIC), 8, send_at_s=0.5),
    ]


def scheduler_flags(token_budget: int) -> dict[str, list[str]]:
    """The two runs, by the name that they have in the results."""
    return {
        "default": ["--scheduler", "default"],
        "sarathi": ["--scheduler", "sarathi", "--token-budget", str(token_budget)],
    }


def titles(token_budget: int) -> dict[str, str]:
    """The runs' titles in the picture and in the output."""
    return {
        "default": "vLLM's scheduler",
        "sarathi": f"vLLM with --scheduler sarathi --token-budget {token_budget}",
    }


def run_demo(model: str, out: Path, token_budget: int, console: Console) -> None:
    """Play the scenario against stock vLLM and against Sarathi with `token_budget`; the results go to `out`.

    Writes result.json, streams.json (every delivery), timeline.png and the servers' logs. Raises
    ServerError when a server does not start, and RuntimeError when a request fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    shown = titles(token_budget)
    runs = {
        name: _play_run(name, shown[name], model, flags, out, console)
        for name, flags in scheduler_flags(token_budget).items()
    }
    results = {name: summarise_streams(records) for name, records in runs.items()}
    streams = {name: [asdict(record) for record in records] for name, records in runs.items()}
    write_whole(out / "streams.json", json.dumps(streams, indent=1) + "\n")
    write_results(out / "result.json", runs=results)
    draw_timeline(
        {shown[name]: records for name, records in runs.items()},
        frozenset(request.name for request in scenario() if request.name.startswith(LONG_PREFIX)),
        out / "timeline.png",
        title="Long prompts land among running chats",
    )
    _print_answers(runs, console)
    console.print(results_table(results))
    console.print(f"picture: {out / 'timeline.png'}\nfigures: {out / 'result.json'}")
    failures = [f"{name}, {r.name}: {r.error}" for name, records in runs.items() for r in records if r.error]
    if failures:
        raise RuntimeError("not every request ran to its end:\n" + "\n".join(failures))


def _play_run(
    name: str, title: str, model: str, flags: Sequence[str], out: Path, console: Console
) -> list[StreamRecord]:
    console.print(f"[bold]{title}[/bold]")
    with Stages(console) as stages:
        stages.begin("starting the server")
        with serve(
            model, [*SERVER_FLAGS, *flags], log_path=out / f"server-{name}.log", env=server_env(model)
        ) as server:
            stages.begin("warming up")
            for record in asyncio.run(play(server.base_url, SERVED_NAME, warm_up())).records:
                if record.error:
                    raise RuntimeError(f"the model does not answer chat requests: {record.error}")
            records = _play_undisturbed(server.base_url, stages)
            stages.begin("stopping the server")
    took_s = max((record.deliveries[-1].at_s for record in records if record.deliveries), default=0.0)
    console.print(f"  server ready in {server.startup_s:.0f} s, scenario over in {took_s:.0f} s")
    return records


def _play_undisturbed(base_url: str, stages: Stages) -> list[StreamRecord]:
    """Play the scenario, again if other work on the machine held this client up: late notes are no measurement.

    The rule looks at the client alone, never at the figures, and is the same for every run.
    """
    requests = scenario()

    def show(request: StreamRequest, delivery: Delivery) -> None:
        stages.advance(delivery.tokens)

    for take in range(1, TAKES + 1):
        stages.begin("chats are streaming", total=sum(request.max_tokens for request in requests))
        played = asyncio.run(play(base_url, SERVED_NAME, requests, on_delivery=show))
        if played.client_stall_s <= CLIENT_STALL_LIMIT_S:
            break
        stages.console.print(
            f"  [yellow]other work on this machine held the demo's own client up for {played.client_stall_s:.1f} s: "
            + (
                "playing again"
                if take < TAKES
                else "the figures include that; run the demo on a quieter machine"
            )
        )
    return played.records


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per run; times in milliseconds."""
    table = Table(title="what the clients saw")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def row(label: str, *path: str) -> None:
        cells = []
        for result in results.values():
            value: Any = result
            for key in path:
                value = value[key]
            cells.append("-" if value is None else f"{value:,.0f}")
        table.add_row(label, *cells)

    for key in ("p50", "p90", "p99", "max"):
        row(f"time between tokens, {key.upper() if key != 'max' else 'longest'}, ms", "gap_ms", key)
    for key in ("mean", "p50", "p90", "p99"):
        row(f"time to first token, {key.upper() if key != 'mean' else key}, ms", "ttft_ms", key)
    row("output tokens per second", "output_tokens_per_s")
    row("requests", "requests")
    row("requests that ran to their end", "completed")
    return table


def _print_answers(runs: Mapping[str, Sequence[StreamRecord]], console: Console) -> None:
    """The beginning of one chat and of one summary, as each run told it."""
    prompts = {request.name: request.prompt for request in scenario()}
    for stream in ("chat 1", "long 1"):
        console.print(f"[bold]{stream}[/bold]: {prompts[stream].splitlines()[0]}")
        for name, records in runs.items():
            text = next(record.text for record in records if record.name == stream)
            console.print(f"  [cyan]{name}[/cyan] {' '.join(text.split())[:240]}...", highlight=False)
