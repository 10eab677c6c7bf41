"""Tokens shared by two ranks as DTensors give what one process gives; a mixture with plain tensors is refused."""

import pytest
import torch
from tests.distributed import data_parallel_worker as worker
from tests.distributed.launch import outcome, ranks
from tests.problems import assert_equal, gradients

# What is left in float64 after sums of a few hundred terms of order one.
ROUNDING = 1e-12
OF_TOKENS, PARTIAL, EVERYWHERE = "(Shard(dim=0),)", "(Partial(sum),)", "(Replicate(),)"


@pytest.fixture(scope="module")
def results():
    with ranks(worker) as started:
        yield started


@pytest.mark.parametrize("name", worker.LOSSES)
def test_loss_and_gradients_equal_those_of_one_process(results, name):
    whole = worker.LOSSES[name]()
    truth = whole.fused()
    for run in outcome(results, name):
        torch.testing.assert_close(run["loss"], truth, rtol=0, atol=ROUNDING, equal_nan=True)
        assert_equal(run["gradients"], gradients(truth, whole), ROUNDING)
        if "all tokens ignored" not in name and name != "ignored tokens hold NaN":
            assert_equal(run["loss"], whole.dense(), ROUNDING)
        if name != "one token":  # which cannot be shared
            assert run["layouts"][1:] == [OF_TOKENS, *[PARTIAL] * (len(whole.parameters) - 1)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_of_sequences_is_sharded_by_sequence(results, reduction):
    whole = worker.batch(reduction)
    truth = whole.fused()
    for run in outcome(results, f"batch, {reduction}"):
        assert_equal(run["loss"], truth, ROUNDING)
        assert_equal(run["gradients"], gradients(truth, whole), ROUNDING)
        layout = {"mean": EVERYWHERE, "sum": PARTIAL, "none": OF_TOKENS}[reduction]
        assert run["layouts"] == [layout, OF_TOKENS, PARTIAL, PARTIAL]


ALIKE = (
    "replicated",
    "two dimensions",
    "target elsewhere",
    "the module",
    "smoothing tensor",
    "functional",
)


@pytest.mark.parametrize("name", ALIKE)
def test_other_layouts_and_ways_to_call_it_give_the_same(results, name):
    whole = worker.problem(label_smoothing=0.1)
    truth = whole.dense()
    for run in outcome(results, name):
        assert_equal(run["loss"], truth, ROUNDING)
        assert_equal(run["gradients"], gradients(truth, whole), ROUNDING)
        if name == "replicated":
            assert run["layouts"] == [EVERYWHERE] * 4


def test_statistics_and_their_gradients_equal_those_of_one_process(results):
    whole, picks, upstream = worker.statistics_problem()
    stats = worker.levelhead.linear_logit_stats(
        whole.input, whole.linear_weight, picks,
        linear_bias=whole.linear_bias, softcap=whole.softcap, logit_scale=whole.logit_scale,
    )  # fmt: skip
    truth = torch.autograd.grad(stats[:4], whole.parameters, upstream)
    for run in outcome(results, "statistics"):
        assert_equal(run["statistics"], list(stats), ROUNDING)
        assert_equal(run["gradients"], list(truth), ROUNDING)
        assert run["layouts"] == [OF_TOKENS] * 6


def test_the_operator_shares_tokens_and_adds_up_late(results):
    for layouts in outcome(results, "operator"):
        assert layouts == [PARTIAL, *[OF_TOKENS] * 3, PARTIAL, EVERYWHERE]


@pytest.mark.parametrize(
    ("name", "needed"),
    [("frozen head", [0]), ("frozen input", [1, 2]), ("frozen bias", [0, 1])],
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(results, name, needed):
    whole = worker.problem(label_smoothing=0.1)
    truth = torch.autograd.grad(whole.dense(), whole.parameters)
    for found in outcome(results, name):
        for index, gradient in enumerate(found):
            assert (gradient is not None) == (index in needed)
            if gradient is not None:
                assert_equal(gradient, truth[index], ROUNDING)


def test_token_weight_and_smoothing_are_learned(results):
    token_weight = torch.linspace(0.1, 2, 9).double().requires_grad_()
    smoothing = torch.full((9,), 0.2).double().requires_grad_()
    loss = worker.problem().fused(token_weight=token_weight, label_smoothing=smoothing)
    truth = list(torch.autograd.grad(loss, [token_weight, smoothing]))
    for found in outcome(results, "learned"):
        assert_equal(found, truth, ROUNDING)


def test_without_grad_there_is_the_same_loss(results):
    for loss in outcome(results, "no grad"):
        assert not loss.requires_grad
        assert_equal(loss, worker.problem(label_smoothing=0.1).dense(), ROUNDING)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_inference_mode_there_is_the_same_loss(results, reduction):
    truth = worker.problem(label_smoothing=0.1, reduction=reduction).dense()
    for loss in outcome(results, f"inference, {reduction}"):
        assert_equal(loss, truth, ROUNDING)


def test_a_graph_is_used_twice_and_gradients_add_up(results):
    whole = worker.problem(label_smoothing=0.1)
    truth = [2 * g for g in torch.autograd.grad(whole.dense(), whole.parameters)]
    for found in outcome(results, "accumulated"):
        assert_equal(found, truth, ROUNDING)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_gradients_are_those_of_one_process_but_for_a_rounding(results, dtype):
    whole = worker.problem(label_smoothing=0.1).to(getattr(torch, dtype))
    truth = whole.fused()
    for run in outcome(results, dtype):
        torch.testing.assert_close(run["loss"], truth)
        for found, want in zip(run["gradients"], gradients(truth, whole), strict=True):
            assert found.dtype == want.dtype
            # Each rank rounds its part of a sum, and their sum is rounded once more.
            bound = 2 * torch.finfo(want.dtype).eps * want.abs().max()
            torch.testing.assert_close(found, want, rtol=0, atol=bound.item())


def test_double_backward_says_that_it_is_not_implemented(results):
    for message in outcome(results, "double backward"):
        assert "does not implement double backward" in message


REFUSED = {
    "plain input": "target with placements (Shard(dim=0),)",
    "plain target": "but plain: target. Distribute these too",
    "plain weight": "distribute_tensor(linear_weight, input.device_mesh, placements)",
    "plain bias": "but plain: linear_bias.",
    "plain token weight": "but plain: token_weight.",
    "head alone": "but plain: input, target. Distribute these too",
    "plain smoothing": "but plain: label_smoothing.",
    "hidden units sharded": "input has placements (Shard(dim=1),); valid are Shard(dim=0) and Replicate()",
    "bias sharded": "linear_bias has placements (Shard(dim=0),); valid are Replicate(),",
    "head sharded over hidden units": "linear_weight is a DTensor with placements (Shard(dim=1),)",
    "partial input": "input has placements (Partial(sum),)",
    "another mesh": "distribute them over one mesh",
    "uneven batch": "pad the batch, or flatten the tokens",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_way_out(results, name):
    messages = [messages.get(name, "") for messages in outcome(results, "refusals")]
    assert REFUSED[name] in messages[0]
    assert len(set(messages)) == 1


def test_every_refusal_is_tested():
    assert REFUSED.keys() == worker.REFUSALS.keys()
