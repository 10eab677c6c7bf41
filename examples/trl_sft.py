"""Fine-tune a causal language model with smoothed labels in TRL's SFTTrainer.

    python examples/trl_sft.py                            # a tiny random model, nothing downloaded
    python examples/trl_sft.py --model Qwen/Qwen3-0.6B    # the same with a model of yours

The line that matters is `patch_trainer`. A model that you build yourself can be patched before it
is given to the trainer instead: `SFTTrainer(model=levelhead.patch_model(model), ...)`.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from levelhead.integrations.trl import patch_trainer

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def questions() -> Dataset:
    """What day comes some days after another: prompts, and completions to learn."""
    return Dataset.from_list(
        [
            {"prompt": f"{day} plus {days} is", "completion": f" {DAYS[(i + days) % 7]}"}
            for i, day in enumerate(DAYS)
            for days in range(20)
        ]
    )


def tiny_model() -> tuple[Any, Any]:
    """A model with random weights, and a tokenizer for the words of `questions`."""
    words = ["<pad>", "<eos>", "plus", "is", *DAYS, *map(str, range(20))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_attention_heads=4, **sizes))
    return model, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and return the last metrics that were logged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--output", default="trained", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    model, tokenizer = (options.model, None) if options.model else tiny_model()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=10,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=questions(),
    )
    trainer = patch_trainer(trainer, smoothing=0.1)
    trainer.train()
    trainer.save_model()  # an ordinary checkpoint: from_pretrained needs no levelhead
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()
