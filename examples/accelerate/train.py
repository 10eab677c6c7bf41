"""Fine-tune a causal language model on smoothed labels with Accelerate, and survive a crash.

    python examples/accelerate/train.py
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate/train.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py \
        --model Qwen/Qwen3-0.6B --data my_texts.txt

Without --model nothing is downloaded: a tiny model learns to count. Run it again to go on from the
last whole checkpoint in --output.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from levelhead.integrations.accelerate import prepare

VOCAB_SIZE = 128


def main() -> None:
    """Train, from the start or from where the last run stopped."""
    args = arguments()
    accelerator = Accelerator()
    torch.manual_seed(0)  # every process starts from the same model and the same order of the data
    model, texts = model_and_texts(args)
    order = torch.randperm(len(texts)).tolist()
    loader = DataLoader([texts[i] for i in order], batch_size=args.batch_size, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    # All that label smoothing takes.
    model, optimizer, loader = prepare(
        accelerator, model, optimizer, loader, smoothing=args.smoothing
    )

    step = resume(accelerator, args.output)
    model.train()
    while step < args.steps:
        for batch in accelerator.skip_first_batches(loader, step % len(loader)):
            # The mean over the labels of all processes: each divides its sum by their number, and
            # Accelerate takes the mean of the gradients over the processes.
            count = accelerator.reduce((batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch, num_items_in_batch=count).loss * accelerator.num_processes
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean'):.4f}")
            if step % args.save_every == 0 or step == args.steps:
                save(accelerator, args.output, step)
            if step == args.steps:
                break

    accelerator.unwrap_model(model).save_pretrained(
        args.output / "model",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.end_training()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--data", type=Path, help="a text file, an example a line; with --model")
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    return args


def model_and_texts(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    """The model, and the token ids (T,) of each example."""
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        lines = args.data.read_text().splitlines()
        texts = [torch.tensor(tokenizer(line, truncation=True).input_ids) for line in lines]
        return AutoModelForCausalLM.from_pretrained(args.model), texts
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    # From a random number on, in steps of 1, 2 or 3, of unequal lengths.
    return LlamaForCausalLM(config), [
        torch.arange(int(torch.randint(VOCAB_SIZE, ())), 1000, 1 + i % 3)[: 12 + i % 21]
        % VOCAB_SIZE
        for i in range(512)
    ]


def collate(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad to (B, T); padding has no label and is not attended to."""
    return {
        "input_ids": pad_sequence(texts, batch_first=True),
        "labels": pad_sequence(texts, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
    }


def save(accelerator: Accelerator, output: Path, step: int) -> None:
    """Write a checkpoint under another name, and rename it when every process is done.

    So whatever dies at whatever moment, a folder called step-* is whole.
    """
    unfinished = output / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(output / f"step-{step:08d}")
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the last whole checkpoint, if there is one; the number of steps it has behind it."""
    checkpoints = sorted(output.glob("step-*"))
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    step = int(checkpoints[-1].name.removeprefix("step-"))
    accelerator.print(f"resumed after step {step}")
    return step


if __name__ == "__main__":
    main()
