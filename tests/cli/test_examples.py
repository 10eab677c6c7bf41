"""Rows from every kind of source, and what is said of bad ones."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet

from levelhead.cli.errors import CliError
from levelhead.cli.examples import Chat, Pair, example_encoder, parse_example, prepare
from levelhead.cli.models import load_tokenizer
from levelhead.cli.sources import open_source

PAIR = {"prompt": "1 + 1 =", "completion": " 2"}
CHAT = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="data.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_struct_array(pa.array(rows)), path)
        else:
            texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            path.write_text("".join(text + "\n" for text in texts))
        return str(path)

    return write_rows


def read(data):
    source = open_source(data, None, "train")
    return [parse_example(source.parse(row)) for _, row in source.rows]


def prepared(data, tmp_path, max_length=100):
    path = tmp_path / "tokens" / "data"
    encoder = example_encoder(load_tokenizer("tiny", None, trust_remote_code=False))
    source = open_source(data, None, "train")
    counts = prepare(source, encoder, max_length=max_length, path=path)
    return counts, Dataset.from_file(str(path))


def test_pairs_and_chats_may_be_mixed_and_have_other_fields(write):
    data = write(PAIR | {"source": 3}, "", CHAT | {"prompt": "1 + 1?"})
    assert read(data) == [Pair("1 + 1 =", " 2"), Chat(CHAT["messages"])]


def test_parquet_holds_the_same_rows_as_json_lines(write):
    tool = {"role": "assistant", "content": "2", "name": "adder"}
    mixed = [PAIR, CHAT, {"messages": [*CHAT["messages"], tool]}]
    assert read(write(*mixed, name="data.parquet")) == read(write(*mixed))


def test_a_folder_is_a_data_set(write, tmp_path):
    write(PAIR, PAIR)
    assert read(str(tmp_path)) == [Pair("1 + 1 =", " 2")] * 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "p"', "not JSON: Expecting ',' delimiter at column 15"),
        ("[1]", "not an object but an array"),
        ({"text": "t"}, 'neither "messages" nor "prompt" and "completion"'),
        ({"prompt": "p"}, '"completion" is missing'),
        ({"prompt": "p", "completion": ["c"]}, '"completion" is not a string but an array'),
        ({"prompt": "p", "completion": " "}, '"completion" is empty'),
        ({"messages": "hello"}, '"messages" is not an array but a string'),
        ({"messages": []}, 'no message has the role "assistant", so there is nothing to learn'),
        ({"messages": CHAT["messages"][:1]}, 'no message has the role "assistant", so there is '
         "nothing to learn"),
        ({"messages": [*CHAT["messages"], "bye"]}, "message 3 is not an object but a string"),
        ({"messages": [{"content": "c"}]}, 'message 1: "role" is missing'),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1: "content" is not a string '
         "but null"),
        ('{"prompt": "p", "completion": "\\ud800"}', '"completion" has half a surrogate pair at character 1'),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_reason_and_nothing_is_left_behind(
    row, reason, write, tmp_path
):
    with pytest.raises(CliError) as error:
        prepared(write(PAIR, "", row, CHAT), tmp_path)
    head, named, hint = str(error.value).splitlines()
    assert head.startswith("1 of 4 lines of ")
    assert head.endswith("data.jsonl cannot be used, so nothing was trained:")
    assert named == f"  line 3: {reason}"
    assert hint == (
        'each row must have "prompt" and "completion", or "messages": a list of '
        '{"role": "user", "content": "..."} with one of role "assistant" at least'
    )
    assert not list((tmp_path / "tokens").iterdir())


def test_rows_of_parquet_are_numbered_from_one(write, tmp_path):
    bad = {"prompt": "p", "completion": None}
    with pytest.raises(CliError, match=r'  row 3: "completion" is not a string but null'):
        prepared(write(PAIR, PAIR, bad, name="data.parquet"), tmp_path)


def test_every_bad_row_counts_and_twenty_are_named(write, tmp_path):
    with pytest.raises(CliError) as error:
        prepared(write(*["[]", PAIR] * 25), tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("25 of 50 lines")
    assert lines[20].startswith("  line 39: ")
    assert lines[21] == "  and 5 more"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, r"cannot read .*none.jsonl: No such file"),
        ("none.parquet", None, r"cannot read .*none.parquet"),
        ("data.parquet", "{}", r"data.parquet is not a Parquet file"),
        ("data.csv", "a,b", r"cannot tell what .*data.csv holds by its name"),
        ("data.jsonl", "\n", r"data.jsonl has no rows"),
        ("no/such/data", None, r"no/such/data is neither a .jsonl or .parquet file, nor a data"),
    ],
)
def test_data_that_is_none(name, content, reason, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CliError, match=reason):
        prepared(str(tmp_path / name), tmp_path)


def test_what_is_cut_and_what_is_left_out_is_counted(write, tmp_path):
    # One token a byte, and one for the end: 9 + 1, then 5 + 7 + 1, then 13 + 2 + 1.
    long = {"prompt": "p" * 5, "completion": "c" * 7}
    beyond = {"prompt": "p" * 13, "completion": "cc"}
    counts, table = prepared(write(PAIR, long, beyond), tmp_path, max_length=12)
    assert (counts.rows, counts.cut, counts.left_out) == (2, 1, 1)
    assert (counts.tokens, counts.longest) == (10 + 12, 12)
    assert counts.supervised == 3 + 7
    assert [len(row["input_ids"]) for row in table] == [10, 12]
    with pytest.raises(CliError, match="lies beyond token 5; raise --max-length"):
        prepared(write(beyond), tmp_path, max_length=5)


def test_the_digest_is_that_of_the_tokens(write, tmp_path):
    digests = [
        prepared(write(*rows), tmp_path)[0].digest
        for rows in ([PAIR, CHAT], [PAIR | {"id": 7}, CHAT], [CHAT, PAIR], [PAIR])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
