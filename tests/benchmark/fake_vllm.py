"""Stands in for `vllm serve`: the same command line, /health, streaming chat API, completions of prompts that are
token ids, /v1/models and the size of the KV cache in /metrics, without a model.

Environment: FAKE_START_S, seconds until /health answers; FAKE_DIE, exit at once with this text;
FAKE_STUBBORN, ignore SIGTERM and keep a child that does too; FAKE_PIDS, a file to write the process ids to;
FAKE_REFUSE, refuse requests whose prompt contains this text; FAKE_READING_TOKENS_PER_S and FAKE_STEP_S, how long
a completion takes (nothing, if not given); FAKE_CONTEXT, FAKE_KV_BLOCKS, what it says of itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAKE = [sys.executable, __file__]
"""The command to use in place of `vllm serve`."""

STARTED = time.monotonic()


class Handler(BaseHTTPRequestHandler):
    """Answers each chat request with its number of tokens as words, two of them in the first delivery."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._json({"data": [{"id": "fake", "max_model_len": int(os.environ["FAKE_CONTEXT"])}]})
        if self.path == "/metrics":
            blocks = os.environ["FAKE_KV_BLOCKS"]
            text = f'vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="{blocks}"}} 1.0\n'
            return self._body("text/plain", text.encode())
        ready = time.monotonic() - STARTED >= float(os.environ.get("FAKE_START_S", "0"))
        self.send_response(200 if ready else 503)
        self.end_headers()
        return None

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            return self._complete(request)
        prompt = request["messages"][0]["content"]
        refuse = os.environ.get("FAKE_REFUSE")
        if refuse and refuse in prompt:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "refused by the fake"}}')
            return None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        sent = 0
        while sent < request["max_tokens"]:
            count = min(2 if sent == 0 else 1, request["max_tokens"] - sent)
            words = "".join(f"w{number} " for number in range(sent, sent + count))
            self._event({"choices": [{"delta": {"content": words}, "token_ids": [7] * count}]})
            sent += count
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": sent}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _complete(self, request: dict[str, Any]) -> None:
        prompt, count = len(request["prompt"]), request["max_tokens"]
        time.sleep(prompt / float(os.environ.get("FAKE_READING_TOKENS_PER_S", "inf")))
        time.sleep(count * float(os.environ.get("FAKE_STEP_S", "0")))
        self._json({"usage": {"prompt_tokens": prompt, "completion_tokens": count}})

    def _json(self, value: object) -> None:
        self._body("application/json", json.dumps(value).encode())

    def _body(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _event(self, event: dict[str, object]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def main() -> None:
    """Serve, or do what the environment asks for instead."""
    print("arguments:", *sys.argv[1:], flush=True)
    if "FAKE_DIE" in os.environ:
        sys.exit(os.environ["FAKE_DIE"])
    pids = [os.getpid()]
    if "FAKE_STUBBORN" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the child
        pids.append(subprocess.Popen(["sleep", "600"]).pid)
    if "FAKE_PIDS" in os.environ:
        Path(os.environ["FAKE_PIDS"]).write_text(json.dumps(pids))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
