"""`levelhead score` in two processes: the file of one, written once."""

import json

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("rich")

from pyarrow import parquet
from tests.cli.test_score import ROWS, score, write
from tests.cli.test_sft_launch import in_two_processes


def test_two_processes_write_the_file_of_one(tmp_path):
    data = write(tmp_path / "d.jsonl")
    codes, out, err = in_two_processes("score", "tiny", data, "-o", str(tmp_path / "two.parquet"))
    assert codes == (0, 0), err
    assert out.count("mean confidence") == 1
    assert score(data, "-o", tmp_path / "one.parquet") == 0
    two, one = (parquet.read_table(tmp_path / name) for name in ("two.parquet", "one.parquet"))
    assert two.schema.equals(one.schema, check_metadata=True)
    assert two.num_rows == len(ROWS)
    for a, b in zip(two.to_pylist(), one.to_pylist(), strict=True):
        for name, value in b.items():  # other batches, so float32 sums in another order
            exact = not isinstance(value, float) and name != "choice_logits"
            assert a[name] == (value if exact else pytest.approx(value, abs=1e-5))
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == [
        "one.parquet",
        "two.parquet",
    ]
    assert not list(tmp_path.glob(".*"))
    assert json.loads(two.schema.metadata[b"levelhead"])["questions"] == len(ROWS)
