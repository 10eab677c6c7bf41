"""`levelhead sft`: fine-tune a model on the user's own data, with smoothed labels."""

import argparse
from pathlib import Path
from typing import Any

from ..arguments import (
    add_batch_size,
    add_data,
    add_model,
    add_rows,
    count,
    options_of,
    positive,
    set_defaults_of,
    share,
    weight,
)
from ..errors import missing_extra
from .options import Options

_PACKAGES = {"accelerate", "datasets", "jinja2", "peft", "pyarrow", "rich", "transformers"}
_DESCRIPTION = """\
Fine-tunes a causal language model on prompts and completions, or on chats, with label
smoothing through levelhead.patch_model, on transformers' Trainer. Only completions and
the turns of the assistant have a loss.

Learning rate: falls linearly to 0 after a warm-up over 3% of the steps; no weight decay.
Options have the meaning of the transformers.TrainingArguments they are named after.
"""
_EPILOG = """\
examples:
  levelhead sft tiny questions.jsonl --output run --max-steps 20
  levelhead sft Qwen/Qwen2.5-0.5B chats.parquet --output run --bf16 --lora 16
  levelhead sft MODEL DATA --teacher STORE --output student   (see levelhead teacher)
  accelerate launch --num_processes 2 -m levelhead sft MODEL DATA --output run
  deepspeed --module levelhead sft MODEL DATA --output run --deepspeed zero3.json
  levelhead sft MODEL QUESTIONS --calibration-aware rcft --output calibrated

rows of DATA, one a line in JSON lines, or columns of the same names:
  {"prompt": "the capital of France is", "completion": " Paris"}
  {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
rows of QUESTIONS, for --calibration-aware; the answer is a letter, an index from 0 or a choice:
  {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": "B"}

DIR receives the model, its tokenizer, summary.json and checkpoints. If any row is bad,
nothing is trained: all are counted, and the first twenty named with the reason.
"""


def add_parser(verbs: Any) -> None:
    """Add `sft` to the verbs of the command."""
    parser = verbs.add_parser(
        "sft",
        help="fine-tune a model with smoothed labels on your own data",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = ("data", "loss", "calibration-aware fine-tuning", "training")
    data, loss, calibration, training = map(parser.add_argument_group, titles)
    add_model(parser, training)
    add_data(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the results"
    )
    _add_data(data)
    _add_loss(loss)
    _add_calibration(calibration)
    _add_training(training)
    set_defaults_of(parser, Options)
    parser.set_defaults(run=run)


def _add_data(group: Any) -> None:
    group.add_argument("--eval", metavar="DATA", help="held-out data, for a loss after each epoch")
    group.add_argument(
        "--max-length",
        type=count,
        metavar="TOKENS",
        help="cut rows to this length; one whose completion lies beyond it is left out, and "
        "counted (default: %(default)s)",
    )
    add_rows(group)
    group.add_argument(
        "--eval-split",
        metavar="NAME",
        help="of --eval, if it is a data set given by name (default: %(default)s)",
    )


def _add_loss(group: Any) -> None:
    group.add_argument(
        "--smoothing",
        type=share,
        metavar="EPS",
        help="share of probability spread over the vocabulary (default: 0.1; none with --teacher "
        "or --calibration-aware)",
    )
    group.add_argument(
        "--softcap",
        type=positive,
        metavar="C",
        help="train on logits capped to C * tanh(logits / C)",
    )
    group.add_argument(
        "--temperature",
        type=positive,
        metavar="T",
        help="train on logits / T, and multiply the loss by T (default: %(default)s)",
    )
    group.add_argument(
        "--teacher",
        metavar="STORE",
        help="learn from what `levelhead teacher` stored of these rows, in place of their tokens",
    )
    group.add_argument(
        "--distillation",
        choices=("renormalised", "full", "other"),
        help="compare the student's probabilities with the teacher's k: scaled to sum to one over "
        "them, as they are, or with the rest of the vocabulary as one more (default: renormalised)",
    )
    group.add_argument(
        "--raw-teacher",
        action="store_true",
        help="leave the teacher's probabilities as they are, though the store has a recalibration",
    )


def _add_calibration(group: Any) -> None:
    group.add_argument(
        "--calibration-aware",
        choices=("cft", "rcft"),
        help="restore the calibration of an aligned model on multiple-choice questions (Xiao et al. "
        "2025, https://arxiv.org/abs/2505.01997). cft: learn the letter of the answer alone. rcft: "
        "learn every token, with a regulariser of the calibration error",
    )
    group.add_argument(
        "--ece",
        choices=("confidence", "classwise"),
        help="rcft: whose calibration error the regulariser is of, the answer's or each choice's "
        "(default: confidence)",
    )
    group.add_argument(
        "--ece-weight",
        type=weight,
        metavar="LAMBDA",
        help="rcft: weight of the regulariser (default: 1)",
    )
    group.add_argument(
        "--em-refresh",
        type=_refresh,
        metavar="WHEN",
        help="rcft: when the accuracies of the bins of confidence are estimated again, on all "
        "training questions: once, epoch, or a number of steps (default: epoch)",
    )
    group.add_argument(
        "--critical-accuracy",
        type=share,
        metavar="A",
        help="the mean largest probability of the true answers, if it is known, for the report: "
        "whether the model can be calibrated without losing accuracy",
    )


def _refresh(text: str) -> str | int:
    """Return when E-steps are due."""
    if text in ("once", "epoch"):
        return text
    try:
        return count(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be once, epoch or a number of steps from 1 on, got {text!r}"
        ) from None


def _add_training(group: Any) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, metavar="N", help="(default: %(default)s)")
    length.add_argument("--max-steps", type=count, metavar="N", help="instead of --epochs")
    group.add_argument(
        "--learning-rate",
        type=positive,
        metavar="LR",
        help="highest learning rate of AdamW (default: 2e-5, and 2e-4 with --lora)",
    )
    add_batch_size(group, "rows per device and forward pass")
    group.add_argument(
        "--gradient-accumulation",
        type=count,
        metavar="N",
        help="forward passes per step (default: %(default)s)",
    )
    group.add_argument(
        "--lora",
        type=count,
        metavar="RANK",
        help="train adapters of this rank on every linear layer but the head, and save them alone",
    )
    group.add_argument(
        "--bf16",
        action="store_true",
        help="compute in bfloat16; weights stay float32, but those that --lora freezes do not",
    )
    group.add_argument("--compile", action="store_true", help="use torch.compile")
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass, to save memory",
    )
    group.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed configuration in JSON")
    group.add_argument(
        "--save-steps",
        type=count,
        metavar="N",
        help="write a checkpoint every N steps, and keep two (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last whole checkpoint in DIR, if there is one",
    )
    group.add_argument("--seed", type=int, metavar="N", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Fine-tune, and print what came of it.

    Raises:
        CliError: An optional package is missing, an argument or the data cannot be used, or the
            model is refused; nothing was trained.
    """
    try:
        from .report import show
        from .training import fine_tune
    except ModuleNotFoundError as error:
        raise missing_extra(error, "sft", _PACKAGES) from error
    show(fine_tune(options_of(Options, arguments)))
