"""What a score says equals the dense softmax of the model's own logits; batches change nothing."""

import math

import pytest
import torch
from tests.integrations.tiny_models import VOCAB_SIZE, tiny

from levelhead.integrations import patch_model
from levelhead.scoring import Question
from levelhead.scoring.prompts import Prompt
from levelhead.scoring.scores import score_prompts

LETTERS = (11, 5, 23, 40, 8)


def prompts(lengths=(9, 3, 14, 1, 9, 20, 6), seed=2):
    """Prompts of random tokens, with two to five choices in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(lengths):
        choices = 2 + number % 4
        question = Question(f"q{number}", tuple("vwxyz"[:choices]), number % choices)
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        order = tuple(torch.randperm(choices, generator=generator).tolist())
        found.append(Prompt(question, order, ids, LETTERS[:choices]))
    return found


def sure(family, **options):
    """A model in eval mode with logits of order one."""
    # Masks of Gemma2's attention overflow in float64: it takes their softmax in float32.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = tiny(family, **{"dtype": dtype} | options).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20
    return model


FAMILIES = ["llama", "gpt2", "gemma2", "granite", "cohere", "phi"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_statistic_equals_that_of_the_models_own_logits(family):
    model = sure(family)
    for prompt, score in zip(prompts(), score_prompts(model, prompts(), batch_size=3), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt.input_ids])).logits[0, -1].double()
        p, letters = logits.softmax(-1), logits[list(prompt.letter_ids)]
        got = {
            "msp": score.msp,
            "max_logit": score.max_logit,
            "entropy": score.entropy,
            "choice_probability": score.choice_probability,
        }
        want = {
            "msp": p.max().item(),
            "max_logit": logits.max().item(),
            "entropy": -(p * p.log()).sum().item(),
            "choice_probability": letters.softmax(-1).max().item(),
        }
        # float32 rounding; float64 models, too, normalise in float32
        assert got == pytest.approx(want, abs=1e-6)
        assert score.choice_logits == pytest.approx(letters.tolist(), abs=1e-6)
        assert score.prediction == "ABCDE"[int(letters.argmax())]
        assert score.argmax_is_choice == (int(logits.argmax()) == LETTERS[int(letters.argmax())])
        assert score.order[score.target] == prompt.question.answer
        assert score.answer == "ABCDE"[score.target]
        assert score.correct == (score.answer == score.prediction)
        assert score.confidence == score.msp


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 100])
def test_batches_with_padding_equal_one_by_one(family, batch_size):
    model = sure(family)
    got = list(score_prompts(model, prompts(), batch_size=batch_size))
    want = list(score_prompts(model, prompts(), batch_size=1))
    for a, b in zip(got, want, strict=True):
        assert a.choice_logits == pytest.approx(b.choice_logits, abs=1e-6)
        assert (a.msp, a.entropy) == pytest.approx((b.msp, b.entropy), abs=1e-6)
        assert a[:5] == b[:5]


def test_windows_of_batches_keep_the_order_of_the_questions(monkeypatch):
    monkeypatch.setattr("levelhead.scoring.scores._BATCHES_TO_SORT", 2)
    model = sure("llama")
    got = list(score_prompts(model, prompts(), batch_size=2))
    assert [score.question_id for score in got] == list("1234567")
    want = list(score_prompts(model, prompts(), batch_size=1))
    assert [score.msp for score in got] == pytest.approx([score.msp for score in want], abs=1e-12)


def test_a_patched_model_scores_as_it_did_before():
    options = {"softcap": 3.0, "temperature": 0.5, "eval_smoothing": 0.1, "eval_logits": False}
    want = list(score_prompts(sure("llama"), prompts()))
    assert list(score_prompts(patch_model(sure("llama"), **options), prompts())) == want


def test_a_compiled_model_scores_as_it_did_before():
    want = list(score_prompts(sure("llama"), prompts()))
    model = torch.compile(sure("llama"), backend="eager")
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))  # compiled now, before the hooks that score
    assert list(score_prompts(model, prompts())) == want


def test_the_head_makes_the_logits_of_one_token_at_most():
    model, sizes = sure("llama"), []
    model.lm_head.register_forward_hook(lambda _m, _i, output: sizes.append(output.numel()))
    list(score_prompts(model, prompts(), batch_size=4))
    assert set(sizes) == {VOCAB_SIZE}


def test_the_model_is_left_as_it_was():
    model = sure("llama")
    ids = torch.tensor([[3, 4, 5]])
    want = model(input_ids=ids).logits
    scores = score_prompts(model, prompts(), batch_size=2)
    next(scores)
    assert torch.equal(model(input_ids=ids).logits, want)  # also between two scores


def test_confidence_may_be_that_among_the_choices():
    for score in score_prompts(sure("llama"), prompts(), confidence="choice_probability"):
        assert score.confidence == score.choice_probability > score.msp


def test_certainty_is_one_and_not_above():
    model = sure("llama", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    for score in score_prompts(model, prompts()):
        assert score.msp == 1.0
        assert score.entropy == pytest.approx(0, abs=1e-3)  # a difference of logits of order 1e4


def test_bfloat16_is_as_near_as_its_rounding():
    want = list(score_prompts(sure("llama"), prompts()))
    got = list(score_prompts(sure("llama").to(torch.bfloat16), prompts()))
    for a, b in zip(got, want, strict=True):
        assert a.max_logit == pytest.approx(b.max_logit, rel=0.05)  # 2**-8 in each of a few layers


def test_no_prompts_give_no_scores():
    assert list(score_prompts(sure("llama"), [])) == []


def test_broken_weights_are_an_error_that_names_the_question():
    model = sure("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match=r"for question \d are not finite: .* check the model"):
        list(score_prompts(model, prompts()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"confidence": "p"},
            "unknown confidence 'p'; expected one of 'msp', 'choice_probability'",
        ),
        ({"model": tiny()}, "is in training mode"),
        ({"prompts": prompts((3, 33)), "model": tiny("gpt2").eval()}, "question 2 has 33 tokens"),
        ({"model": torch.nn.Linear(2, 2).eval()}, "no statistics of the logits of Linear"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(change, message):
    arguments = {"model": sure("llama"), "prompts": prompts()} | change
    with pytest.raises(ValueError, match=message):
        next(score_prompts(**arguments))
