"""torch.export of a patched model: its training step, saved and loaded, trains as the model does."""

import io
from typing import Any

import pytest
import torch
from tests.integrations.tiny_models import assert_same_training, batch, tiny
from torch.export import Dim, ExportedProgram, export, load, save

from levelhead.integrations import patch_model

SIZES = {0: Dim("rows"), 1: Dim("length", min=2)}


def _tiny() -> Any:
    """Without a cache, which torch.export does not know how to return."""
    return tiny(num_hidden_layers=1, use_cache=False)


def _round_trip(model: Any, strict: bool = False) -> ExportedProgram:
    inputs = batch()
    program = export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, SIZES), strict=strict)
    buffer = io.BytesIO()
    save(program, buffer)
    buffer.seek(0)
    return load(buffer)


def _operators(program: ExportedProgram) -> list[str]:
    """The names of our operators in the graph."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return [str(target).split(".")[1] for target in targets if "levelhead" in str(target)]


def _other_batches() -> list[dict[str, Any]]:
    return [batch(), {name: ids[:1, :5].clone() for name, ids in batch().items()}]


# Of torch 2.11 itself, once a process, when it loads what it saved.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
# Of dynamo, which finds what a forward sets while it runs, and transformers' likewise.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_training_step_trains_when_loaded(strict):
    model = patch_model(_tiny())
    program = _round_trip(model, strict)
    assert _operators(program) == ["linear_cross_entropy"]
    loaded = program.module()
    for inputs in _other_batches():
        got, want = loaded(**inputs), model(**inputs)
        assert list(got) == list(want)
        assert_same_training(loaded, got.loss, model, want.loss)


@torch.no_grad()
def test_an_eval_step_without_logits_computes_no_gradient():
    model = patch_model(_tiny(), eval_logits=False).eval()
    program = _round_trip(model)
    assert _operators(program) == ["linear_logit_stats"]
    for inputs in _other_batches():
        got, want = program.module()(**inputs), model(**inputs)
        assert "logits" not in got
        torch.testing.assert_close(got.loss, want.loss)


@torch.no_grad()
def test_logits_that_are_kept_have_any_number_of_tokens():
    model = patch_model(_tiny(), eval_smoothing=0.1).eval()
    program = _round_trip(model)
    for inputs in _other_batches():
        got, want = program.module()(**inputs), model(**inputs)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.logits, want.logits)
