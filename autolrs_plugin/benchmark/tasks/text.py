"""Reference tasks on text, as bytes and characters."""

import functools
import re
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autolrs_plugin.benchmark.tasks.base import IGNORED, Batch, Problem, package_folder


class Transformer(nn.Module):
    """A small pre-norm transformer over token ids [batch, length], giving logits [batch, length, vocabulary].

    An encoder begins with a convolution over neighbours: without one it spends its first thousands of steps on
    the plateau of the tokens' bare frequencies.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.near = None if causal else nn.Conv1d(width, width, 3, padding=1)
        mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None
        self.register_buffer("mask", mask, persistent=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        # All layers of an nn.TransformerEncoder start as copies of one; each is to start for itself.
        for part in self.body.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
            elif isinstance(part, nn.MultiheadAttention):
                nn.init.normal_(part.in_proj_weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        if self.near is not None:
            x = x + self.near(x.mT).mT
        return self.head(self.body(x, mask=self.mask, is_causal=self.mask is not None))


def _topics() -> str:
    from pydoc_data.topics import topics  # 0.5 MB of text, only read where it is trained on

    return "".join(topics[key] for key in sorted(topics))


def stdlib_gpt(seed: int) -> Problem:
    """A byte-level decoder on Python's language reference."""
    text = _topics().encode("utf-8", "replace")
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    length, cut = 64, len(data) * 9 // 10
    torch.manual_seed(seed)
    model = Transformer(256, length, 64, 2, causal=True)

    def windows(starts: Iterable[int]) -> Batch:
        rows = torch.stack([data[s : s + length + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    def draw(rng: np.random.Generator) -> Batch:
        return windows(rng.integers(0, cut - length - 1, 8).tolist())

    return Problem(model, draw, [windows(np.linspace(cut, len(data) - length - 1, 64).astype(int).tolist())])


def _characters(text: str) -> tuple[Tensor, int]:
    """Return a text, in small letters and without rare signs, as ids of characters, and how many those are."""
    text = re.sub(r"[^a-z0-9 .,']", "", re.sub(r"\s+", " ", text.lower()))
    characters = sorted(set(text))
    ids = {character: i for i, character in enumerate(characters)}
    return torch.tensor([ids[character] for character in text]), len(characters)


@functools.cache
def lee() -> tuple[Tensor, int]:
    """Return Lee's news corpus as ids of its characters, and how many characters there are."""
    path = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return _characters(path.read_text(encoding="utf-8"))


@functools.cache
def stdlib() -> tuple[Tensor, int]:
    """Return Python's language reference as ids of its characters, and how many characters there are."""
    return _characters(_topics())


def bert_mlm(seed: int) -> Problem:
    """A character-level encoder on Lee's news corpus, asked for 15% of the characters."""
    data, mask = lee()
    length, cut = 64, len(data) * 9 // 10
    torch.manual_seed(seed)
    model = Transformer(mask + 1, length, 64, 2, causal=False)

    def masked(starts: Iterable[int], rng: np.random.Generator) -> Batch:
        rows = torch.stack([data[s : s + length] for s in starts])
        chosen = torch.from_numpy(rng.random(rows.shape) < 0.15)
        return rows.masked_fill(chosen, mask), rows.masked_fill(~chosen, IGNORED)

    def draw(rng: np.random.Generator) -> Batch:
        return masked(rng.integers(0, cut - length, 8).tolist(), rng)

    starts = np.linspace(cut, len(data) - length, 64).astype(int).tolist()
    return Problem(model, draw, [masked(starts, np.random.default_rng(0))])


class Recurrent(nn.Module):
    """A recurrent language model over token ids [batch, length], giving logits [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, embedded: int, width: int, kind: type[nn.GRU | nn.LSTM]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedded)
        self.body = kind(embedded, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(tokens))[0])


class Convolutional(nn.Module):
    """A causal convolutional language model: each layer looks twice as far back as the one below."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens).mT
        for layer in self.layers:
            x = x + functional.gelu(layer(functional.pad(x, (layer.dilation[0], 0))))
        return self.head(x.mT)


def _next_character(
    seed: int, corpus: tuple[Tensor, int], model: Callable[[int], nn.Module], length: int
) -> Problem:
    """Return the problem of a language model of characters, made for their number, in windows of a `length`."""
    data, characters = corpus
    cut = len(data) * 9 // 10
    torch.manual_seed(seed)

    def windows(starts: Iterable[int]) -> Batch:
        texts = torch.stack([data[s : s + length + 1] for s in starts])
        return texts[:, :-1], texts[:, 1:]

    def draw(rng: np.random.Generator) -> Batch:
        return windows(rng.integers(0, cut - length - 1, 16).tolist())

    judged = windows(np.linspace(cut, len(data) - length - 1, 64).astype(int).tolist())
    return Problem(model(characters), draw, [judged])


def lee_gru(seed: int) -> Problem:
    """A recurrent language model of characters."""
    return _next_character(seed, lee(), lambda characters: Recurrent(characters, 96, 96, nn.GRU), 32)


def lee_conv(seed: int) -> Problem:
    """A convolutional language model of characters."""
    return _next_character(seed, lee(), lambda characters: Convolutional(characters, 48, 4), 32)


def stdlib_lstm(seed: int) -> Problem:
    """A recurrent language model whose loss stays on the frequencies of characters for the first hundreds of steps."""
    return _next_character(seed, stdlib(), lambda characters: Recurrent(characters, 48, 96, nn.LSTM), 24)


def stdlib_conv(seed: int) -> Problem:
    """A convolutional language model of characters, of three layers."""
    return _next_character(seed, stdlib(), lambda characters: Convolutional(characters, 48, 3), 32)
