"""Fine-tune a causal language model with smoothed labels in the Trainer of transformers.

    python examples/trainer.py                            # a tiny random model, nothing downloaded
    python examples/trainer.py --model Qwen/Qwen3-0.6B    # the same with a model of yours

The line that matters is `patch_model`. The rest is what any script of this kind has.
"""

import argparse
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import levelhead
from levelhead.integrations.transformers import SmoothingSchedule

SMOOTHING = 0.1


def load(name: str | None) -> Any:
    """The model by that name, or a tiny one with random weights."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))


def counting(rows: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Examples to learn: each counts up from a number of its own. Labels are the inputs."""
    starts = torch.randint(200, (rows, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in starts + torch.arange(length)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, and return what the evaluation found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--output", default="trained", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    # The loss of an evaluation stays unsmoothed, to be compared with any other model's.
    model = levelhead.patch_model(load(options.model), smoothing=SMOOTHING)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            report_to="none",
        ),
        train_dataset=counting(256),
        eval_dataset=counting(32),
        # Optional: reach the smoothing gradually, in the first tenth of the steps.
        callbacks=[SmoothingSchedule(lambda progress: SMOOTHING * min(1, 10 * progress))],
    )
    trainer.train()
    trainer.save_model()  # an ordinary checkpoint: from_pretrained needs no levelhead
    return trainer.evaluate()


if __name__ == "__main__":
    main()
