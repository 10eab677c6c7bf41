"""The report on published answers finds what the paper says: no option needed.

Accuracy, AUROC, significant strata and ECE as in Plaut et al., arXiv 2402.13213; the answers themselves are not part of
this project.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from levelhead.cli import main

ROOT = Path(__file__).parents[2]
ANSWERS = ROOT.parent / "shared/data/mcq_confidence/answers.parquet"

# Accuracy, AUROC of msp and of max_logit in percent, significant of ten strata, ECE, base payoffs.
TABLE = {
    "Falcon-40b": (44.2, 59.6, 55.1, 7, 4, 0.139, -11.6, -67.4),
    "Llama-7b": (40.6, 57.3, 55.9, 6, 5, 0.296, -19.0, -78.5),
    "Llama-13b": (46.7, 60.1, 58.0, 6, 6, 0.296, -6.6, -59.9),
    "Llama3-8b": (58.6, 71.2, 68.9, 10, 10, 0.190, 17.1, -24.3),
    "Mixtral": (69.0, 61.6, 62.4, 10, 10, 0.313, 38.0, 7.1),
    "Yi-34b": (69.0, 67.5, 66.4, 10, 10, 0.048, 37.8, 6.8),
    "gpt-3.5-turbo": (67.3, 75.7, None, 10, None, 0.214, 34.5, 1.7),
}


def _rows(results, kind):
    return {row["name"]: row for row in results["scores"][kind]["groups"]}


def _check(results):
    assert (results["by"], results["within"]) == ("model", ["dataset", "prompt"])
    msp, max_logit = _rows(results, "msp"), _rows(results, "max_logit")
    assert set(msp) == set(TABLE)
    for name, row in TABLE.items():
        accuracy, auroc, logit_auroc, significant, logit_significant, ece, *base = row
        macro = msp[name]["macro"]
        assert round(100 * macro["accuracy"], 1) == accuracy
        assert round(100 * macro["auroc"], 1) == auroc
        assert (macro["significant"], macro["strata"]) == (significant, 10)
        assert round(msp[name]["metrics"]["ece"]["estimate"], 3) == ece
        if logit_auroc is None:
            assert name not in max_logit
        else:
            assert round(100 * max_logit[name]["macro"]["auroc"], 1) == logit_auroc
            assert max_logit[name]["macro"]["significant"] == logit_significant
        # The paper's base leaves the labelled answers out, which moves it by some tenths.
        found = [100 * payoff["answer_all"] for payoff in msp[name]["abstention"]]
        assert found == pytest.approx(base, abs=0.6)
    for payoffs in (row["abstention"] for row in msp.values()):
        assert payoffs[1]["with_threshold"] > payoffs[1]["answer_all"]
    relations = results["scores"]["msp"]["relations"]
    assert relations["auroc"]["r"] > 0.5
    assert relations["ece"]["r"] < 0.3
    assert relations["ece"]["low"] < 0 < relations["ece"]["high"]


@pytest.mark.slow
@pytest.mark.skipif(not ANSWERS.exists(), reason="the published answers are not here")
def test_the_papers_table(capsys):
    assert main(["report", str(ANSWERS), "--json"]) == 0
    _check(json.loads(capsys.readouterr().out))


def test_the_committed_results_are_the_papers():
    _check(json.loads((ROOT / "benchmarks/results/report/results.json").read_text()))
