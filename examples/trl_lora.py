"""AutoLRS in TRL's SFTTrainer with LoRA: answers to questions, learnt by a small Llama, or by a model of yours.

pip install 'vllm-sarathi[autolrs,transformers,trl]' pyyaml
pip install --no-deps chatterbot-corpus   # only its data are read
python examples/trl_lora.py --model build/models/SmolLM2-135M-Instruct --steps 60
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from autolrs_plugin.integrations.transformers import AutoLRSCallback


def pairs() -> Dataset:
    """Return the questions and answers of chatterbot-corpus, in English."""
    package = find_spec("chatterbot_corpus")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("chatterbot_corpus is not installed: pip install chatterbot-corpus --no-deps")
    rows = set()
    for path in Path(package.submodule_search_locations[0]).glob("data/english/*.yml"):
        for talk in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(talk) == 2:
                rows.add((f"Question: {talk[0]}\nAnswer:", f" {talk[1]}"))
    return Dataset.from_list([{"prompt": q, "completion": a} for q, a in sorted(rows)]).shuffle(seed=0)


def tiny() -> tuple[Any, Any]:
    """Return a small Llama with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder with a causal language model; without, a tiny one on bytes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="build/examples/trl_lora")
    options = parser.parse_args()

    data = pairs()
    model, tokenizer = tiny()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    # TRL's own rate is one for all weights of large models: nothing to begin with for adapters of a small one.
    tuner = AutoLRSCallback(lr_range=(1e-5, 1.0), prior=None)
    args = SFTConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_length=128,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    sets = {
        "train_dataset": data.select(range(len(data) - 32)),
        "eval_dataset": data.select(range(len(data) - 32, len(data))),
    }
    trainer = SFTTrainer(model, args, **sets, processing_class=tokenizer, peft_config=lora, callbacks=[tuner])
    trainer.train()
    trainer.save_model()  # the adapter alone
    print(f"peak learning rate {max(tuner.schedule.lrs):.2e}, loss {trainer.evaluate()['eval_loss']:.3f}")
    print(f"the search took {tuner.ledger.search_share:.0%} of all steps")


if __name__ == "__main__":
    main()
