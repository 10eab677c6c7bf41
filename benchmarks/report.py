"""The report on published answers of seven chat models: `python -m benchmarks.report ANSWERS`.

ANSWERS is a Parquet file of the answers that Ben Plaut published (MIT licence, copyright 2024) with "Probabilities of
Chat LLMs Are Miscalibrated but Still Predict Correctness on Multiple-Choice Q&A" (arXiv 2402.13213): a row per answer,
with model, dataset, prompt, score_kind, grade and score. Only what `levelhead report` finds in them is kept here.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from levelhead.cli import main as levelhead

RESULTS = Path(__file__).parent / "results" / "report"
PICTURES = ("reliability", "accuracy_auroc", "accuracy_ece", "payoff_2")
SOURCE = (
    "556,582 graded answers published by Ben Plaut in bplaut/llm-calibration-and-correctness-prediction "
    "(MIT licence, copyright 2024), arXiv 2402.13213"
)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The results without curves, strata and names of files."""
    scores = results["scores"]
    for kind in scores.values():
        for row in [*kind["groups"], kind["overall"]]:
            row.pop("curve")
            row.pop("strata")
    kept = ("levelhead", "answers", "by", "within", "settings", "scores", "definitions")
    return {"source": SOURCE, **{name: results[name] for name in kept}}


def main(answers: str) -> None:
    """Runs the report and keeps its pictures and its summary."""
    with tempfile.TemporaryDirectory() as folder:
        if code := levelhead(["report", answers, "--output", folder]):
            sys.exit(code)
        results = json.loads((Path(folder) / "results.json").read_text())
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in PICTURES:
            shutil.copy(Path(folder) / f"{name}.png", RESULTS)
    path = RESULTS / "results.json"
    path.write_text(json.dumps(summary(results), indent=1, allow_nan=False) + "\n")
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
