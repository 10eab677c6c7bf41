"""Per-sample logs of lm-evaluation-harness (`lm_eval --log_samples`), version 0.4.

Of a multiple-choice question the harness logs the log-likelihood of every choice. The confidence is
the largest probability of their softmax: among the choices, not over the vocabulary.
"""

import math
import re
from pathlib import Path
from typing import Any

_NAME = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT[\d.:-]+\.jsonl")
CONFIDENCE = "softmax over the log-likelihoods of the choices, as lm-evaluation-harness logs them"


def is_sample(row: dict[str, Any]) -> bool:
    """Whether a row was logged by the harness."""
    return "filtered_resps" in row and "arguments" in row


def groups(path: Path) -> dict[str, str]:
    """Task and model, which the harness puts into the names of file and folder."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return {}
    return {"model": path.resolve().parent.name, "task": match["task"]}


def answer(sample: dict[str, Any]) -> dict[str, Any]:
    """Confidence and outcome of a sample.

    Raises:
        ValueError: It is not of a multiple-choice question, or what was logged cannot be used.
    """
    likelihoods = _likelihoods(sample)
    top = max(likelihoods)
    return {
        "confidence": 1 / sum(math.exp(value - top) for value in likelihoods),
        "correct": _outcome(sample),
        "doc_id": str(sample.get("doc_id")),
        "filter": str(sample.get("filter")),
    }


def _likelihoods(sample: dict[str, Any]) -> list[float]:
    responses = sample["filtered_resps"]
    if not isinstance(responses, list) or not responses:
        raise ValueError('"filtered_resps" is empty')
    if not all(isinstance(response, list) and len(response) == 2 for response in responses):
        raise ValueError(
            f"{_other_type(sample)}; a report needs the likelihood of every choice, which only multiple_choice logs"
        )
    if len(responses) == 1:
        raise ValueError(
            "one likelihood (output_type loglikelihood): no choices to compare; a report needs multiple_choice"
        )
    try:
        values = [float(value) for value, _greedy in responses]
    except (TypeError, ValueError) as error:
        raise ValueError(f'"filtered_resps" holds no log-likelihoods: {error}') from error
    if "acc_mutual_info" in sample.get("metrics", ()):
        values = values[: len(values) // 2]  # then come those without the question
    if not all(value <= 0 or math.isfinite(value) for value in values) or max(values) == -math.inf:
        raise ValueError(f"log-likelihoods {values} have no softmax")
    return values


def _other_type(sample: dict[str, Any]) -> str:
    """What the harness was asked for instead, by the arguments that it logs."""
    first: Any = next(iter(sample["arguments"].values()), {}) if sample["arguments"] else {}
    if isinstance(first, dict) and isinstance(first.get("arg_1"), dict):
        return "generated text (output_type generate_until)"
    return "a likelihood of the whole text (output_type loglikelihood_rolling)"


def _outcome(sample: dict[str, Any]) -> bool:
    accuracy = sample.get("acc")
    if accuracy not in (0, 1):
        found = 'no "acc"' if accuracy is None else f'"acc" is {accuracy!r}, not 0 or 1'
        raise ValueError(f"{found}; a report needs to know whether the likeliest choice is right")
    return bool(accuracy)
