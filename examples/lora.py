"""Fine-tune a causal language model with LoRA and smoothed labels, in a loop of your own.

    python examples/lora.py                            # a tiny random model, nothing downloaded
    python examples/lora.py --model Qwen/Qwen3-0.6B    # the same with a model of yours

The lines that matter are `patch_model`, before or after the adapter is added, and `check_patch`,
which compares a step of this very model with that of `cross_entropy(..., label_smoothing=0.1)`.
"""

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import levelhead


def load(name: str | None) -> Any:
    """The model by that name, or a tiny one with random weights."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))


def counting(rows: int, length: int = 16) -> dict[str, torch.Tensor]:
    """A batch to learn: each row counts up from a number of its own. Labels are the inputs."""
    ids = torch.randint(200, (rows, 1)) + torch.arange(length)
    return {"input_ids": ids, "labels": ids}


def main(arguments: list[str] | None = None) -> float:
    """Train, save the adapter, and return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--output", default="trained", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # That leaves the head out, on which LoRA is refused. To train it, whole, beside the adapter:
    # modules_to_save=["lm_head"].
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    model = get_peft_model(load(options.model), lora).to(device)
    model = levelhead.patch_model(model, smoothing=0.1)

    def batch() -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in counting(16).items()}

    model.train()  # from_pretrained has put it in eval mode
    if not levelhead.check_patch(model, batch()).ok:
        raise SystemExit("this model does not train as it should: please report it")

    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-2
    )
    for _ in range(options.steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(options.output)  # an ordinary adapter: it loads without levelhead
    return loss.item()


if __name__ == "__main__":
    main()
