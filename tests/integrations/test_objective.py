"""A patched model with another objective: loss and gradients, its columns, and what it leaves alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.integrations.tiny_models import VOCAB_SIZE, tiny
from torch import Tensor

from levelhead import patch_model, unpatch_model
from levelhead.integrations import set_objective
from levelhead.objectives import Distillation


def batch() -> dict[str, Tensor]:
    """Two rows of nine tokens with a teacher where a label is to be predicted."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=random)
    labels = ids.clone()
    labels[:, :4] = -100
    teacher = torch.randn(2, 9, VOCAB_SIZE, generator=random).log_softmax(-1).topk(4)
    columns = {"teacher_ids": teacher.indices, "teacher_log_probs": teacher.values}
    return {"input_ids": ids, "labels": labels} | columns


def dense(model: Any, inputs: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1] / temperature
    counts = inputs["labels"][:, 1:] != -100
    ids = inputs["teacher_ids"][:, :-1]
    teacher = inputs["teacher_log_probs"][:, :-1].double().log_softmax(-1)
    student = logits.log_softmax(-1).gather(-1, ids).log_softmax(-1)
    losses = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature * losses[counts].mean()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_loss_and_gradients_are_those_of_the_logits(family: str) -> None:
    model, twin = tiny(family), tiny(family)
    set_objective(patch_model(model, temperature=0.5), Distillation())
    if family == "gemma2":
        twin.config.final_logit_softcapping = 0.5
    output = model(**batch())
    assert "logits" not in output
    expected = dense(twin, batch(), temperature=0.5)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-9)
    output.loss.backward()
    expected.backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-8)


def test_bits_of_float32_say_the_same() -> None:
    model = set_objective(patch_model(tiny()), Distillation("other"))
    inputs = batch()
    bits = inputs | {"teacher_log_probs": inputs["teacher_log_probs"].view(torch.int32)}
    assert torch.equal(model(**inputs).loss, model(**bits).loss)


def test_num_items_in_batch_divides_the_sum() -> None:
    model = set_objective(patch_model(tiny()), Distillation())
    mean, tenth = model(**batch()).loss, model(**batch(), num_items_in_batch=100).loss
    torch.testing.assert_close(mean, 10 * tenth)


def test_a_training_batch_without_its_columns_is_refused() -> None:
    model = set_objective(patch_model(tiny()), Distillation())
    inputs = batch()
    del inputs["teacher_ids"]
    with pytest.raises(ValueError, match=r"needs \('teacher_ids', 'teacher_log_probs'\) in every"):
        model(**inputs)


@torch.no_grad()
def test_evaluation_is_what_it_was() -> None:
    model = tiny().eval()
    inputs = {key: batch()[key] for key in ("input_ids", "labels")}
    before = model(**inputs)
    set_objective(patch_model(model), Distillation())
    for given in (inputs, batch()):  # what it does not need it leaves
        torch.testing.assert_close(model(**given).loss, before.loss)
    assert unpatch_model(model)(**inputs).loss == before.loss


def test_it_travels_with_the_model_and_none_takes_it_off() -> None:
    model = set_objective(patch_model(tiny(), smoothing=0.2), Distillation("full"))
    expected = model(**batch()).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch()).loss, expected)
    set_objective(model, None)
    inputs = {key: batch()[key] for key in ("input_ids", "labels")}
    assert torch.equal(model(**inputs).loss, patch_model(tiny(), smoothing=0.2)(**inputs).loss)


def test_a_model_without_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a patched model, and LlamaForCausalLM is not"):
        set_objective(tiny(), Distillation())


def test_it_compiles_whole() -> None:
    model = set_objective(patch_model(tiny()), Distillation())
    expected = model(**batch()).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch()).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
