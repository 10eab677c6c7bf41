"""Tokenizers made on the spot, of the kinds that treat " A" and "A" differently."""

import pytest

pytest.importorskip("transformers")

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CORPUS = [
    "Question: what is it? Answer: A Answer: B Answer: C Answer: D Answer: E",
    "A. first\nB. second\nC. third\nD. fourth\n" * 3,
    "choose the right answer; plum and fig or apple, reply with a letter " * 3,
]


def _trained(pre_tokenizer, **trainer):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizer
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, show_progress=False, **trainer
        ),
    )
    return tokenizer


def _wrapped(tokenizer, **options):
    ids = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ids | options)


def byte_level():
    """As GPT-2's: a space belongs to the word after it, a line break does not."""
    return _wrapped(
        _trained(
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    )


def sentence_piece():
    """As Llama 2's: ▁ for a space, also before the first word; begins with <s>."""
    line_breaks = pre_tokenizers.Split("\n", "isolated")  # <0x0A> merges with nothing there
    tokenizer = _trained(
        pre_tokenizers.Sequence([line_breaks, pre_tokenizers.Metaspace(prepend_scheme="first")]),
        initial_alphabet=[chr(code) for code in range(32, 127)],
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _wrapped(tokenizer)


def word_level(words, *, lowercase=False):
    """One token for each of `words`, whatever is around it; <unk> for others."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        from tokenizers import normalizers

        tokenizer.normalizer = normalizers.Lowercase()
    return _wrapped(tokenizer)


def single_characters():
    """One token a character; ▁ for a space is a token of its own."""
    alphabet = [chr(code) for code in range(32, 127)]
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\n", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return _wrapped(tokenizer)
