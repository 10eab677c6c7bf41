"""Multiple-choice questions of `levelhead sft` as tokens."""

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from levelhead.cli.errors import CliError
from levelhead.cli.models import TINY, load_tokenizer
from levelhead.cli.sft.calibration import QuestionCollator, question_encoder

ROW = {"question": "2 + 2?", "choices": ["3", "vier", "5"], "answer": "vier"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, None, trust_remote_code=False)


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_letter_of_the_right_choice_follows_the_question(tokenizer, completion_only):
    tokens = question_encoder(tokenizer, completion_only=completion_only).encode(ROW)
    letter = tokens.input_ids[tokens.answer_position + 1]
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens.choices) == "ABC"
    assert letter == tokens.choices[tokens.answer]
    assert f"{tokenizer.decode(letter)}. vier" in tokenizer.decode(tokens.input_ids)
    have_loss = [label != -100 for label in tokens.labels]
    if completion_only:
        assert have_loss == [False] * (len(have_loss) - 2) + [True] * 2
    else:
        assert have_loss == [False] + [True] * (len(have_loss) - 1)
    assert tokens.supervised == sum(have_loss)


def test_a_question_whose_answer_is_cut_off_is_not_trained_on(tokenizer):
    tokens = question_encoder(tokenizer, completion_only=False).encode(ROW)
    at = tokens.answer_position
    assert tokens.cut(at + 2).supervised == at + 1
    assert tokens.cut(at + 1).supervised == 0


def test_only_numbered_questions_come_with_their_letters(tokenizer):
    encode = question_encoder(tokenizer, completion_only=True).encode
    two = vars(encode(ROW | {"choices": ["vier", "5"]}))
    three = vars(encode(ROW))
    collate = QuestionCollator(0, width=4)
    assert set(collate([two, three])) == {"input_ids", "labels", "attention_mask"}
    batch = collate([two | {"question": 7}, three | {"question": 2}])
    assert (batch["choices"] >= 0).sum(1).tolist() == [2, 3]
    assert batch["choices"].shape == (2, 4)
    assert batch["question"].tolist() == [7, 2]
    rows = torch.arange(2)
    answers = batch["input_ids"][rows, batch["answer_position"] + 1]
    assert torch.equal(answers, batch["choices"][rows, [two["answer"], three["answer"]]])


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    tokenizer = load_tokenizer(TINY, None, trust_remote_code=False)
    tokenizer.eos_token = None
    with pytest.raises(CliError, match=r"no EOS token.*set its eos_token"):
        question_encoder(tokenizer, completion_only=True)
