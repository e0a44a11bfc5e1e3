"""From fine-tune to serving: an adapter is tuned with AutoLRS under TRL, and loaded into a running, busy server.

    pip install 'vllm-sarathi[cpu,bench,autolrs,transformers,trl]' chatterbot-corpus
    vllm-sarathi reference-model build/models/SmolLM2-135M-Instruct
    python examples/finetune_then_serve.py

1. Fine-tunes a LoRA adapter on a few real question/answer pairs, with TRL's SFTTrainer and one more line: AutoLRS finds
   the learning rate.
2. Serves the model with `vllm serve --scheduler sarathi --tbt-slo-ms N --enable-lora`, and asks it the questions.
3. While streams are decoding, loads the adapter into the running server and asks it the same questions.

It prints the answers before and after, and what the running streams noticed.
"""

import argparse
import asyncio
import itertools
import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from vllm_sarathi.benchmark.live.server import SERVED_NAME, SERVER_FLAGS, Server, serve, server_env
from vllm_sarathi.benchmark.live.streams import Delivery, Played, StreamRequest, play

MODEL = "build/models/SmolLM2-135M-Instruct"
ADAPTER = "tuned"
PAIRS = 4
RANK = 16
STREAMS = 4
STREAM_TOKENS = 320
LOAD_AFTER_TOKENS = 30


def question_answer_pairs(count: int, longest_words: int = 12) -> list[tuple[str, str]]:
    """Return the first questions of the chatterbot corpus about artificial intelligence that have a short answer."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("chatterbot-corpus is not installed: pip install chatterbot-corpus")
    path = Path(spec.submodule_search_locations[0]) / "data" / "english" / "ai.yml"
    talks = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    pairs = {str(talk[0]): str(talk[1]) for talk in talks if len(str(talk[1]).split()) <= longest_words}
    return list(pairs.items())[:count]


def chat(question: str) -> list[dict[str, str]]:
    """Return a question as a chat, with a short system prompt in place of the model's own long one."""
    return [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": question}]


def fine_tune(model: str, pairs: Sequence[tuple[str, str]], steps: int, out: Path) -> dict[str, Any]:
    """Train an adapter on `pairs` into `out`, at a learning rate that AutoLRS finds; return what it found."""
    # Seconds to import, and the server needs none of them.
    import datasets
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from autolrs_plugin.integrations.transformers import AutoLRSCallback

    rows = [{"prompt": chat(q), "completion": [{"role": "assistant", "content": a}]} for q, a in pairs]
    # A run of so few steps needs a large share of them to search in.
    tuner = AutoLRSCallback(lr_range=(1e-4, 3e-2), search_budget=1.0)
    trainer = SFTTrainer(
        model=model,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(22, 30)),  # the upper ones: the backward pass ends there
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=str(out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=len(rows),
            model_init_kwargs={"dtype": torch.float32},
            gradient_checkpointing=False,
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=0,
        ),
        callbacks=[tuner],
    )
    trainer.train()
    trainer.save_model(str(out))
    losses, peak_lr = tuner.run.controller.losses, max(tuner.schedule.lrs)
    print(f"fine-tuned: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    print(f"AutoLRS: peak learning rate {peak_lr:.2e}, after {tuner.ledger.search.steps} steps of search")
    return {"losses": losses, "peak_lr": peak_lr, "search_steps": tuner.ledger.search.steps}


def ask(name: str, pairs: Sequence[tuple[str, str]]) -> list[StreamRequest]:
    """Return the questions as requests to the model or adapter `name`."""
    return [
        StreamRequest(f"{name}: {q}", q, 32, extra={"model": name, "messages": chat(q)}) for q, _ in pairs
    ]


async def answers(server: Server, name: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return what the model or adapter `name` answers, greedily."""
    records = (await play(server.base_url, SERVED_NAME, ask(name, pairs))).records
    for record in records:
        if record.error is not None:
            raise RuntimeError(f"{record.name}: {record.error}")
    return [record.text.strip() for record in records]


async def load_while_streaming(
    server: Server, adapter: Path, pairs: Sequence[tuple[str, str]]
) -> tuple[list[str], Played, tuple[float, float]]:
    """Load the adapter while streams are decoding, and ask it; return its answers, the streams, and when it was loaded.

    The times of the load are seconds on the clock of the streams.
    """
    counts: dict[str, int] = {}
    decoding = asyncio.Event()

    def note(request: StreamRequest, delivery: Delivery) -> None:
        counts[request.name] = counts.get(request.name, 0) + delivery.tokens
        if len(counts) == STREAMS and min(counts.values()) >= LOAD_AFTER_TOKENS:
            decoding.set()

    story = "Tell me a long story about a journey, number {}."
    requests = [
        StreamRequest(f"stream {i}", story.format(i), STREAM_TOKENS, extra={"ignore_eos": True})
        for i in range(STREAMS)
    ]
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    streams = asyncio.create_task(play(server.base_url, SERVED_NAME, requests, on_delivery=note))
    await decoding.wait()
    load_began_s = loop.time() - started_s
    async with httpx.AsyncClient(base_url=server.base_url, trust_env=False, timeout=60.0) as client:
        body = {"lora_name": ADAPTER, "lora_path": str(adapter)}
        (await client.post("/v1/load_lora_adapter", json=body)).raise_for_status()
    load_ended_s = loop.time() - started_s
    told = await answers(server, ADAPTER, pairs)
    if streams.done():
        raise RuntimeError("the streams had ended before the adapter answered: they noticed nothing of it.")
    return told, await streams, (load_began_s, load_ended_s)


def gaps_ms(played: Played, began_s: float = 0.0, ended_s: float = float("inf")) -> list[float]:
    """Return the times between tokens of the running streams, in ms: of all tokens, or of those around a time."""
    found = []
    for record in played.records:
        times = [delivery.at_s for delivery in record.deliveries]
        found += [1e3 * (b - a) for a, b in itertools.pairwise(times) if b >= began_s and a <= ended_s]
    return found


def serve_and_load(
    options: argparse.Namespace, pairs: Sequence[tuple[str, str]], adapter: Path
) -> dict[str, Any]:
    """Serve, ask, load, ask again; return what was found."""
    flags = [
        *SERVER_FLAGS,
        # In bfloat16 an answer depends on how its prompt was cut and batched; here the adapter alone is to change it.
        "--dtype=float32",
        "--scheduler=sarathi",
        f"--tbt-slo-ms={options.tbt_slo_ms:g}",
        "--calibration-dir=none",
        f"--step-trace={options.out / 'steps.jsonl'}",  # `vllm-sarathi trace` shows what the scheduler did
        "--enable-lora",
        f"--max-lora-rank={RANK}",
        # One more than there are adapters: on CPUs, vLLM takes the last slot for requests without an adapter, too.
        "--max-loras=2",
    ]
    environment = {**server_env(options.model), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    print("starting the server ...", flush=True)
    with serve(options.model, flags, log_path=options.out / "server.log", env=environment) as server:
        before = asyncio.run(answers(server, SERVED_NAME, pairs))
        after, played, (began_s, ended_s) = asyncio.run(load_while_streaming(server, adapter, pairs))
        unchanged = asyncio.run(answers(server, SERVED_NAME, pairs))
    failed = [record.error for record in played.records if record.error is not None]
    everything, around = gaps_ms(played), gaps_ms(played, began_s, ended_s)
    return {
        "before": before,
        "after": after,
        "unchanged": unchanged == before,
        "failed": failed,
        "tbt_slo_ms": options.tbt_slo_ms,
        "load_ms": 1e3 * (ended_s - began_s),
        "gaps": len(everything),
        "p50_ms": float(np.percentile(everything, 50)),
        "p99_ms": float(np.percentile(everything, 99)),
        "longest_ms": max(everything),
        "load_gaps": len(around),
        "load_p99_ms": float(np.percentile(around, 99)),
        "client_stall_ms": 1e3 * played.client_stall_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=MODEL, help="a folder with SmolLM2-135M-Instruct, or another chat model"
    )
    parser.add_argument("--steps", type=int, default=30, help="training steps, search not included")
    parser.add_argument("--tbt-slo-ms", type=float, default=400.0, help="SLO for the time between tokens")
    parser.add_argument("--out", type=Path, default=Path("build/finetune"))
    options = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = question_answer_pairs(PAIRS)
    tuned = fine_tune(options.model, pairs, options.steps, options.out / "adapter")
    found = {**tuned, **serve_and_load(options, pairs, (options.out / "adapter").resolve())}
    for (question, answer), before, after in zip(pairs, found["before"], found["after"], strict=True):
        print(f"\nQ: {question}\n  trained: {answer}\n  before:  {before}\n  after:   {after}")
    found["trained_answers_before"] = sum(b == a for (_, a), b in zip(pairs, found["before"], strict=True))
    found["trained_answers_after"] = sum(b == a for (_, a), b in zip(pairs, found["after"], strict=True))
    (options.out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    right = found["trained_answers_before"], found["trained_answers_after"]
    print(f"\ntrained answers: {right[0]} of {PAIRS} before, {right[1]} after")
    print(
        f"{STREAMS} running streams: time between tokens P50 {found['p50_ms']:.0f} ms, P99 {found['p99_ms']:.0f} ms, "
        f"longest {found['longest_ms']:.0f} ms; the SLO was {found['tbt_slo_ms']:g} ms. While the adapter was "
        f"loaded ({found['load_ms']:.0f} ms): P99 {found['load_p99_ms']:.0f} ms of {found['load_gaps']} gaps."
    )


if __name__ == "__main__":
    main()
