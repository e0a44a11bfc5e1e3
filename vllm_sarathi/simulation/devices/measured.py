"""Step times from measured kernels: a thin source over the package aiconfigurator-core (`vllm-sarathi[devices]`).

The package holds kernel times that its makers measured on real devices with vLLM's own kernels, and adds them up for
a step. A step is what its parts take:

    decodes alone     generation kernels at that batch, attention at the mean context
    with a chunk      context kernels at all of the step's tokens, attention of the chunks over their prefixes,
                      attention of the decodes

Its own sum for a step with a chunk, `mixed_step_latency`, spreads a prompt's attention evenly over its chunks
(divided by ceil(isl / chunk)), so the chunk at the end of a long prompt costs too little there, and a prefix makes
attention cheaper. The sum here asks for the attention of the very chunk over its very prefix instead.

What tables leave out is added: the padding to the sizes of captured graphs (`graphs`), and what layers and steps launch
beside the kernels in the tables, by which factor those are off, and the host's share (`corrections`).
"""

import copy
import functools
import importlib.metadata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.devices.corrections import FAMILIES, Parts, Place, corrections_for, family
from vllm_sarathi.simulation.devices.graphs import capture_limit, captured_sizes, eager_s, padded
from vllm_sarathi.simulation.devices.package import (
    BACKEND,
    BLOCK_FP8,
    PACKAGE,
    Spread,
    compile_engine,
    quiet,
    read_config,
    system_of,
    tables_of,
)
from vllm_sarathi.simulation.devices.source import Source

LARGER_SIZES = 3
"""Captured sizes above a step's own that are searched for a quicker entry."""

TODAY = (0, 18)
"""Of the vLLM whose kernels and launches are stated here, and of all after it."""

OLDER_EXPERTS, OLDER_EXPERT_TOKENS = (0, 14), 128
"""Block-scaled experts of vLLM before that version read all weights at any batch: they take the time of 128 tokens.
With it the rows of Qwen3-235B-A22B-FP8 with even ids need nothing else to be added; 64 leave 5 ms of a step, and 256
are 4 too many."""

CONTEXT_STEP_TOKENS = 64
"""The context tokens between two queries of decode attention; it is interpolated between them."""

TABLES = frozenset({"silicon", "mixed"})
"""Sources of the package that are measured, `mixed` in part."""

FORMULA = "empirical"
"""The package's word for element-wise kernels: their bytes over a measured share of the bandwidth."""

ACTIVATION_TOKENS = 8192
"""The largest step that memory is kept for: vLLM's default on devices of this size."""

PROBE_CHUNK, PROBE_DECODES, PROBE_CONTEXT = 512, 32, 4096
"""The steps whose parts are looked at to say how far to trust a deployment's times."""


@dataclass(frozen=True, slots=True)
class Memory:
    """One device's memory, bytes, by the package's model of vLLM.

    Attributes:
        weights: of the model, its share.
        other: activations of the largest step, communication and the runtime.
        kv_token: one token in the KV cache, its share.
        tokens_in: how many tokens a number of bytes of KV cache holds; layers with a sliding window end to grow.
    """

    weights: float
    other: float
    kv_token: float
    tokens_in: Callable[[float], int]


class Kernels:
    """The kernel times of a model on devices, compiled once and asked for many times.

    Args:
        model: one of the values of `known_models`.
        unit: the device, one of SYSTEMS.
        spread: how the model is spread.
        sequences: `max_num_seqs`, by which vLLM chooses what it captures.

    Raises:
        NotMeasured: the package lacks the device, or tables for this model or precision on it.
    """

    def __init__(self, model: str, unit: str, spread: Spread, sequences: int = 1024) -> None:
        self._model = model
        self.system = system_of(unit)
        self.version = tables_of(self.system)
        config = read_config(model)
        self.max_tokens = int(config["context"])
        self._engine, self.arguments = compile_engine(
            model, self.system, spread.arguments(experts=bool(config["num_experts"])), spread.skew
        )
        self.sizes = captured_sizes(sequences, capture_limit(unit))
        self._least_expert_tokens = 0
        self._find_parts()
        self.place = Place.of(config, self.system, spread)
        self.corrections = corrections_for(self.place)
        self._older: dict[tuple[int, int], Kernels] = {}
        self._shared: dict[int, float] = {}
        self._decode_fixed: dict[int, float] = {}
        self._decode_attention: dict[int, tuple[float, float]] = {}

    def under(self, version: tuple[int, int]) -> "Kernels":
        """Return the kernels as a version of vLLM ran them."""
        if version >= TODAY:
            return self
        if version in self._older:
            return self._older[version]
        made = self._older[version] = copy.copy(self)
        made._shared, made._decode_fixed, made._decode_attention = {}, {}, {}
        if version < OLDER_EXPERTS and self.place.precision == BLOCK_FP8 and self.place.experts:
            made._least_expert_tokens = OLDER_EXPERT_TOKENS
        made.place = replace(self.place, two_norms=True)
        made.corrections = corrections_for(made.place)
        return made

    def _find_parts(self) -> None:
        engine = self._engine
        shared, chunk, attention = engine.mixed_step_breakdown_per_op(
            PROBE_CHUNK, PROBE_DECODES, PROBE_CONTEXT, 2
        )
        decode = engine.decode_step_per_op(PROBE_DECODES, PROBE_CONTEXT, 2)
        self._chunk_ops, self._shared_ops = _attention_first(
            lambda index, prefix: engine.evaluate_context_ops([index], 1, PROBE_CHUNK, prefix)[0], chunk
        )
        self._decode_ops, self._decode_rest = _attention_first(
            lambda index, more: engine.evaluate_generation_ops([index], PROBE_DECODES, PROBE_CONTEXT + more)[
                0
            ],
            attention,
        )
        named = engine.evaluate_context_ops(self._shared_ops, 1, 1)
        # Where all of a layer's reductions are counted together, those around the experts are counted twice.
        self._twice = (
            [index for index, part in zip(self._shared_ops, named, strict=True) if "dispatch" in part[0]]
            if any("tp_allreduce" in part[0] for part in named)
            else []
        )
        self._shared_ops = [index for index in self._shared_ops if index not in self._twice]
        self.parts = tuple((name, time_ms, source) for name, time_ms, _, source in (*shared, *chunk, *decode))
        self.p2p_s = sum(time_ms for name, time_ms, *_ in shared if name.endswith("_p2p")) / 1e3
        self.provenance = engine.last_provenance()

    def decode_s(self, decodes: int, context_tokens: int) -> float:
        """Return the seconds of a step of decodes alone; `context_tokens` is summed over them."""
        fixed_s = self._decode_fixed.get(decodes)
        if fixed_s is None:
            size = padded(decodes, self.sizes)
            fixed_s = self._at_least(decodes, self.corrections.total_s(self.decode_parts_s(size)))
            self._decode_fixed[decodes] = fixed_s
        return fixed_s + self.decode_attention_s(decodes, context_tokens)

    def decode_parts_s(self, decodes: int) -> Parts:
        """Return the seconds of all but the attention in a step of decodes alone, by family, as tables say."""
        parts = self._least_s(
            lambda size: self._engine.evaluate_generation_ops(self._decode_rest, size, PROBE_CONTEXT), decodes
        )
        if self._twice:
            again = self._engine.evaluate_context_ops(self._twice, 1, decodes)
            parts["moe"] = max(0.0, parts["moe"] - sum(part[1] for part in again) / 1e3)
        if decodes < self._least_expert_tokens:
            parts["moe"] = self.decode_parts_s(self._least_expert_tokens)["moe"]
        return parts

    def decode_attention_s(self, decodes: int, context_tokens: int) -> float:
        """Return the seconds that decodes read the KV cache, at the mean of their contexts."""
        mean = context_tokens / decodes + 1
        slot = int(mean / CONTEXT_STEP_TOKENS)
        key = slot << 20 | decodes
        line = self._decode_attention.get(key)
        if line is None:
            start, end = slot * CONTEXT_STEP_TOKENS, (slot + 1) * CONTEXT_STEP_TOKENS
            scale = self.corrections.scales["attention"]
            base_s, next_s = (scale * self.attend_s(decodes, max(1, at)) for at in (start, end))
            slope = (next_s - base_s) / CONTEXT_STEP_TOKENS
            line = self._decode_attention[key] = (base_s - slope * start, slope)
        return line[0] + line[1] * mean

    def attend_s(self, decodes: int, context: int) -> float:
        """Return the seconds that decodes of one context take for their attention, as tables say."""
        parts = self._engine.evaluate_generation_ops(self._decode_ops, decodes, context)
        return float(sum(part[1] for part in parts)) / 1e3

    def shared_s(self, tokens: int) -> float:
        """Return the seconds of all but the attention in a step that reads a prompt."""
        seconds = self._shared.get(tokens)
        if seconds is None:
            size = padded(tokens, self.sizes)
            seconds = self._at_least(tokens, self.corrections.total_s(self.shared_parts_s(size)))
            self._shared[tokens] = seconds
        return seconds

    def _at_least(self, tokens: int, seconds: float) -> float:
        """Return the seconds of a step, or of its launches where it is too large for a graph."""
        return seconds if tokens <= self.sizes[-1] else max(seconds, eager_s(self.place.layers))

    def shared_parts_s(self, tokens: int) -> Parts:
        """Return the seconds of all but the attention in a step that reads a prompt, by family, as tables say."""
        return self._least_s(
            lambda size: self._engine.evaluate_context_ops(self._shared_ops, 1, size), tokens
        )

    def _least_s(self, ask: Callable[[int], Sequence[tuple[str, float, float, str]]], tokens: int) -> Parts:
        """Return the seconds of operators, by family.

        A product of more rows does all the work of one with fewer, so where a table has it quicker, the slower entry
        was disturbed when it was measured.
        """
        place = bisect_left(self.sizes, tokens)
        larger = self.sizes[place : place + LARGER_SIZES] or (
            -(-tokens // 128) * 128,
            -(-tokens // 256) * 256,
        )
        columns = [ask(size) for size in dict.fromkeys((tokens, *larger))]
        parts = dict.fromkeys(FAMILIES, 0.0)
        for entries in zip(*columns, strict=True):
            parts[family(entries[0][0])] += min(entry[1] for entry in entries) / 1e3
        return parts

    def chunk_attention_s(self, chunks: int, tokens: int, work: float) -> float:
        """Return the seconds of the attention of chunks; the arguments are those of `attend_chunks_s`."""
        return self.corrections.scales["chunk_attention"] * self.attend_chunks_s(chunks, tokens, work)

    def attend_chunks_s(self, chunks: int, tokens: int, work: float) -> float:
        """Return the seconds of the attention of chunks, as tables say.

        Several chunks count as many of one length over one prefix, with as many tokens and as many pairs in all.

        Args:
            chunks: how many, at least 1.
            tokens: their lengths, summed.
            work: their token pairs, as StepShape.prefill_work counts them.
        """
        length = -(-tokens // chunks)
        prefix = max(0, round(work / tokens - tokens / chunks / 2))
        parts = self._engine.evaluate_context_ops(self._chunk_ops, chunks, length, prefix)
        return float(sum(part[1] for part in parts)) / 1e3

    @functools.cached_property
    def memory(self) -> Memory:
        """One device's memory."""
        from aiconfigurator_core.sdk.memory import KVCacheEstimator

        with quiet():
            found = KVCacheEstimator.from_request(
                self._model,
                self.system,
                BACKEND,
                self.version,
                max_num_tokens=ACTIVATION_TOKENS,
                max_batch_size=1,
                **self.arguments,
            ).breakdown
        return Memory(
            found["weights_bytes"],
            found["non_kv_bytes"] - found["weights_bytes"],
            found["kv_size_per_token_bytes"],
            found["tokens_from_kv_bytes"],
        )

    @property
    def source(self) -> Source:
        """Where the times come from, and how far to trust them."""
        total_ms = sum(time_ms for _, time_ms, _ in self.parts)
        tables = sum(time_ms for _, time_ms, source in self.parts if source in TABLES) / total_ms
        formula = sum(time_ms for _, time_ms, source in self.parts if source == FORMULA) / total_ms
        warnings = []
        guessed = {n for n, _, source in self.parts if source not in TABLES and source != FORMULA}
        if guessed:
            warnings.append(
                f"{PACKAGE} estimates {1 - tables - formula:.0%} of a step's time from other tables: "
                f"{', '.join(sorted(guessed))}."
            )
        if borrowed := self._borrowed_tables():
            warnings.append(
                f"low-fidelity fallback: on {self.system} rows of other frameworks fill {', '.join(borrowed)}."
            )
        if self.provenance is not None:
            warnings.append(f"{PACKAGE} borrows between shapes or operators ({self.provenance}).")
        version = importlib.metadata.version(PACKAGE)
        detail = (
            f"{PACKAGE} {version}, {self._model} on {self.system}, tables of vLLM {self.version}: {tables:.0%} of a "
            f"step's time from kernel tables, {formula:.0%} by formula"
        )
        if self.arguments.get("gemm_quant_mode") == "fp8" and self.place.precision == BLOCK_FP8:
            detail += "; products in block-scaled FP8 by the tables of FP8 with one scale"
        return Source("interpolated" if warnings else "measured", detail, tuple(warnings))

    def _borrowed_tables(self) -> list[str]:
        """Return those of the model's tables into which the package takes rows of other frameworks."""
        from aiconfigurator_core.sdk import perf_database

        with quiet():
            database = perf_database.get_database(self.system, BACKEND, self.version)
        assert database is not None, "it was loaded to compile the model"
        return sorted(
            table
            for table, sources in database.data_provenance.items()
            if any(source["channel"] == "cross_backend" for source in sources)
            # A table's name begins with its family, which the operators that use it have in theirs.
            and any(f"_{table.partition('_')[0]}_" in f"{name}_" for name, *_ in self.parts)
        )


@functools.cache
def kernels(model: str, unit: str, spread: Spread) -> Kernels:
    """Return the kernel times of a model on devices, compiled once in a process; see `Kernels`."""
    return Kernels(model, unit, spread)


class MeasuredTimes:
    """Step times of a model from measured kernels; see `simulator.StepTimes`.

    Args:
        measured: the kernel times.
        stages: pipeline stages; they share the layers evenly.
    """

    def __init__(self, measured: Kernels, stages: int = 1) -> None:
        self.stages = stages
        corrections = measured.corrections
        self.host_s = corrections.host_s
        self.host_sequence_s = corrections.host_sequence_s
        self._kernels = measured
        self._send_token_s = measured.p2p_s / max(1, stages - 1) / (PROBE_CHUNK + PROBE_DECODES)

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        """Return the seconds that each stage works on a batch; the prefixes are in `shape.prefill_work`."""
        kernels, decodes = self._kernels, shape.decodes
        chunks = shape.sequences - decodes
        if not chunks:
            return kernels.decode_s(decodes, shape.decode_context_tokens) / self.stages
        seconds = kernels.shared_s(shape.tokens)
        seconds += kernels.chunk_attention_s(chunks, shape.tokens - decodes, shape.prefill_work)
        if decodes:
            seconds += kernels.decode_attention_s(decodes, shape.decode_context_tokens)
        return seconds / self.stages

    def send_s(self, tokens: int) -> float:
        """Return the seconds to send a batch's activations to the next stage."""
        return float(self._send_token_s * tokens)


def _attention_first(
    ask: Callable[[int, int], tuple[str, float, float, str]],
    attention: Sequence[tuple[str, float, float, str]],
) -> tuple[list[int], list[int]]:
    """Return the positions of the operators that read a prefix, and of the others.

    Args:
        ask: answers for the operator at a position, for a longer prefix; ValueError past the end.
        attention: what the package itself counts as attention; some models have it inside a larger operator.
    """
    names = {name for name, *_ in attention}
    reading: list[int] = []
    others: list[int] = []
    while True:
        index = len(reading) + len(others)
        try:
            name, near_ms, *_ = ask(index, 0)
        except ValueError:
            return reading, others
        far_ms = ask(index, 4 * PROBE_CONTEXT)[1]
        counted = name in names or name.endswith(("attention", "mla_block"))
        (reading if counted or far_ms > 1.05 * near_ms else others).append(index)
