"""Prompts end where the letter comes, and the letters' tokens are those the tokenizer puts there."""

import pytest
from tests.integrations.tiny_tokenizers import (
    CHAT_TEMPLATE,
    byte_level,
    sentence_piece,
    single_characters,
    word_level,
)

from levelhead.scoring import Prompter, Question
from levelhead.scoring.prompts import PHRASINGS

QUESTION = Question("what {is} it?", ("plum", "fig", "apple", "pear"), 2)
TIGHT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
THINKING = CHAT_TEMPLATE + (
    "{% if add_generation_prompt and not enable_thinking|default(true) %}{{ '<think></think>\\n' }}"
    "{% endif %}"
)


def text_of(prompt, tokenizer):
    """What a byte-level prompt says."""
    tokens = "".join(tokenizer.convert_ids_to_tokens(list(prompt.input_ids)))
    return tokens.replace("Ġ", " ").replace("Ċ", "\n")


@pytest.mark.parametrize(
    ("make", "phrasing", "last", "letters"),
    [
        (byte_level, "first", "Ċ", "ABCD"),
        (byte_level, "second", ":", ["ĠA", "ĠB", "ĠC", "ĠD"]),
        (sentence_piece, "first", "\n", "ABCD"),
        (sentence_piece, "second", "nswer:", ["▁A", "▁B", "▁C", "▁D"]),
        (single_characters, "first", "\n", "ABCD"),
        (single_characters, "second", " ", "ABCD"),  # the space is a token before the letter
    ],
)
def test_letters_are_the_tokens_that_follow_the_prompt(make, phrasing, last, letters):
    tokenizer = make()
    prompt = Prompter(tokenizer, phrasing=phrasing)(QUESTION)
    assert tokenizer.convert_ids_to_tokens(prompt.letter_ids) == list(letters)
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids[-1]) == last


def test_the_tokenizers_special_tokens_begin_a_prompt_and_do_not_end_it():
    tokenizer = sentence_piece()
    assert Prompter(tokenizer)(QUESTION).input_ids[0] == tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("fig")["input_ids"][-1] == tokenizer.eos_token_id
    prompt = Prompter(tokenizer)(QUESTION)
    assert tokenizer.eos_token_id not in prompt.input_ids
    assert tokenizer.convert_ids_to_tokens(prompt.letter_ids) == list("ABCD")


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_question_and_options_are_shown_in_the_order_of_the_prompt(phrasing):
    tokenizer = byte_level()
    prompt = Prompter(tokenizer, phrasing=phrasing, seed=7)(QUESTION)
    shown = text_of(prompt, tokenizer)
    assert "what {is} it?" in shown
    for letter, index in zip("ABCD", prompt.order, strict=True):
        assert f"\n{letter}. {QUESTION.choices[index]}\n" in shown


@pytest.mark.parametrize(
    ("template", "end", "letters"),
    [
        (CHAT_TEMPLATE, "<|assistant|>\n", "ABCD"),
        (TIGHT, "[/INST]", ["ĠA", "ĠB", "ĠC", "ĠD"]),
        (THINKING, "<|assistant|>\n<think></think>\n", "ABCD"),
    ],
)
def test_in_a_chat_the_letter_comes_where_the_template_puts_an_answer(template, end, letters):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    prompt = Prompter(tokenizer)(QUESTION)
    assert tokenizer.convert_ids_to_tokens(prompt.letter_ids) == list(letters)
    assert text_of(prompt, tokenizer).endswith(end)


def test_a_chat_template_can_be_left_out():
    tokenizer = byte_level()
    want = Prompter(tokenizer)(QUESTION)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert Prompter(tokenizer)(QUESTION) != want
    assert Prompter(tokenizer, chat_template=False)(QUESTION) == want


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_level(["A", "B", "C"]), r"the letter D is not one token .* but \['<unk>'\]"),
        (word_level([]), r"the letter A is not one token after the prompt, but \['<unk>'\]"),
    ],
)
def test_a_letter_without_a_token_is_an_error_that_names_it(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        Prompter(tokenizer)(QUESTION)


def test_a_letter_of_two_pieces_is_an_error_that_shows_them():
    tokenizer = byte_level()
    tokenizer.add_tokens(["\nB"])  # so that "\nA" is two tokens where "\nB" is one
    with pytest.raises(ValueError, match=r"the letter A is not one token .* but \['Ċ', 'A'\]"):
        Prompter(tokenizer)(QUESTION)


def test_letters_that_share_a_token_are_an_error():
    tokenizer = word_level(["a", "b", "c"])
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(letter, "a") for letter in "AB"]
        + [normalizers.Replace(letter, "c") for letter in "CD"]
    )
    with pytest.raises(ValueError, match=r"the letters A and B are the same token 'a'"):
        Prompter(tokenizer)(QUESTION)


def test_a_long_prompt_is_refused_and_never_cut():
    tokenizer = byte_level()
    length = len(Prompter(tokenizer)(QUESTION).input_ids)
    assert len(Prompter(tokenizer, max_length=length)(QUESTION).input_ids) == length
    message = (
        f"its prompt has {length} tokens, more than the {length - 1} allowed; shorten the question"
    )
    with pytest.raises(ValueError, match=message):
        Prompter(tokenizer, max_length=length - 1)(QUESTION)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown phrasing 'third'; expected one of 'first', 'sec"):
        Prompter(byte_level(), phrasing="third")
    with pytest.raises(ValueError, match=r"chat_template=True, but the .* has none"):
        Prompter(byte_level(), chat_template=True)


def test_a_template_that_refuses_is_an_error():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match="the chat template refuses it: no users here"):
        Prompter(tokenizer)
