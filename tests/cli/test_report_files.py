"""What a report reads, and what it says of files that it cannot use."""

import json

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa
from pyarrow import parquet

from levelhead.cli import main

GOOD = "confidence,correct\n" + "0.9,1\n0.8,0\n" * 10


@pytest.fixture
def failure(capsys):
    """Runs a report that must fail, and returns what it says."""

    def run(*arguments):
        assert main(["report", "--json", *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.removeprefix("levelhead report: error: ").rstrip("\n")

    return run


@pytest.fixture
def results(capsys):
    """Runs a report, and returns what it prints as JSON."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["report", "--json", *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("confidence,correct\n0.5,1\nnan,1\n", "row 2: confidence is nan, not a number"),
        ("confidence,correct\n0.5,1\n,1\n", "row 2: confidence is missing, not a number"),
        ("confidence,correct\n0.5,1\n?,1\n", "row 2: confidence is '?', not a number"),
        ("confidence,correct\n0.5,1\n0.6,maybe\n", "row 2: correct is 'maybe'; it must be"),
        ("confidence,correct\n0.5,1\n0.6,\n", "row 2: correct is missing; it must be"),
        ("confidence,correct\n95,1\n60,0\n", "row 1: confidence is 95, not a probability in"),
        ("confidence,correct\n95,1\n60,0\n", "percentages? divide by 100"),
        ("confidence,correct\n-0.1,1\n", "a score that is no probability goes into a column named"),
        ("confidence,correct\n0.5,1\n0.6,0,7\n", "row 2: 3 values, not 2"),
        ("p,ok\n0.5,1\n", "no column named confidence or score or"),
        ("p,ok\n0.5,1\n", "name one with --confidence. It has 'p', 'ok'"),
        ("confidence,ok\n0.5,1\n", "name one with --correct"),
        ("confidence,correct,correct\n0.5,1,1\n", "two columns named 'correct'"),
        ("confidence,correct\n", "there are no rows"),
        ("", "is empty"),
    ],
)
def test_a_bad_table_is_refused_by_row_and_reason(text, reason, tmp_path, failure):
    path = tmp_path / "answers.csv"
    path.write_text(text)
    said = failure(path)
    assert str(path) in said or "no rows" in said
    assert reason in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"confidence": 0.5}', "line 3: correct is missing"),
        ('{"confidence": "high", "correct": 1}', "line 3: confidence is "),
        ('{"confidence": 2, "correct": 1}', "line 3: confidence is 2, not a probability"),
        ("[1]", "line 3: not an object but an array"),
        ("{", "line 3: not JSON"),
    ],
)
def test_a_bad_line_of_json_is_refused_by_its_number(line, reason, tmp_path, failure):
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"confidence": 0.5, "correct": true}}\n\n{line}\n')
    assert reason in failure(path)


def test_a_missing_file_is_named(tmp_path, failure):
    assert failure(tmp_path / "no.csv") == (
        f"cannot read {tmp_path / 'no.csv'}: No such file or directory"
    )


@pytest.mark.parametrize("name", ["answers.parquet", "answers.csv", "answers.jsonl"])
def test_bytes_that_are_no_table_are_refused(name, tmp_path, failure):
    path = tmp_path / name
    path.write_bytes(b"\x80\x81\x00\xff" * 100)
    assert str(path) in failure(path)


def test_a_name_that_says_nothing_is_refused(tmp_path, failure):
    path = tmp_path / "answers.txt"
    path.write_text(GOOD)
    assert "must end in .csv, .tsv, .parquet or .jsonl" in failure(path)


def test_a_file_twice_is_refused(tmp_path, failure):
    path = tmp_path / "answers.csv"
    path.write_text(GOOD)
    assert "was given twice" in failure(path, path)


def test_probabilities_do_not_mix_with_other_scores(tmp_path, failure):
    for name, scores in (("a", (0.5, 0.7)), ("b", (12.5, 30))):
        rows = "".join(f"{score},1\n" for score in scores)
        (tmp_path / f"{name}.csv").write_text(f"score,correct\n{rows}")
    said = failure(tmp_path / "a.csv", tmp_path / "b.csv")
    assert "the scores of b go from 12.5 to 30, those of a lie in [0, 1]" in said


@pytest.mark.parametrize("options", [("--by", "task"), ("--within", "task"), ("--where", "task=a")])
def test_a_column_that_is_not_there_is_refused(options, tmp_path, failure):
    path = tmp_path / "answers.csv"
    path.write_text(GOOD)
    assert "no column named 'task'; it has 'confidence', 'correct'" in failure(path, *options)


def test_a_value_that_is_not_there_is_refused(tmp_path, failure):
    path = tmp_path / "answers.csv"
    path.write_text("confidence,correct,task\n0.5,1,a\n")
    assert failure(path, "--where", "task=b").startswith("no row has task = 'b'")


def test_a_comparison_with_no_such_row_is_refused(tmp_path, failure):
    path = tmp_path / "answers.csv"
    path.write_text("confidence,correct,task\n" + "0.5,1,a\n0.6,0,b\n" * 10)
    assert "no row 'c'; rows are 'a', 'b'" in failure(path, "--compare", "a", "c")
    assert "name two rows" in failure(path, "--compare", "a", "a")


SPELLINGS = {
    "numbers.csv": "score,correct\n0.9,1\n0.8,0\n0.7,1.0\n",
    "words.csv": "score,grade\n0.9,correct\n0.8,unparseable\n0.7,Correct\n",
    "booleans.csv": "confidence,correct\n0.9,True\n0.8,false\n 0.7,TRUE\n",
    "other.tsv": "msp\tis_correct\n0.9\t1\n0.8\t0\n0.7\t1\n",
    "semicolons.csv": "\ufeffconfidence;correct\r\n0.9;1\r\n\r\n0.8;0\r\n0.7;1\r\n",
    "lines.jsonl": '{"confidence": 0.9, "correct": true}\n'
    '{"confidence": 0.8, "correct": false}\n{"confidence": 0.7, "correct": true}',
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_answers_in_every_spelling(name, tmp_path, results):
    path = tmp_path / name
    path.write_text(SPELLINGS[name], newline="")
    (kind,) = results(path)["scores"].values()
    metrics = {name: found["estimate"] for name, found in kind["overall"]["metrics"].items()}
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["mean_confidence"] == pytest.approx(0.8)
    assert metrics["auroc"] == 0.5


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.float16()])
@pytest.mark.parametrize("outcome", [pa.bool_(), pa.int8(), pa.float64()])
def test_parquet_of_any_number(kind, outcome, tmp_path, results):
    path = tmp_path / "answers.parquet"
    columns = {
        "p": pa.array([0.5, 0.25, 1.0]).cast(kind),
        "ok": pa.array([1, 0, 1]).cast(outcome),
    }
    parquet.write_table(pa.table(columns), path)
    found = results(path, "--confidence", "p", "--correct", "ok")
    metrics = found["scores"]["p"]["overall"]["metrics"]
    assert metrics["mean_confidence"]["estimate"] == pytest.approx(1.75 / 3)
    assert metrics["auroc"]["estimate"] == 1


def test_conditions_leave_rows_out_and_errors_keep_their_numbers(tmp_path, results, failure):
    path = tmp_path / "answers.csv"
    path.write_text("confidence,correct,task\n7,1,bad\n0.5,1,fine\n0.25,0,fine\n")
    assert results(path, "--where", "task=fine")["answers"] == 2
    path.write_text("confidence,correct,task\n0.1,1,bad\n0.5,1,fine\n7,0,fine\n")
    assert f"{path}, row 3: " in failure(path, "--where", "task=fine")


def test_a_file_of_levelhead_score(tmp_path, results):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps(
                {
                    "question": f"{i} + 1?",
                    "choices": [str(i), str(i + 1), str(i + 2)],
                    "answer": 1,
                    "group": "even" if i % 2 == 0 else "odd",
                }
            )
            + "\n"
            for i in range(12)
        )
    )
    scores = tmp_path / "scores.parquet"
    assert main(["score", "tiny", str(questions), "-o", str(scores)]) == 0
    rows = parquet.read_table(scores).to_pydict()
    found = results(scores)
    (kind,) = found["scores"].values()
    assert found["by"] == "group"
    assert [row["name"] for row in kind["groups"]] == list(dict.fromkeys(rows["group"]))
    accuracy = kind["overall"]["metrics"]["accuracy"]["estimate"]
    assert accuracy == pytest.approx(sum(rows["correct"]) / 12)
    confidence = kind["overall"]["metrics"]["mean_confidence"]["estimate"]
    assert confidence == pytest.approx(sum(rows["confidence"]) / 12)
    logits = results(scores, "--confidence", "max_logit")["scores"]["max_logit"]
    assert not logits["probability"]
