"""RCFT in a patched model: its loss is the dense formula's, whatever the batches."""

import pytest
import torch
import torch.nn.functional as F
from tests.objectives import oracle

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from levelhead import patch_model
from levelhead.integrations import set_objective
from levelhead.objectives.calibration_aware import (
    choice_probabilities,
    classwise_bins,
    confidence_bins,
)
from levelhead.objectives.rcft import CalibrationAware, choice_logits

LETTERS = torch.tensor([[7, 8, 9, 10], [7, 8, 9, -1], [9, 8, 7, 10], [7, 8, 9, 10]])
ANSWER = torch.tensor([1, 0, 3, 3])
POSITION = torch.tensor([3, 5, 4, 3])


def tiny_model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        **options,
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the questions fall into several bins
    return model


def batch():
    """Four questions of different lengths, padded on the right; every token has a label."""
    ids = torch.randint(11, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    for row, at in enumerate(POSITION):
        ids[row, at + 1] = LETTERS[row, ANSWER[row]]
        ids[row, at + 3 :] = 0
    mask = (ids != 0).long()
    labels = ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def questions():
    return {"choices": LETTERS, "answer_position": POSITION, "question": torch.arange(4)}


def dense(model, rows):
    """Logits, choice probabilities as lists, and the mean of -log p, of an unpatched model."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
    at = logits[torch.arange(4), POSITION]
    return loss, [z[ids[ids >= 0]].softmax(-1) for z, ids in zip(at, LETTERS, strict=True)]


def test_the_e_step_sees_what_the_dense_model_says():
    model = tiny_model()
    _, want = dense(model, batch())
    got = choice_logits(model, [batch() | questions()], questions=4)
    p = choice_probabilities(got, LETTERS)
    for row, (mine, theirs) in enumerate(zip(p, want, strict=True)):
        torch.testing.assert_close(mine[: len(theirs)], theirs.float(), msg=str(row))
    assert model.training


@pytest.mark.parametrize("in_place", [False, True])
def test_the_e_step_of_a_compiled_model_is_the_same(in_place):
    model = patch_model(tiny_model())
    want = choice_logits(model, [batch() | questions()], questions=4)
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    compiled(**batch())  # compiled now, before the E-step adds its hooks
    for _ in range(2):
        assert torch.equal(choice_logits(compiled, [batch() | questions()], questions=4), want)


def test_loss_and_gradients_are_those_of_the_dense_formula():
    model, rows = tiny_model(), batch()
    plain, p = dense(model, rows)
    tokens = int((rows["labels"][:, 1:] != -100).sum())
    probabilities = choice_probabilities(
        choice_logits(model, [rows | questions()], questions=4), LETTERS
    )
    binned = confidence_bins(probabilities, ANSWER, valid=LETTERS >= 0)
    want = plain
    for q, right, count in zip(p, *(column.tolist() for column in binned), strict=True):
        target = torch.tensor(oracle.target(q.tolist(), right / count), dtype=torch.float64)
        want = want + 0.7 * (q - target).square().sum() / count
    want.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}

    set_objective(patch_model(model), CalibrationAware(tokens, ece_weight=0.7))
    model.zero_grad()
    out = model(
        **rows,
        choices=LETTERS,
        answer_position=POSITION,
        bin_right=binned.right,
        bin_size=binned.size,
    )
    assert "logits" not in out
    out.loss.backward()
    torch.testing.assert_close(out.loss, want)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("classwise", [False, True])
def test_batches_of_any_size_make_the_whole(classwise):
    model, rows = tiny_model(), batch()
    tokens = int((rows["labels"][:, 1:] != -100).sum())
    p = choice_probabilities(choice_logits(model, [rows | questions()], questions=4), LETTERS)
    binned = (classwise_bins if classwise else confidence_bins)(p, ANSWER, valid=LETTERS >= 0)
    everything = rows | questions() | {"bin_right": binned.right, "bin_size": binned.size}
    del everything["question"]
    set_objective(patch_model(model), CalibrationAware(tokens, classwise=classwise))
    whole = model(**everything).loss
    parts = [
        model(**{name: x[a:b] for name, x in everything.items()}, num_items_in_batch=tokens).loss
        for a, b in ((0, 1), (1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_smoothing_is_that_of_the_tokens():
    model, rows = tiny_model(), batch()
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    want = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), label_smoothing=0.3
    )
    set_objective(patch_model(model), CalibrationAware(1, ece_weight=0.0, label_smoothing=0.3))
    bins = {"bin_right": torch.ones(4).long(), "bin_size": torch.ones(4).long()}
    got = model(**rows, choices=LETTERS, answer_position=POSITION, **bins).loss
    torch.testing.assert_close(got, want)


def test_it_compiles_as_one_graph():
    model, rows = tiny_model(torch.float32), batch()
    set_objective(patch_model(model), CalibrationAware(20))
    bins = {"bin_right": torch.arange(4), "bin_size": torch.full((4,), 5)}
    inputs = rows | {"choices": LETTERS, "answer_position": POSITION} | bins
    want = model(**inputs).loss
    want.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    got.backward()
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(mine.grad, theirs)


@torch.no_grad()
def test_an_evaluation_is_what_it_was():
    model, rows = tiny_model(), batch()
    model.eval()
    want = model(**rows)
    set_objective(patch_model(model), CalibrationAware(20))
    got = model(**rows)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits)


def test_a_question_in_no_batch_is_an_error():
    with pytest.raises(RuntimeError, match="question 4 of 5 was in no batch"):
        choice_logits(tiny_model(), [batch() | questions()], questions=5)
    with pytest.raises(RuntimeError, match="no batch of questions"):
        choice_logits(tiny_model(), [], questions=5)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"ece_weight": -1}, {"label_smoothing": 2}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        CalibrationAware(**{"tokens": 1} | options)
