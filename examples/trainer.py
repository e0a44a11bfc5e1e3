"""AutoLRS in a transformers Trainer: one callback. A small Llama, or a model of yours, on Python's language reference.

pip install 'vllm-sarathi[autolrs,transformers]'
python examples/trainer.py
python examples/trainer.py --model build/models/SmolLM2-135M-Instruct --steps 60
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from autolrs_plugin.integrations.transformers import AutoLRSCallback

LENGTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder with a causal language model; without, a tiny one on bytes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="build/examples/trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    options = parser.parse_args()

    text = "".join(topics[key] for key in sorted(topics))[:200_000]
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
        model, tokens = LlamaForCausalLM(config), list(text.encode())
    rows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    data = [{"input_ids": row, "labels": row} for row in rows]
    tuner = AutoLRSCallback(lr_range=(1e-6, 1e-1))
    trainer = Trainer(
        model,
        TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            logging_steps=max(1, options.steps // 10),
            save_steps=max(1, options.steps // 4),
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data[: len(data) * 9 // 10],
        eval_dataset=data[len(data) * 9 // 10 :][:64],
        callbacks=[tuner],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    print(f"peak learning rate {max(tuner.schedule.lrs):.2e}, loss {trainer.evaluate()['eval_loss']:.3f}")
    print(f"the search took {tuner.ledger.search_share:.0%} of all steps")
    tuner.save(f"{options.out}/autolrs")  # autolrs show, plot and export take this folder


if __name__ == "__main__":
    main()
