"""Rows as questions: what an answer may be, what is refused, and the order of the options."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from levelhead.scoring import Question

ROW = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}


@pytest.mark.parametrize("answer", [1, "B", "b", " B ", "4"])
def test_an_answer_is_a_letter_an_index_or_a_text(answer):
    assert Question.from_row(ROW | {"answer": answer}).answer == 1


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({}, (None, None)),
        ({"id": 7, "subject": "sums"}, ("7", "sums")),
        ({"id": "x", "subject": "sums", "group": "ä"}, ("x", "ä")),
        ({"id": None, "group": None}, (None, None)),
        ({"group": 0}, (None, "0")),
    ],
)
def test_id_and_group_are_optional(row, want):
    question = Question.from_row(ROW | row)
    assert (question.question_id, question.group) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, '"question" is missing'),
        ({"question": "  "}, '"question" is empty'),
        ({"question": 3}, '"question" is not a string but a number'),
        ({"question": "\ud800"}, '"question" has half a surrogate pair at character 1'),
        ({"choices": None}, '"choices" is missing'),
        ({"choices": "ABC"}, '"choices" must be a list of texts, got str'),
        ({"choices": ["3"]}, '"choices" must have 2 to 26 entries, got 1'),
        ({"choices": ["x"] * 27}, '"choices" must have 2 to 26 entries, got 27'),
        ({"choices": ["3", 4, "5"]}, "choice 2 is not a string but a number"),
        ({"choices": ["3", "", "5"]}, "choice 2 is empty"),
        ({"answer": None}, '"answer" is missing; it must be a letter from A to C, an index from'),
        ({"answer": 3}, "an index from 0 to 2 or the text of a choice, got 3"),
        ({"answer": -1}, "got -1"),
        ({"answer": "D"}, "got 'D'"),
        ({"answer": "2"}, "got '2'"),
        ({"answer": True}, "got bool"),
        ({"answer": 1.0}, "got float"),
        ({"choices": ["B", "A"], "answer": "A"}, "could mean the choices with the indices 0 and 1"),
        ({"choices": ["4", "4"], "answer": "4"}, "could mean the choices with the indices 0 and 1"),
        ({"id": 1.5}, '"id" is not a string but a number'),
        ({"group": ["a"]}, '"group" is not a string but an array'),
    ],
)
def test_a_bad_row_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        Question.from_row(ROW | change)


TEXTS = st.lists(st.text(min_size=1), min_size=2, max_size=26)


@given(TEXTS, st.integers())
def test_an_order_is_a_permutation_that_depends_on_texts_and_seed_alone(choices, seed):
    first = Question("q", tuple(choices), 0, "1", "a").order(seed)
    assert sorted(first) == list(range(len(choices)))
    assert Question("q", tuple(choices), 1, "2", "b").order(seed) == first
    assert Question("q", tuple(choices), 0).order(None) == tuple(range(len(choices)))


def test_the_order_of_a_seed_is_fixed_for_good():
    assert Question("what?", ("a", "b", "c", "d", "e"), 0).order(42) == (0, 1, 4, 2, 3)


def test_the_right_answer_is_behind_every_letter_alike():
    places = collections.Counter(
        Question(f"question {number}", ("a", "b", "c", "d"), 0).order(1).index(0)
        for number in range(4000)
    )
    # four standard deviations of a binomial of 4000 with p = 1/4
    assert all(abs(places[letter] - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for letter in range(4))
