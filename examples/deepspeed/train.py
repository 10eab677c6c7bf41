"""Train a causal language model with smoothed labels under DeepSpeed.

A tiny model on invented data, then a real one, on all GPUs:

    deepspeed examples/deepspeed/train.py --deepspeed_config examples/deepspeed/zero3.json
    deepspeed examples/deepspeed/train.py --deepspeed_config examples/deepspeed/zero3.json \
        --model Qwen/Qwen3-0.6B --learning_rate 1e-5 --output trained

Put your own data in place of `batches`. With Trainer none of this is needed: patch the model and
give it `TrainingArguments(deepspeed="examples/deepspeed/zero3.json", bf16=True)`.
"""

import argparse
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import log_dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations import HfDeepSpeedConfig

from levelhead import patch_model


def main() -> list[float]:
    """Train as the command line says; the loss of each step on this rank."""
    parser = argparse.ArgumentParser(description="Train with smoothed labels under DeepSpeed.")
    parser.add_argument("--deepspeed_config", required=True, help="a JSON file")
    parser.add_argument("--model", help="name or folder of a model; else a tiny one is made up")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", help="folder for the trained model")
    parser.add_argument("--local_rank", type=int, help="comes from the deepspeed launcher")
    args = parser.parse_args()

    deepspeed.init_distributed()
    # As long as this object lives, transformers builds models in shards if the config is ZeRO-3's.
    config = HfDeepSpeedConfig(args.deepspeed_config)
    auto = AutoModelForCausalLM
    model = auto.from_pretrained(args.model) if args.model else auto.from_config(tiny())

    model = patch_model(model, smoothing=args.smoothing)  # the one line

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.learning_rate),
        config=config.config,
    )
    engine.train()
    losses = []
    for input_ids in batches(engine, args.steps):
        loss = engine(input_ids=input_ids, labels=input_ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        log_dist(f"step {len(losses)}: loss {losses[-1]:.4f}", ranks=[0])
    if args.output:
        engine.save_16bit_model(args.output)  # under ZeRO-3 it gathers the shards
        model.config.save_pretrained(args.output)
    return losses


def tiny() -> LlamaConfig:
    """A model that trains anywhere in seconds."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def batches(engine: deepspeed.DeepSpeedEngine, steps: int) -> Iterator[Tensor]:
    """Rows that count up by a step of 1 to 4 from anywhere, others on each rank, (rows, 32)."""
    vocab_size = engine.module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(deepspeed.comm.get_rank())
    rows = engine.train_micro_batch_size_per_gpu()
    for _ in range(steps):
        start = torch.randint(vocab_size, (rows, 1), generator=generator)
        stride = torch.randint(1, 5, (rows, 1), generator=generator)
        yield ((start + stride * torch.arange(32)) % vocab_size).to(engine.device)


if __name__ == "__main__":
    main()
