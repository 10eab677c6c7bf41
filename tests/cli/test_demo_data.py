"""Reading, tokens, split and batches of the demo."""

import json
import unicodedata

import pytest
import torch

from levelhead.cli.demo import data
from levelhead.cli.demo.data import (
    Example,
    Tokens,
    Vocabulary,
    collate,
    read_jsonl,
    split,
    unicode_facts,
)
from levelhead.cli.errors import CliError
from levelhead.ops.checks import IGNORE_INDEX

GOOD = json.dumps({"prompt": "one and one", "completion": "two"})
CPU = torch.device("cpu")


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(
            b"".join((s if isinstance(s, bytes) else s.encode()) + b"\n" for s in lines)
        )
        return path

    return write_lines


def test_facts_are_true_and_distinct():
    facts = unicode_facts()
    assert len(facts) > 10_000
    assert len({fact.prompt for fact in facts}) == len(facts)
    assert all(unicodedata.category(unicodedata.lookup(name)) == answer for name, answer in facts)
    assert not any("IDEOGRAPH-" in name for name, _ in facts)


def test_good_rows_with_blank_lines_a_byte_order_mark_and_other_fields(write):
    extra = json.dumps({"prompt": "p", "completion": "c", "source": 3})
    path = write("\ufeff" + extra, "", *[GOOD] * 49, "  ")
    examples = read_jsonl(path)
    assert examples[0] == Example("p", "c")
    assert examples[1:] == [Example("one and one", "two")] * 49


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "p"', "not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 13"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "not an object but an array"),
        ("null", "not an object but null"),
        ('{"completion": "c"}', '"prompt" is missing'),
        ('{"prompt": "p"}', '"completion" is missing'),
        ('{"prompt": 3, "completion": "c"}', '"prompt" is not a string but a number'),
        ('{"prompt": "p", "completion": true}', '"completion" is not a string but a boolean'),
        ('{"prompt": "p", "completion": "  "}', '"completion" is empty'),
        (json.dumps({"prompt": "p " * 256, "completion": "c"}), "257 words, and at most 256 fit"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(line, reason, write):
    with pytest.raises(CliError) as error:
        read_jsonl(write(*[GOOD] * 60, line))
    head, named, hint = str(error.value).splitlines()
    assert head.startswith("1 of 61 lines of ")
    assert head.endswith("cannot be used, so nothing was trained:")
    assert named == f"  line 61: {reason}"
    assert hint == 'write each line as {"prompt": "...", "completion": "..."}'


def test_all_bad_lines_are_named_up_to_twenty(write):
    with pytest.raises(CliError) as error:
        read_jsonl(write(*["[]", GOOD] * 25))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("25 of 50 lines")
    assert [line.split(":")[0] for line in lines[1:21]] == [f"  line {n}" for n in range(1, 40, 2)]
    assert lines[21] == "  and 5 more"


def test_too_few_rows(write):
    with pytest.raises(CliError, match=r"has 49 rows, and the demo needs at least 50"):
        read_jsonl(write(*[GOOD] * 49))


def test_no_such_file(tmp_path):
    with pytest.raises(CliError, match=r"cannot read .*: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(CliError, match=r"cannot read .*: Is a directory"):
        read_jsonl(tmp_path)


def test_tokens_are_words_and_marks():
    vocabulary = Vocabulary([Example("b, a-b", "a"), Example("c?", "it's")])
    # Three special tokens, then ' , - ? a b c it s
    assert len(vocabulary) == 3 + 9
    assert vocabulary.encode(Example("a-b", "it's")) == Tokens([1, 7, 5, 8, 2], [10, 3, 11])


def test_split_depends_on_the_seed_alone_and_shares_no_row():
    rows = [Tokens([i], [i]) for i in range(100)]
    training, held_out = split(rows, seed=1)
    assert (training, held_out) == split(rows, seed=1)
    assert (training, held_out) != split(rows, seed=2)
    assert sorted(training + held_out) == rows
    assert len(held_out) == 20


def test_split_is_capped():
    rows = [Tokens([i], [i]) for i in range(20_000)]
    assert [len(part) for part in split(rows, seed=0)] == [data.MAX_TRAINING, data.MAX_HELD_OUT]


def test_batches_are_padded_on_the_right_and_labelled_at_the_completion():
    batch = collate([Tokens([1, 7, 2], [8]), Tokens([1, 2], [9])], CPU)
    assert batch.input_ids.tolist() == [[1, 7, 2, 8], [1, 2, 9, 0]]
    none = IGNORE_INDEX
    assert batch.labels.tolist() == [[none, none, none, 8], [none, none, 9, none]]
