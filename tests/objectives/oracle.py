"""Calibration-aware fine-tuning by the letter of its formulas: loops in float64, one question at a time."""

import math


def bin_of(confidence: float, bins: int) -> int:
    """The bin of [0, 1] that holds its lower edge; the last one holds 1."""
    return max(k for k in range(bins) if k / bins <= confidence or k == 0)


def conf_bins(
    probabilities: list[list[float]], target: list[int], bins: int
) -> list[tuple[int, int]]:
    """Right ones and all of the bin of each question."""
    index = [bin_of(min(max(p), 1.0), bins) for p in probabilities]
    right = [p.index(max(p)) == y for p, y in zip(probabilities, target, strict=True)]
    found = []
    for own in index:
        members = [ok for k, ok in zip(index, right, strict=True) if k == own]
        found.append((sum(members), len(members)))
    return found


def target(p: list[float], accuracy: float) -> list[float]:
    """The paper's target, with C choices for its four, by its own gamma where that is finite."""
    first = p.index(max(p))
    others = [q for j, q in enumerate(p) if j != first]
    second = max(others)
    if accuracy == 1:
        shared = [0.0] * len(others)
    else:
        scale = 2.0**500 if second < 1e-150 else 1.0  # exact, and gamma stays finite
        gamma = math.log(3) / (second * scale * (1 - accuracy)) if second > 0 else 0.0
        bent = [math.tanh(gamma * (q * scale)) for q in others]
        a = (1 - accuracy) / (sum(bent) + len(others))
        shared = [a * b + a for b in bent]
    return [*shared[:first], accuracy, *shared[first:]]


def conf_loss(probabilities: list[list[float]], binned: list[tuple[int, int]]) -> float:
    """L over these questions."""
    total = 0.0
    for p, (right, count) in zip(probabilities, binned, strict=True):
        wanted = target(p, right / count)
        total += sum((q - t) ** 2 for q, t in zip(p, wanted, strict=True)) / count
    return total


def classwise_loss(probabilities: list[list[float]], answers: list[int], bins: int) -> float:
    """The regulariser of the classwise error over the whole training set."""
    classes = len(probabilities[0])
    total = 0.0
    for c in range(classes):
        index = [bin_of(min(p[c], 1.0), bins) for p in probabilities]
        for k in set(index):
            members = [i for i, own in enumerate(index) if own == k]
            frequency = sum(answers[i] == c for i in members) / len(members)
            squares = sum((probabilities[i][c] - frequency) ** 2 for i in members)
            total += squares / len(members) / classes
    return total
