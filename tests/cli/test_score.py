"""`levelhead score`: the file it writes, what it prints, and what it refuses."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("rich")

import transformers
from pyarrow import Table, parquet

from levelhead.calibration import auroc, calibration_error
from levelhead.cli import main
from levelhead.cli.errors import CliError
from levelhead.cli.models import load_model, load_tokenizer
from levelhead.cli.score import file as score_file
from levelhead.scoring import score_questions

ROWS = [
    {
        "question": f"{i} + {i}?",
        "choices": [str(2 * i), f"{2 * i + 1}", f"{i}ü"][: 2 + i % 2],
        "answer": str(2 * i),
        "subject": "even" if i % 2 == 0 else "odd",
    }
    for i in range(1, 12)
]


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(*arguments):
    return main(["score", "tiny", *map(str, arguments)])


def tiny():
    transformers.set_seed(0)
    model = load_model("tiny", torch.float32, trust_remote_code=False).eval()
    return model, load_tokenizer("tiny", None, trust_remote_code=False)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    data, output = write(folder / "data.jsonl"), folder / "new" / "scores.parquet"
    assert score(data, "-o", output, "--batch-size", "4") == 0
    return output


def test_a_row_is_the_score_of_the_python_function(scored):
    want = [s._asdict() for s in score_questions(*tiny(), ROWS, batch_size=4)]
    got = parquet.read_table(scored).to_pylist()
    assert [row.pop("model") for row in got] == ["tiny"] * len(ROWS)
    for a, b in zip(got, want, strict=True):
        assert a.pop("choice_logits") == pytest.approx(b.pop("choice_logits"))
        assert a == b


def test_the_columns_have_the_documented_types(scored):
    types = {field.name: str(field.type) for field in parquet.read_schema(scored)}
    assert types == {
        **dict.fromkeys(("question_id", "group", "answer", "prediction", "model"), "string"),
        **dict.fromkeys(("correct", "argmax_is_choice"), "bool"),
        **dict.fromkeys(
            ("confidence", "msp", "choice_probability", "max_logit", "entropy"), "double"
        ),
        "choice_logits": "list<element: float>",
        "target": "int32",
        "order": "list<element: int32>",
    }


def test_the_metadata_say_how_it_was_done(scored):
    settings = json.loads(parquet.read_schema(scored).metadata[b"levelhead"])
    assert (settings["seed"], settings["phrasing"], settings["questions"]) == (42, "first", 11)
    assert settings["chat_template"] is True
    assert settings["letters"] == ["A", "B", "C"]
    assert settings["versions"]["transformers"] == transformers.__version__


def test_the_digest_is_that_of_the_questions_in_any_format(scored, tmp_path):
    rows = [row | {"id": str(number)} for number, row in enumerate(ROWS, start=1)]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "data.parquet")
    score(tmp_path / "data.parquet", "-o", tmp_path / "scores.parquet", "--batch-size", "4")
    got, want = (parquet.read_table(path) for path in (tmp_path / "scores.parquet", scored))
    assert got.equals(want)
    digests = {json.loads(table.schema.metadata[b"levelhead"])["digest"] for table in (got, want)}
    assert len(digests) == 1


def test_rows_come_in_groups_as_they_are_scored(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(score_file, "_ROWS_AT_A_TIME", 4)
    assert score(write(tmp_path / "d.jsonl"), "-o", tmp_path / "s.parquet", "--batch-size", 4) == 0
    assert parquet.ParquetFile(tmp_path / "s.parquet").num_row_groups == 3
    assert parquet.read_table(tmp_path / "s.parquet").equals(parquet.read_table(scored))


def test_options_change_what_they_say(tmp_path):
    data, output = write(tmp_path / "d.jsonl"), tmp_path / "s.parquet"
    options = ["--phrasing", "second", "--no-chat-template", "--no-shuffle"]
    assert score(data, "-o", output, *options, "--confidence", "choice_probability") == 0
    want = score_questions(
        *tiny(),
        ROWS,
        phrasing="second",
        chat_template=False,
        seed=None,
        confidence="choice_probability",
    )
    got = parquet.read_table(output).to_pylist()
    for a, b in zip(got, want, strict=True):
        assert a["order"] == list(range(len(b.order)))
        assert a["confidence"] == a["choice_probability"] == b.choice_probability
    settings = json.loads(parquet.read_schema(output).metadata[b"levelhead"])
    assert (settings["seed"], settings["chat_template"]) == (None, False)


def test_it_prints_a_table_by_group(scored, tmp_path, capsys):
    score(write(tmp_path / "d.jsonl"), "-o", tmp_path / "s.parquet", "--batch-size", "4")
    printed = capsys.readouterr().out
    rows = parquet.read_table(scored).to_pylist()
    for name in ("even", "odd", "all"):
        member = [row for row in rows if name in (row["group"], "all")]
        confidence = [row["confidence"] for row in member]
        correct = [row["correct"] for row in member]
        cells = [
            name,
            str(len(member)),
            f"{sum(correct) / len(member):.3f}",
            f"{sum(confidence) / len(member):.3f}",
            f"{calibration_error(confidence, correct):.3f}",
            f"{auroc(confidence, correct):.3f}",
        ]
        assert any(line.split() == cells for line in printed.splitlines()), (cells, printed)
    assert "the model's likeliest token is not the letter" in printed


def test_without_groups_there_is_no_such_column(tmp_path, capsys):
    rows = [{key: row[key] for key in ("question", "choices", "answer")} for row in ROWS]
    assert score(write(tmp_path / "d.jsonl", rows), "-o", tmp_path / "s.parquet") == 0
    assert "group" not in parquet.read_schema(tmp_path / "s.parquet").names
    assert "no group" not in capsys.readouterr().out


def test_a_group_with_right_answers_alone_has_no_auroc(tmp_path, capsys):
    got = list(score_questions(*tiny(), ROWS, seed=None))
    rows = [row | {"answer": s.prediction, "group": "g"} for row, s in zip(ROWS, got, strict=True)]
    assert score(write(tmp_path / "d.jsonl", rows), "-o", tmp_path / "s", "--no-shuffle") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "all" in line.split())
    assert line.split()[2] == "1.000"
    assert line.split()[-1] == "-"


def test_bad_rows_are_named_with_the_reason_and_nothing_is_written(tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    bad = {"question": "2?", "choices": ["2", "3"], "answer": "4"}
    data.write_text("\n".join([json.dumps(ROWS[0]), "{", json.dumps(bad)]))
    assert score(data, "-o", tmp_path / "s.parquet") == 2
    head, second, third, hint = capsys.readouterr().err.strip().splitlines()
    assert head.endswith("2 of 3 lines of " + str(data) + " cannot be used, so nothing was scored:")
    assert second.startswith("  line 2: not JSON")
    assert third.startswith('  line 3: "answer" must be a letter from A to B')
    assert '"question", "choices"' in hint
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "20"], r"line 1: its prompt has \d+ tokens, more than the 20 allowed"),
        (["-o", "."], r"\. is a folder; name a file with --output"),
        (["--chat-template", "none.jinja"], "cannot read none.jinja"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_begins(options, message, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl")
    assert score(data, "-o", tmp_path / "s.parquet", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "s.parquet").exists()


def test_a_long_prompt_names_its_line(tmp_path, capsys):
    rows = [*ROWS, ROWS[0] | {"question": "x" * 3000}]
    assert score(write(tmp_path / "d.jsonl", rows), "-o", tmp_path / "s.parquet") == 2
    assert "line 12: its prompt has 3" in capsys.readouterr().err  # the model reads 2048


def test_no_rows_are_refused(tmp_path, capsys):
    assert score(write(tmp_path / "d.jsonl", []), "-o", tmp_path / "s.parquet") == 2
    assert "d.jsonl has no rows" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, CliError("no")])
def test_an_interrupted_run_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    output = tmp_path / "s.parquet"
    output.write_text("old")

    def interrupted(*_args, **_options):
        yield from score_questions(*tiny(), ROWS[:3])
        raise error

    monkeypatch.setattr("levelhead.cli.score.scoring.score_prompts", interrupted)
    monkeypatch.setattr(score_file, "_ROWS_AT_A_TIME", 2)
    assert score(write(tmp_path / "d.jsonl"), "-o", output) == (
        130 if error is KeyboardInterrupt else 2
    )
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "s.parquet"]
