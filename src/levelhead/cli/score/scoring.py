"""`levelhead score` from end to end."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape

from levelhead import __version__
from levelhead.scoring import (
    PHRASINGS,
    Prompt,
    Prompter,
    Question,
    Score,
    position_limit,
    score_prompts,
)

from ..errors import CliError
from ..models import load_model, load_tokenizer
from ..output import make_folder
from ..progress import progress_bar
from ..rows import usable
from ..sources import Source, open_source
from .file import join_parts, part_of, schema, write_part
from .report import notes, table

_HINT = (
    'each row must have "question", "choices" (a list of texts) and "answer" (a letter, an index '
    'from 0 or the text of a choice), and may have "id" and "group"'
)


def score(arguments: argparse.Namespace) -> None:
    """Scores as the command line says; several processes take a share of the questions each.

    Raises:
        CliError: An argument or the data cannot be used, or the model is refused; nothing was
            written.
    """
    processes = _processes()
    console = Console(quiet=not processes.is_main_process)
    if not processes.is_main_process:
        transformers.utils.logging.disable_progress_bar()
    path: Path = arguments.output
    if path.is_dir():
        raise CliError(f"{path} is a folder; name a file with --output")
    make_folder(path.parent)
    tokenizer = load_tokenizer(
        arguments.model, arguments.chat_template, trust_remote_code=arguments.trust_remote_code
    )
    model = _model(arguments).to(processes.device).eval()
    prompter = _prompter(arguments, tokenizer, model)
    with console.status("Reading the questions"):
        source = open_source(arguments.data, arguments.dataset_config, arguments.dataset_split)
        prompts = _prompts(source, prompter)
    settings = _settings(arguments, prompts, prompter.chat_template, tokenizer, model)
    groups = any(prompt.question.group is not None for prompt in prompts)
    parts = [part_of(path, rank) for rank in range(processes.num_processes)]
    share = _share(prompts, processes.process_index, processes.num_processes)
    scores = _scores(arguments, model, share, tokenizer, console)
    write_part(
        parts[processes.process_index], schema(settings, groups=groups), scores, arguments.model
    )
    processes.wait_for_everyone()
    if processes.is_main_process:
        join_parts(parts, path)
        console.print(table(path), notes(path), sep="\n")
        console.print(f"Scores: [bold]{escape(str(path))}[/]", soft_wrap=True)


def _processes() -> PartialState:
    """The processes that were launched, this one among them."""
    processes = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if processes.num_processes != launched:
        raise CliError(
            f"{launched} processes were launched, but accelerate makes a group of "
            f"{processes.num_processes}, and each would score everything; launch one"
        )
    return processes


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.model == "tiny":
        transformers.set_seed(0)  # the same random weights every time
    return load_model(
        arguments.model,
        torch.bfloat16 if arguments.bf16 else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
    )


def _prompter(arguments: argparse.Namespace, tokenizer: Any, model: Any) -> Prompter:
    limits = [limit for limit in (arguments.max_length, position_limit(model)) if limit is not None]
    try:
        return Prompter(
            tokenizer,
            phrasing=arguments.phrasing,
            seed=arguments.seed,
            chat_template=False if arguments.no_chat_template else None,
            max_length=min(limits, default=None),
        )
    except ValueError as error:
        raise CliError(str(error)) from error


def _prompts(source: Source, prompter: Prompter) -> list[Prompt]:
    """A prompt for each row; what has no id goes by the number of its row."""

    def parse(numbered: tuple[int, Any]) -> Prompt:
        number, row = numbered
        question = Question.from_row(source.parse(row))
        return prompter(replace(question, question_id=question.question_id or str(number)))

    rows = ((number, (number, row)) for number, row in source.rows)
    prompts = list(
        usable(rows, parse, source=source.name, unit=source.unit, hint=_HINT, done="scored")
    )
    if not prompts:
        raise CliError(f"{source.name} has no rows")
    return prompts


def _share(prompts: list[Prompt], rank: int, processes: int) -> list[Prompt]:
    """Consecutive ones, so that the shares of all processes make the whole in its order."""
    return prompts[len(prompts) * rank // processes : len(prompts) * (rank + 1) // processes]


def _scores(
    arguments: argparse.Namespace,
    model: Any,
    prompts: list[Prompt],
    tokenizer: Any,
    console: Console,
) -> Iterator[Score]:
    try:
        scores = score_prompts(
            model,
            prompts,
            batch_size=arguments.batch_size,
            confidence=arguments.confidence,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        with progress_bar(console, "questions") as progress:
            yield from progress.track(scores, total=len(prompts), description="scoring")
    except ValueError as error:
        raise CliError(str(error)) from error


def _settings(
    arguments: argparse.Namespace,
    prompts: list[Prompt],
    chat_template: bool,
    tokenizer: Any,
    model: Any,
) -> dict[str, Any]:
    """What the scores depend on."""
    longest = max(prompts, key=lambda prompt: len(prompt.letter_ids))
    return {
        "model": arguments.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": arguments.data,
        "dataset_config": arguments.dataset_config,
        "dataset_split": arguments.dataset_split,
        "questions": len(prompts),
        "digest": _digest(prompts),
        "seed": arguments.seed,
        "phrasing": arguments.phrasing,
        "prompt": PHRASINGS[arguments.phrasing],
        "chat_template": chat_template,
        "letters": tokenizer.convert_ids_to_tokens(list(longest.letter_ids)),
        "confidence": arguments.confidence,
        "batch_size": arguments.batch_size,
        "versions": {
            "levelhead": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _digest(prompts: list[Prompt]) -> str:
    """Of the questions as they were read, whatever file format and model."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(astuple(prompt.question)).encode())
    return digest.hexdigest()
