"""A model and tokens of the user's data for it to read: for verbs that look at what reaches its head."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor

from .errors import CliError
from .models import load_model, load_tokenizer
from .sft.preparation import prepare
from .sft.tokens import Collator, Tokens, encode
from .sources import open_source


def read_model(arguments: Any) -> Any:
    """The model of the command line in eval mode and its own dtype, on the accelerator if there is one.

    Raises:
        CliError: It cannot be loaded.
    """
    transformers.set_seed(arguments.seed)  # tiny has random weights
    model = load_model(arguments.model, "auto", trust_remote_code=arguments.trust_remote_code)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device).eval()


def read_tokenizer(arguments: Any) -> Any:
    """The tokenizer of the command line.

    Raises:
        CliError: It cannot be loaded.
    """
    return load_tokenizer(
        arguments.model, arguments.chat_template, trust_remote_code=arguments.trust_remote_code
    )


def read_rows(arguments: Any, tokenizer: Any) -> Dataset:
    """The rows of DATA as Tokens, in an order that the seed decides.

    Of a text every token but the first counts; of rows, what `levelhead sft` would have a loss at.

    Raises:
        CliError: A row is bad, or there is none.
    """
    path = Path(arguments.data)
    if path.suffix == ".txt":
        rows = _pieces(path, tokenizer, arguments.max_length)
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            table = Path(folder) / "tokens"
            prepare(
                open_source(arguments.data, arguments.dataset_config, arguments.dataset_split),
                lambda example: encode(example, tokenizer),
                max_length=arguments.max_length,
                path=table,
            )
            # What is mapped into memory outlives its file, where the system can do that at all.
            rows = Dataset.from_file(str(table))
    return rows.shuffle(seed=arguments.seed, keep_in_memory=True)


def _pieces(path: Path, tokenizer: Any, length: int) -> Dataset:
    """A text, cut into pieces of `length` tokens."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}; save it as UTF-8"
        ) from error
    ids = tokenizer(text, verbose=False)["input_ids"]  # or it warns of a long text
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # nothing predicts a first token
    if not pieces:
        raise CliError(f"{path} holds no text of two tokens; give it more, or raise --max-length")
    return Dataset.from_dict(dict.fromkeys(Tokens._fields, pieces))


def batches(rows: Dataset, arguments: Any, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """The rows, padded together, as arguments of the model's forward."""
    collate = Collator(tokenizer.pad_token_id or 0)
    for start in range(0, len(rows), arguments.batch_size):
        stop = min(start + arguments.batch_size, len(rows))
        yield collate([rows[index] for index in range(start, stop)])
