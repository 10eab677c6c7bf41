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
        if name == "smoothing tensor":
            assert_equal(run["in inference mode"], truth, ROUNDING)


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
        assert layouts == [PARTIAL, OF_TOKENS, PARTIAL, EVERYWHERE]


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
