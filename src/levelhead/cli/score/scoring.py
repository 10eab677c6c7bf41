"""Put the questions of a data set to a model, and write the scores to a file."""

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

from levelhead import __version__
from levelhead.scoring import Prompter, Question, Score
from levelhead.scoring.prompts import PHRASINGS, Prompt
from levelhead.scoring.scores import position_limit, score_prompts

from ..errors import CliError
from ..models import load_model, load_tokenizer
from ..output import make_folder
from ..progress import progress_bar
from ..rows import usable
from ..sources import Source, open_source
from .file import join_parts, part_of, schema, write_part
from .options import Options

_HINT = (
    'each row must have "question", "choices" (a list of texts) and "answer" (a letter, an index '
    'from 0 or the text of a choice), and may have "id" and "group"'
)


def score(options: Options) -> Path | None:
    """Score the questions of `options.data`; several processes take a share of them each.

    Args:
        options: Those of `levelhead score`.

    Returns:
        The score file; None in a process that is not the main one.

    Raises:
        CliError: An argument or the data cannot be used, or the model is refused; nothing was
            written.
    """
    processes = _processes()
    console = Console(quiet=not processes.is_main_process)
    if not processes.is_main_process:
        transformers.utils.logging.disable_progress_bar()
    path = options.output
    if path.is_dir():
        raise CliError(f"{path} is a folder; name a file with --output")
    make_folder(path.parent)
    code = options.trust_remote_code
    tokenizer = load_tokenizer(options.model, options.chat_template, trust_remote_code=code)
    if options.model == "tiny":
        transformers.set_seed(0)  # the same random weights every time
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = load_model(options.model, dtype, trust_remote_code=code).to(processes.device).eval()
    prompter = _prompter(options, tokenizer, model)
    with console.status("Reading the questions"):
        source = open_source(options.data, options.dataset_config, options.dataset_split)
        prompts = _prompts(source, prompter)
    settings = _settings(options, prompts, prompter.chat_template, tokenizer, model)
    groups = any(prompt.question.group is not None for prompt in prompts)
    rank, ranks = processes.process_index, processes.num_processes
    parts = [part_of(path, part) for part in range(ranks)]
    # Consecutive ones, so that the shares of all processes make the whole in its order.
    share = prompts[len(prompts) * rank // ranks : len(prompts) * (rank + 1) // ranks]
    scores = _scores(options, model, share, tokenizer, console)
    write_part(parts[rank], schema(settings, groups=groups), scores, options.model)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    join_parts(parts, path)
    return path


def _processes() -> PartialState:
    """Return the processes that were launched, this one among them."""
    processes = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if processes.num_processes != launched:
        raise CliError(
            f"{launched} processes were launched, but accelerate makes a group of "
            f"{processes.num_processes}, and each would score everything; launch one"
        )
    return processes


def _prompter(options: Options, tokenizer: Any, model: Any) -> Prompter:
    limits = [limit for limit in (options.max_length, position_limit(model)) if limit is not None]
    try:
        return Prompter(
            tokenizer,
            phrasing=options.phrasing,
            seed=options.seed,
            chat_template=False if options.no_chat_template else None,
            max_length=min(limits, default=None),
        )
    except ValueError as error:
        raise CliError(str(error)) from error


def _prompts(source: Source, prompter: Prompter) -> list[Prompt]:
    """Return a prompt for each row; what has no id goes by the number of its row."""

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


def _scores(
    options: Options,
    model: Any,
    prompts: list[Prompt],
    tokenizer: Any,
    console: Console,
) -> Iterator[Score]:
    try:
        scores = score_prompts(
            model,
            prompts,
            batch_size=options.batch_size,
            confidence=options.confidence,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        with progress_bar(console, "questions") as progress:
            yield from progress.track(scores, total=len(prompts), description="scoring")
    except ValueError as error:
        raise CliError(str(error)) from error


def _settings(
    options: Options,
    prompts: list[Prompt],
    chat_template: bool,
    tokenizer: Any,
    model: Any,
) -> dict[str, Any]:
    """Return what the scores depend on."""
    longest = max(prompts, key=lambda prompt: len(prompt.letter_ids))
    return {
        "model": options.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": options.data,
        "dataset_config": options.dataset_config,
        "dataset_split": options.dataset_split,
        "questions": len(prompts),
        "digest": _digest(prompts),
        "seed": options.seed,
        "phrasing": options.phrasing,
        "prompt": PHRASINGS[options.phrasing],
        "chat_template": chat_template,
        "letters": tokenizer.convert_ids_to_tokens(list(longest.letter_ids)),
        "confidence": options.confidence,
        "batch_size": options.batch_size,
        "versions": {
            "levelhead": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _digest(prompts: list[Prompt]) -> str:
    """Return a digest of the questions as they were read, whatever file format and model."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(astuple(prompt.question)).encode())
    return digest.hexdigest()
