"""The experiment of the demo: a fair pair, right scores, memory that adds up."""

import pytest
import torch

from levelhead.cli.demo.data import Tokens, collate
from levelhead.cli.demo.memory import loss_peaks
from levelhead.cli.demo.training import (
    Recipe,
    answer,
    batches,
    build_pair,
    number_of_steps,
    train_pair,
)

CPU = torch.device("cpu")
TINY = Recipe(hidden_size=16, intermediate_size=32, layers=1, heads=2, epochs=3, batch_size=8)
# "Next letter" over ids 3 to 22, with prompts and completions of different lengths.
ROWS = [
    Tokens([1, *range(3, 4 + i % 5), 2], [3 + i % 20, 4 + i % 7][: 1 + i % 2]) for i in range(20)
]


def train(smoothing, advance=lambda: None):
    return train_pair(
        ROWS,
        vocabulary_size=23,
        smoothing=smoothing,
        seed=0,
        device=CPU,
        advance=advance,
        recipe=TINY,
    )


def test_both_train_alike_but_for_the_smoothing():
    pair = train(smoothing=0.0)
    dense, fused = (pair[name].model.state_dict() for name in ("dense", "fused"))
    for name, weight in dense.items():
        # Weights of order one: float32 roundings of the loss, through every step of the optimiser.
        torch.testing.assert_close(fused[name], weight, rtol=0, atol=1e-5)


def test_smoothing_lowers_confidence():
    pair = train(smoothing=0.5)
    dense, fused = (answer(pair[name].model, ROWS, CPU) for name in ("dense", "fused"))
    assert fused.confidence.mean() < dense.confidence.mean()


def test_training_is_repeatable():
    once, twice = (train(smoothing=0.1)["fused"].model.state_dict() for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_every_step_is_timed_and_reported():
    advances = []
    pair = train(smoothing=0.1, advance=lambda: advances.append(None))
    assert number_of_steps(len(ROWS), TINY) == len(advances) == 9
    assert all(len(learner.seconds) == 9 and learner.step_seconds > 0 for learner in pair.values())


def test_an_epoch_shows_every_row_once():
    recipe = Recipe(epochs=1, batch_size=8)
    seen = [
        tuple(ids) for b in batches(ROWS, seed=3, device=CPU, recipe=recipe) for ids in b.input_ids
    ]
    assert len(seen) == len(ROWS)
    labels = sum(
        int((b.labels >= 0).sum()) for b in batches(ROWS, seed=3, device=CPU, recipe=recipe)
    )
    assert labels == sum(len(row.completion) for row in ROWS)


def test_answers_equal_one_row_at_a_time():
    model = build_pair(23, smoothing=0.1, seed=0, recipe=TINY, device=CPU)["dense"].eval()
    together = answer(model, ROWS, CPU)
    expected = [_answer_alone(model, row) for row in ROWS]  # of (n, 3)
    confidence, correct, nll = torch.cat(expected).unbind(1)
    # A float32 model sums a batch in another order than a row: some dozens of roundings.
    torch.testing.assert_close(together.confidence, confidence, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.nll, nll, rtol=1e-5, atol=0)
    assert together.correct.tolist() == correct.bool().tolist()


def _answer_alone(model, row):
    """Confidence, correctness and NLL of each token of one completion, without any padding."""
    with torch.no_grad():
        logits = model(input_ids=collate([row], CPU).input_ids).logits[0]
    scores = []
    for position, token in enumerate(row.completion, start=len(row.prompt) - 1):
        probability = logits[position].double().softmax(-1)
        right = probability.argmax().item() == token
        scores.append([probability.max().item(), right, -probability[token].log().item()])
    return torch.tensor(scores, dtype=torch.float64)


def test_peak_memory_is_that_of_the_logits():
    vocabulary_size, recipe = 4000, Recipe(hidden_size=32, layers=1)
    rows = [Tokens([1, *range(3, 33), 2], [40]) for _ in range(32)]
    batch = collate(rows, CPU)
    peaks = loss_peaks(batch, vocabulary_size=vocabulary_size, smoothing=0.1, recipe=recipe)
    if None in peaks.values():
        pytest.skip("the peak of resident memory cannot be reset here")
    logits = 4 * batch.input_ids.numel() * vocabulary_size
    # Dense holds log-probabilities and two gradients at once; fused the logits of one token in 33.
    assert 2.8 * logits < peaks["dense"] < 3.3 * logits
    assert peaks["fused"] < 0.15 * logits
