"""Fine-tune a causal language model whose weights are shared among processes, with smoothed labels.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py     # a tiny random model, no download
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --model Qwen/Qwen3-8B

The line that matters is `patch_model`. Each process then computes the loss from its own part of the
vocabulary; neither the logits nor the weight of the head are gathered.
"""

import argparse
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import levelhead

SMOOTHING = 0.1


def load(name: str | None) -> Any:
    """The model by that name, or a tiny one with random weights, in parts."""
    plan = DistributedConfig(tp_plan="auto")
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, distributed_config=plan)
    torch.manual_seed(0)  # each process saves the same weights, and loads its part of them
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan)


def counting(rows: int, length: int = 16) -> torch.Tensor:
    """Examples to learn, (rows, length): each counts up from a number of its own."""
    starts = torch.randint(200, (rows, 1), generator=torch.Generator().manual_seed(0))
    return starts + torch.arange(length)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--output", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    model = levelhead.patch_model(load(options.model), smoothing=SMOOTHING).train()
    # foreach would want all parameters to be in parts, or none: those of the norms are whole.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    # All processes of a model must see the same batches.
    batches = counting(256).to(model.device).split(16)
    losses = []
    for step in range(options.steps):
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")  # noqa: T201
    if options.output is not None:
        model.save_pretrained(options.output, is_main_process=dist.get_rank() == 0)
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
