"""Which tokens have a loss, read back as text; and padding."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from levelhead.cli.errors import CliError
from levelhead.cli.examples import Chat, Collator, Pair, Tokens, encode
from levelhead.cli.models import load_tokenizer
from levelhead.ops.checks import IGNORE_INDEX

TALK = Chat(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4 — «four»"},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
)
MARKS = ("{%- generation %}", "{% endgeneration %}")
# As Qwen 3 does it: what the assistant thought is kept in its last turn only.
FORGETFUL = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


def tiny():
    return load_tokenizer("tiny", None, trust_remote_code=False)


def without_marks():
    tokenizer = tiny()
    for mark in MARKS:
        assert mark in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    return tokenizer


def merging(*merges, before=(), after=()):
    """A tokenizer of the letters a to e with these merges, and special tokens around every text."""
    tokens = ["<s>", "</s>", *"abcde", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Fuse()
    specials = [("<s>", 0), ("</s>", 1)]
    pattern = " ".join([*before, "$A", *after])
    tokenizer.post_processor = processors.TemplateProcessing(pattern, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def supervised(tokens, tokenizer):
    """The runs of tokens that have a loss, each as text."""
    runs, last = [], None
    for i, (token, label) in enumerate(zip(tokens.input_ids, tokens.labels, strict=True)):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            runs = [*runs, [token]] if last != i - 1 else [*runs[:-1], [*runs[-1], token]]
            last = i
    return [tokenizer.decode(run) for run in runs]


def test_of_a_pair_the_completion_and_its_end_have_a_loss():
    tokens = encode(Pair("où est-il ?", " là 🙂"), tiny())
    assert tiny().decode(tokens.input_ids) == "où est-il ? là 🙂<|end|>"
    assert supervised(tokens, tiny()) == [" là 🙂<|end|>"]
    assert tokens.supervised == len(" là 🙂".encode()) + 1


def test_prompt_and_completion_are_one_text_where_their_tokens_divide():
    tokenizer = merging(("c", "d"))
    tokens = encode(Pair("ab", "cde"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["a", "b", "cd", "e", "</s>"]
    assert supervised(tokens, tokenizer) == ["cde</s>"]


def test_no_token_lies_astride_prompt_and_completion():
    tokenizer = merging(("b", "c"))
    tokens = encode(Pair("ab", "cbc"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["a", "b", "c", "bc", "</s>"]
    assert supervised(tokens, tokenizer) == ["cbc</s>"]


@pytest.mark.parametrize("merges", [[], [("b", "c")]])
def test_special_tokens_of_the_tokenizer_stand_once_around_the_whole(merges):
    tokenizer = merging(*merges, before=["<s>"], after=["</s>"])
    tokens = encode(Pair("ab", "c"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["<s>", "a", "b", "c", "</s>"]
    assert supervised(tokens, tokenizer) == ["c</s>"]


def test_of_a_chat_every_turn_of_the_assistant_has_a_loss():
    tokens = encode(TALK, tiny())
    assert supervised(tokens, tiny()) == ["4 — «four»<|end|>", "6<|end|>"]
    assert tiny().decode(tokens.input_ids) == (
        "<|start|>system\nBe brief.<|end|>\n"
        "<|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n4 — «four»<|end|>\n"
        "<|start|>user\nAnd 3 + 3?<|end|>\n<|start|>assistant\n6<|end|>\n"
    )


def test_without_marks_in_the_template_the_turns_are_found_by_prefixes():
    tokens = encode(TALK, without_marks())
    assert tokens.input_ids == encode(TALK, tiny()).input_ids
    # The line break after a turn belongs to the turn, as far as prefixes can tell.
    assert supervised(tokens, tiny()) == ["4 — «four»<|end|>\n", "6<|end|>\n"]


def test_a_template_that_changes_earlier_turns_is_refused_with_a_way_out():
    tokenizer = tiny()
    tokenizer.chat_template = FORGETFUL
    single = Chat(TALK.messages[:3])
    assert supervised(encode(single, tokenizer), tokenizer) == ["<think></think>4 — «four»<|end|>"]
    with pytest.raises(ValueError, match=r"message 3 cannot be told apart .*--chat-template"):
        encode(TALK, tokenizer)


def test_a_chat_that_the_assistant_opens_needs_marks():
    chat = Chat([{"role": "assistant", "content": "Hello"}])
    assert supervised(encode(chat, tiny()), tiny()) == ["Hello<|end|>"]
    with pytest.raises(ValueError, match="message 1 cannot be told apart"):
        encode(chat, without_marks())


def test_what_the_template_refuses_is_a_reason():
    tokenizer = tiny()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses it: roles must alternate"):
        encode(TALK, tokenizer)


def test_what_the_tokenizer_lacks_for_every_row_is_no_fault_of_the_row():
    tokenizer = tiny()
    tokenizer.chat_template = None
    with pytest.raises(CliError, match="has no chat template; give it one with --chat-template"):
        encode(TALK, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(CliError, match=r"has no EOS token.*set its eos_token"):
        encode(Pair("a", "b"), tokenizer)


def test_the_first_token_has_no_loss_whatever_its_label():
    assert Tokens([5, 6], [5, 6]).supervised == 1
    assert Tokens([5, 6], [5, IGNORE_INDEX]).supervised == 0


def test_batches_are_padded_on_the_right():
    rows = [Tokens([5, 6, 7], [IGNORE_INDEX, 6, 7]), Tokens([8], [8])]
    batch = Collator(padding=9)([vars(row) for row in rows])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
