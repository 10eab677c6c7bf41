"""A model and tokens of the user's data for it to read: for verbs that look at what reaches its head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from datasets import Dataset
from torch import Tensor

from .errors import CliError
from .examples import Collator, read_examples
from .models import load_model, load_tokenizer
from .sources import open_source


class _Reading(Protocol):
    """The options of add_model, add_data and add_reading in `arguments`, of a verb that has them."""

    @property
    def model(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def data(self) -> str | None: ...
    @property
    def chat_template(self) -> Path | None: ...
    @property
    def dataset_config(self) -> str | None: ...
    @property
    def dataset_split(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def read_model(options: _Reading) -> Any:
    """Return the model in eval mode and its own dtype, on the accelerator if there is one.

    Raises:
        CliError: It cannot be loaded.
    """
    transformers.set_seed(options.seed)  # tiny has random weights
    model = load_model(options.model, "auto", trust_remote_code=options.trust_remote_code)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device).eval()


def read_tokenizer(options: _Reading) -> Any:
    """Return the tokenizer.

    Raises:
        CliError: It cannot be loaded.
    """
    return load_tokenizer(
        options.model, options.chat_template, trust_remote_code=options.trust_remote_code
    )


def read_rows(options: _Reading, tokenizer: Any) -> Dataset:
    """Return the rows of DATA as Tokens, in an order that the seed decides.

    Of a text every token but the first counts; of rows, what `levelhead sft` would have a loss at.

    Raises:
        CliError: A row is bad, or there is none.
    """
    data = options.data or ""  # optional to a verb that then reads nothing
    if Path(data).suffix == ".txt":
        rows = _pieces(Path(data), tokenizer, options.max_length)
    else:
        source = open_source(data, options.dataset_config, options.dataset_split)
        rows, _ = read_examples(source, tokenizer, max_length=options.max_length)
    return rows.shuffle(seed=options.seed, keep_in_memory=True)


def _pieces(path: Path, tokenizer: Any, length: int) -> Dataset:
    """Return a text, cut into pieces of `length` tokens."""
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
    return Dataset.from_dict({"input_ids": pieces, "labels": pieces})


def batches(rows: Dataset, options: _Reading, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the rows, padded together, as arguments of the model's forward."""
    collate = Collator(tokenizer.pad_token_id or 0)
    for start in range(0, len(rows), options.batch_size):
        stop = min(start + options.batch_size, len(rows))
        yield collate([rows[index] for index in range(start, stop)])
