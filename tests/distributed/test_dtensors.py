"""Ranks that share the tokens, or the rows of the head: what is frozen, learned or refused is as in one process."""

import pytest
import torch
from tests.distributed import data_parallel_worker, vocab_parallel_worker
from tests.distributed.dtensors import weights
from tests.distributed.launch import outcome, ranks
from tests.distributed.test_data_parallel import REFUSED as OF_TOKENS
from tests.distributed.test_vocab_parallel import REFUSED as OF_ROWS
from tests.distributed.test_vocab_parallel import ROUNDING
from tests.distributed.vocab_parallel_worker import problem
from tests.problems import assert_equal

SHARED = [
    pytest.param((data_parallel_worker, 2), id="tokens"),
    pytest.param((vocab_parallel_worker, 2), id="rows"),
    pytest.param((vocab_parallel_worker, 4), id="rows of 4 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SHARED)
def results(request):
    worker, processes = request.param
    with ranks(worker, processes) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "needed"),
    [("frozen head", [0]), ("frozen input", [1, 2]), ("frozen bias", [0, 1])],
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(results, name, needed):
    whole = problem(label_smoothing=0.1)
    truth = torch.autograd.grad(whole.dense(), whole.parameters)
    for found in outcome(results, name):
        for index, gradient in enumerate(found):
            assert (gradient is not None) == (index in needed)
            if gradient is not None:
                assert_equal(gradient, truth[index], ROUNDING)


def test_token_weight_and_smoothing_are_learned(results):
    token_weight = weights().requires_grad_()
    smoothing = torch.full((9,), 0.2, dtype=torch.float64).requires_grad_()
    loss = problem().fused(token_weight=token_weight, label_smoothing=smoothing)
    truth = list(torch.autograd.grad(loss, [token_weight, smoothing]))
    for found in outcome(results, "learned"):
        assert_equal(found, truth, ROUNDING)


def test_without_grad_there_is_the_same_loss_and_no_graph(results):
    for loss in outcome(results, "no grad"):
        assert not loss.requires_grad
        assert_equal(loss, problem(label_smoothing=0.1).dense(), ROUNDING)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_inference_mode_there_is_the_same_loss(results, reduction):
    truth = problem(label_smoothing=0.1, reduction=reduction).dense()
    for loss in outcome(results, f"inference, {reduction}"):
        assert_equal(loss, truth, ROUNDING)


def test_a_graph_is_used_twice_and_gradients_add_up(results):
    whole = problem(label_smoothing=0.1)
    truth = [2 * g for g in torch.autograd.grad(whole.dense(), whole.parameters)]
    for found in outcome(results, "accumulated"):
        assert_equal(found, truth, ROUNDING)


def test_double_backward_says_that_it_is_not_implemented(results):
    for message in outcome(results, "double backward"):
        assert "does not implement double backward" in message


REFUSALS = [
    pytest.param(shared.values[0], name, text, id=f"{shared.id}, {name}", marks=shared.marks)
    for shared, texts in zip(SHARED, (OF_TOKENS, OF_ROWS, OF_ROWS), strict=True)
    for name, text in texts.items()
]


@pytest.mark.parametrize(("results", "name", "text"), REFUSALS, indirect=["results"])
def test_what_cannot_be_done_is_refused_with_the_way_out(results, name, text):
    messages = [messages.get(name, "") for messages in outcome(results, "refusals")]
    assert text in messages[0]
    if name != "other shards":  # where each rank tells of its own
        assert len(set(messages)) == 1


@pytest.mark.parametrize(
    ("worker", "texts"), [(data_parallel_worker, OF_TOKENS), (vocab_parallel_worker, OF_ROWS)]
)
def test_every_refusal_is_tested(worker, texts):
    assert worker.REFUSALS.keys() == texts.keys()
