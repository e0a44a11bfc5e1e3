"""The live workloads, fitted to a device: lengths, rates and SLOs, from how fast it prefills and decodes.

Notation: R tokens/s read, D seconds a decode step, each with a 0 for the reference device. A step that reads c prompt
tokens beside decodes takes about D + c/R. With prompts x L and times (SLOs, gaps between arrivals) x T = L R0/R,

- offered load, the share of R that the arrivals need, is that of the reference: (rate/T) (tokens L) / R;
- an SLO is worth as many parts of a prompt: the budget of L c tokens takes the share of T x SLO here that c
  tokens take of the SLO there. With L = 1 a token budget is right as it stands, whatever the device;
- decode steps take the share of an SLO that they take there where L = (D/D0) (R/R0).

So L is that where it is above 1 (a GPU reads fifty times as fast and decodes four times as fast: longer prompts), as
far as the model's context and the KV cache have room. Where they have not, T is as long as decode steps need, and
the device is loaded less than the reference: `load` says how much.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from vllm_sarathi.benchmark.live.server import MAX_MODEL_LEN, MAX_NUM_SEQS
from vllm_sarathi.simulation.workloads.live import LiveWorkload

REFERENCE_READING_TOKENS_PER_S = 1000.0
"""Of the two CPU cores that the README's live tables are from, with SmolLM2-135M: a prompt of 2,000 tokens alone has
its first token after 2.0 s (one of 100 after 0.11 s), and one of 1,700 beside six chats holds these up for 1.6 s."""
REFERENCE_DECODE_STEP_S = 0.02
"""Of the same device: 13 ms with one stream to 28 ms with the demo's six."""

MOST_DECODE = 1.5
"""How much more of an SLO than on the reference a decode step may take: there, the strictest (150 ms) is 7.5 decode
steps; five, the paper's strict SLO, are left."""
MOST_PROMPTS = 16.0
"""The most that prompts are lengthened: to 48,000 tokens."""
CONTEXTS_IN_KV = 4
"""The KV cache holds this many of the longest sequences (4,096 tokens as written), or prompts are lengthened less: read
in order at 800 tokens/s, the requests of sixty draws of each workload held 2.7 of them at once, at most."""
MOST_REQUESTS = 10.0
"""The most that requests are multiplied by, on a device on which a run would be over in seconds."""
LEAST_CONTEXT = 256
"""Tokens; outputs are not scaled, and the longest are 160."""


@dataclass(frozen=True)
class Speeds:
    """What was measured of a device, one request at a time, through the stock server.

    Attributes:
        reading_tokens_per_s: a long prompt's tokens over the time to its answer of one token.
        decode_step_s: of one stream alone.
        context_tokens: the longest sequence that the server takes.
        kv_tokens: what its KV cache holds; None where it does not say.
    """

    reading_tokens_per_s: float
    decode_step_s: float
    context_tokens: int
    kv_tokens: int | None


@dataclass(frozen=True)
class Scale:
    """What the workloads as written are multiplied by.

    Attributes:
        speeds: what it follows from; None for workloads as written.
        times: SLOs, and the times between arrivals.
        prompts: the lengths of prompts.
        requests: how many are sent.
        load: the share of the reading speed that arrivals need, over that on the reference device.
    """

    speeds: Speeds | None
    times: float
    prompts: float
    requests: float
    load: float

    @classmethod
    def of(cls, speeds: Speeds) -> Self:
        """Return the scale for a device.

        Raises:
            RuntimeError: the model's context is too short for any of the workloads.
        """
        if speeds.context_tokens < LEAST_CONTEXT:
            raise RuntimeError(
                f"--scale auto: the model takes {speeds.context_tokens} tokens; the workloads need {LEAST_CONTEXT}."
            )
        reading = speeds.reading_tokens_per_s / REFERENCE_READING_TOKENS_PER_S
        decode = speeds.decode_step_s / REFERENCE_DECODE_STEP_S
        room = speeds.context_tokens / MAX_MODEL_LEN
        kv_room = MOST_PROMPTS
        if speeds.kv_tokens is not None:
            kv_room = max(1.0, speeds.kv_tokens / (CONTEXTS_IN_KV * MAX_MODEL_LEN))
        prompts = min(max(1.0, decode * reading), MOST_PROMPTS, room, kv_room)
        times = max(prompts / reading, decode / MOST_DECODE)
        return cls(
            speeds,
            times=_three_digits(times),
            prompts=prompts,  # rounded up, they would not fit
            requests=_three_digits(min(max(1.0, 1 / times), MOST_REQUESTS)),
            load=_three_digits(prompts / reading / times),
        )

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Self:
        """Return the scale that `to_json` told of.

        Raises:
            KeyError, TypeError: it is something else.
        """
        return cls(Speeds(**told["measured"]), **told["factors"])

    def to_json(self) -> dict[str, Any]:
        """Return what was measured, the reference, and the factors."""
        assert self.speeds is not None
        factors = asdict(self)
        del factors["speeds"]
        return {
            "measured": asdict(self.speeds),
            "reference": {
                "reading_tokens_per_s": REFERENCE_READING_TOKENS_PER_S,
                "decode_step_s": REFERENCE_DECODE_STEP_S,
            },
            "factors": factors,
        }

    def about(
        self, workloads: Iterable[LiveWorkload], tbt_slos_ms: Iterable[float], ttft_slo_ms: float
    ) -> dict[str, Any] | None:
        """Return `to_json` and what became of workloads and SLOs as written; None for workloads as written."""
        if self.speeds is None:
            return None
        scaled = [self.workload(workload) for workload in workloads]
        return {
            **self.to_json(),
            "slos": [
                {"reference_tbt_slo_ms": tbt_slo_ms, "tbt_slo_ms": self.slo_ms(tbt_slo_ms)}
                for tbt_slo_ms in tbt_slos_ms
            ],
            "ttft_slo_ms": self.slo_ms(ttft_slo_ms),
            "workloads": [
                {
                    "workload": each.name,
                    "requests": each.requests,
                    "rate_per_s": each.rate_per_s,
                    "prompt_tokens": [list(kind.prompt_tokens) for kind in each.kinds],
                }
                for each in scaled
            ],
        }

    def slo_ms(self, written_ms: float) -> float:
        """Return what an SLO on the reference device is here."""
        return written_ms if self.speeds is None else float(f"{written_ms * self.times:.4g}")

    def workload(self, workload: LiveWorkload) -> LiveWorkload:
        """Return what a workload is here."""
        kinds = []
        for kind in workload.kinds:
            low, high = (max(1, round(tokens * self.prompts)) for tokens in kind.prompt_tokens)
            kinds.append(replace(kind, prompt_tokens=(low, high)))
        return replace(
            workload,
            kinds=tuple(kinds),
            requests=round(workload.requests * self.requests),
            rate_per_s=workload.rate_per_s / self.times,
        )

    def budget(self, tokens: int) -> int:
        """Return what a token budget on the reference device is here: it grows with the prompts, not with speed."""
        return max(MAX_NUM_SEQS, round(tokens * self.prompts / MAX_NUM_SEQS) * MAX_NUM_SEQS)

    @property
    def server_flags(self) -> list[str]:
        """What a server needs beside SERVER_FLAGS."""
        return [] if self.prompts == 1 else [f"--max-model-len={int(MAX_MODEL_LEN * self.prompts)}"]

    @property
    def sentence(self) -> str:
        """What was measured and done, for people; empty for workloads as written."""
        if self.speeds is None:
            return ""
        said = (
            f"scaled to this device: it prefills {self.speeds.reading_tokens_per_s:,.0f} tokens/s (reference: "
            f"{REFERENCE_READING_TOKENS_PER_S:,.0f}), a decode step takes {self.speeds.decode_step_s * 1e3:.3g} ms "
            f"({REFERENCE_DECODE_STEP_S * 1e3:g}); times x {self.times:g}, prompts x {self.prompts:.3g}, "
            f"requests x {self.requests:g}"
        )
        if self.load < 1:
            said += (
                f"; its load is {self.load:.0%} of the reference's, since decode steps take most of the time: "
                "measure with a larger model, or one with a longer context"
            )
        return said


AS_WRITTEN = Scale(None, times=1.0, prompts=1.0, requests=1.0, load=1.0)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
