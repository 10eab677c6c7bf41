"""Public docstrings are complete, and their examples run."""

import doctest
import math
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import datasets
import pytest
import torch
import transformers
import trl
from tests import docstrings
from tests.docstrings import Public, problems, public
from tests.integrations.tiny_models import batch, tiny
from tests.integrations.tiny_tokenizers import byte_level

import levelhead
import levelhead.calibration
import levelhead.integrations.accelerate
import levelhead.integrations.inductor
import levelhead.integrations.transformers
import levelhead.integrations.trl
import levelhead.objectives
import levelhead.objectives.calibration_aware
import levelhead.objectives.regime
import levelhead.ops
import levelhead.scoring
from levelhead.calibration.table import check_norm
from levelhead.objectives.calibration_aware import BinCounts
from levelhead.ops import TopK

MODULES = (
    levelhead,
    levelhead.calibration,
    levelhead.objectives,
    levelhead.objectives.calibration_aware,
    levelhead.objectives.regime,
    levelhead.integrations,
    levelhead.integrations.accelerate,
    levelhead.integrations.inductor,
    levelhead.scoring,
    levelhead.integrations.transformers,
    levelhead.integrations.trl,
    levelhead.ops,
)
PUBLIC = public(MODULES)
NAMED = {item.name.rpartition(".")[2]: item for item in PUBLIC if item.owner is None}


def named(item: Public) -> str:
    return item.name


@pytest.mark.parametrize("item", PUBLIC, ids=named)
def test_docstring_is_complete(item: Public) -> None:
    assert problems(item, NAMED) == []


def scaled(losses: Any, factor: float, norm: str = "l1") -> torch.Tensor:
    """Losses times a factor.

    Args:
        losses: in nats, shape ``(N,)``.
        factor: above 0.
        norm: "l1", "l2" or "max".

    Returns:
        Shape ``(N,)``, float32.

    Raises:
        TypeError: ``factor`` is no number.
        ValueError: ``norm`` is unknown.

    References:
        Szegedy et al. 2016.

    Example:
        >>> scaled([1.0], 2.0)
        [2.0]
    """
    if isinstance(factor, str):
        raise TypeError(factor)
    check_norm(norm)
    return factor * losses


class Row(NamedTuple):
    """A row.

    Attributes:
        count: (B,) int64.
        bins: how many.
    """

    count: torch.Tensor
    bins: int


@pytest.mark.parametrize(
    ("code", "old", "new", "lacks"),
    [
        (scaled, "factor.\n", "factor\n", "no summary that is a sentence"),
        (scaled, "        factor: above 0.\n", "", "no entry in Args for factor"),
        (scaled, "norm: ", "ord: ", "no entry in Args for norm"),
        (scaled, "norm: ", "ord: ", "Args has an entry for ord, which is no parameter"),
        (scaled, "nats, shape ``(N,)``", "nats", "no shape for losses"),
        (scaled, "in nats, shape", "shape", "no unit for losses"),
        (scaled, "Returns", "Result", "no Returns"),
        (scaled, "Shape ``(N,)``", "The losses", "no shape for what it returns"),
        (scaled, ", float32", "", "no dtype for what it returns"),
        (scaled, "        TypeError: ``factor`` is no", "", "no entry in Raises for TypeError"),
        (scaled, "ValueError: ``norm`` is", "", "no entry in Raises for ValueError"),
        (scaled, " 2016", "", "no paper in References, nor in those of its module"),
        (scaled, ">>>", "", "no Example"),
        (Row, "        bins: how many.\n", "", "no entry in Attributes for bins"),
        (Row, "bins: how", "edges: how", "Attributes has an entry for edges, which is not there"),
        (Row, "(B,) int64", "int64", "no shape for count"),
        (Row, " int64", "", "no dtype for count"),
    ],
)
def test_a_broken_docstring_is_seen(
    code: Any, old: str, new: str, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings, "ARRAYS", (__name__,))
    monkeypatch.setattr(docstrings, "OF_PAPERS", (f"{__name__}.scaled",))
    item = Public(f"{__name__}.{code.__name__}", code)
    assert problems(item) == []
    assert old in code.__doc__
    monkeypatch.setattr(code, "__doc__", code.__doc__.replace(old, new))
    assert lacks in problems(item)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What examples take for granted: all that is public, and a tiny model with its data."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    model = tiny(dtype=torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    ids = batch()["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    values, indices = torch.randn(*ids.shape, len(tokenizer)).log_softmax(-1).topk(5)
    return {
        **{item.code.__name__: item.code for item in PUBLIC if item.owner is None},
        **{module.__name__: module for module in (levelhead, math, torch)},
        "Accelerator": accelerate.Accelerator,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "SFTTrainer": trl.SFTTrainer,
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "arguments": transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        "at": torch.tensor([3, 4]),
        "bins": BinCounts(right=torch.tensor([1, 1]), size=torch.tensor([2, 2])),
        "data": datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in ids]),
        "folder": str(tmp_path),
        "ids": ids,
        "letters": ids[:, :4],
        "loader": torch.utils.data.DataLoader(rows, batch_size=2),
        "model": model,
        "name": str(tmp_path),
        "optimizer": torch.optim.SGD(model.parameters()),
        "tokenizer": tokenizer,
        "top": TopK(values, indices, (values - values[..., :1]).logsumexp(-1)),
    }


@pytest.mark.parametrize("item", [item for item in PUBLIC if ">>>" in item.doc], ids=named)
def test_example_runs(item: Public, names: dict[str, Any]) -> None:
    example = doctest.DocTestParser().get_doctest(item.doc, names, item.name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example).failed == 0
