"""A head whose rows are shared by 2 or 4 ranks gives what one process gives, and nothing is gathered."""

from dataclasses import replace
from functools import reduce

import pytest
import torch
from tests.distributed import vocab_parallel_worker as worker
from tests.distributed.launch import outcome, ranks
from tests.distributed.vocab_parallel_worker import V
from tests.problems import assert_equal, gradients
from torch import Tensor

import levelhead
from levelhead.measure.gate import error_budget
from levelhead.ops import LogitStats
from levelhead.ops.statistics import merge
from levelhead.ops.vocab_parallel import rows_of_shards

# What is left in float64 after sums of a few hundred terms of order one.
ROUNDING = 1e-12


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def size(request):
    return request.param


@pytest.fixture(scope="module")
def results(size):
    with ranks(worker, processes=size) as started:
        yield started


def same_bits(values: list[Tensor]) -> Tensor:
    """The value that all ranks agree on to the last bit; NaN equals NaN."""
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=0, equal_nan=True)
    return values[0]


@pytest.mark.parametrize("name", worker.LOSSES)
def test_loss_and_gradients_equal_those_of_one_process(results, name):
    runs = outcome(results, name)
    whole = worker.LOSSES[name]()
    loss = same_bits([run["loss"] for run in runs])
    found = [
        same_bits(tensors) for tensors in zip(*(run["gradients"] for run in runs), strict=True)
    ]
    truth = whole.fused()
    torch.testing.assert_close(loss, truth, rtol=0, atol=ROUNDING, equal_nan=True)
    assert_equal(found, gradients(truth, whole), ROUNDING)
    if name.startswith("all tokens ignored"):
        assert not any(g.any() for g in found)
    elif name != "ignored tokens hold NaN":
        assert_equal(loss, whole.dense(), ROUNDING)
        assert_equal(found, gradients(whole.dense(), whole), ROUNDING)


@pytest.mark.parametrize("v", [V, 64, 5, 1])
def test_statistics_and_their_gradients_equal_those_of_one_process(results, size, v):
    runs = outcome(results, f"statistics of {v}")
    whole, picks, upstream = worker.statistics_problem(v)
    stats = worker.statistics_of(whole, picks)
    found = [same_bits(fields) for fields in zip(*(r["statistics"] for r in runs), strict=True)]
    assert_equal(found, list(stats), ROUNDING)
    truth = torch.autograd.grad(stats[:4], whole.parameters, upstream)
    for run in runs:
        assert_equal(run["gradients"], list(truth), ROUNDING)
        same_bits([run["gradients"][0], runs[0]["gradients"][0]])  # the one that is replicated
        assert run["layouts"] == ["(Shard(dim=0),)"] * 2
        assert run["differentiable"] == [True] * 4 + [False] * 2

    parts = []
    first = 0
    for count in rows_of_shards(v, size):
        if count:
            rows = slice(first, first + count)
            part = levelhead.linear_logit_stats(
                whole.input,
                whole.linear_weight[rows],
                picks - first,
                linear_bias=whole.linear_bias[rows],
                softcap=whole.softcap,
                logit_scale=whole.logit_scale,
            )
            parts.append((part._replace(argmax=part.argmax + first), count))
        first += count
    merged, _ = reduce(lambda a, b: (merge(a[0], a[1], *b), a[1] + b[1]), parts)
    assert_equal(LogitStats(*found), merged, ROUNDING)


@pytest.mark.parametrize("index", range(4), ids=["logsumexp", "picked", "mean", "expected"])
def test_a_statistic_alone_is_differentiable(results, index):
    whole, picks, upstream = worker.statistics_problem()
    stats = worker.statistics_of(whole, picks)
    truth = torch.autograd.grad(stats[index], whole.parameters, upstream[index])
    for found in outcome(results, f"statistic {index} alone"):
        assert_equal(found, list(truth), ROUNDING)


def test_the_smallest_id_wins_a_tie_between_ranks(results):
    assert all(not argmax.any() for argmax in outcome(results, "ties"))


def test_shards_may_have_any_sizes_and_the_first_no_rows_at_all(results):
    whole, picks, upstream = worker.statistics_problem()
    stats = worker.statistics_of(whole, picks)
    truth = torch.autograd.grad(stats[:4], whole.parameters, upstream)
    for run in outcome(results, "unequal shards"):
        rows = slice(*run["rows"])
        assert_equal([f.detach() for f in run["statistics"]], list(stats), ROUNDING)
        assert_equal(run["gradients"], [truth[0], truth[1][rows], truth[2][rows]], ROUNDING)


@pytest.mark.parametrize(
    ("v", "ranks", "sizes"),
    [(67, 2, [34, 33]), (67, 4, [17, 17, 17, 16]), (5, 4, [2, 2, 1, 0]), (1, 2, [1, 0])],
)
def test_rows_of_shards_are_those_of_torch_chunk(v, ranks, sizes):
    assert rows_of_shards(v, ranks) == sizes
    chunks = [len(chunk) for chunk in torch.empty(v).chunk(ranks)]
    assert chunks == [size for size in sizes if size]


def test_an_offset_that_the_logits_hold_exactly_changes_no_bit(results):
    for far, near in zip(outcome(results, "far from 0"), outcome(results, "near 0"), strict=True):
        same_bits([far["loss"], near["loss"]])
        for pair in zip(far["gradients"], near["gradients"], strict=True):
            same_bits(list(pair))


def test_smoothing_as_a_tensor_of_0_looks_at_no_entry_that_is_masked_out(results):
    whole = worker.far_from_0(0, masked=True)
    truth = replace(whole, label_smoothing=0.0).to(torch.float64).dense()
    for run in outcome(results, "masked"):
        torch.testing.assert_close(run["loss"].double(), truth.detach(), rtol=1e-5, atol=1e-5)
        assert all(gradient.isfinite().all() for gradient in run["gradients"])


def test_in_a_checkpoint_the_graph_may_be_used_for_each_gradient(results):
    whole = worker.problem(label_smoothing=0.1)
    truth = torch.autograd.grad(whole.dense(), whole.parameters)
    for found in outcome(results, "checkpointed"):
        assert_equal(found, list(truth), ROUNDING)


@pytest.mark.parametrize("name", ["replicated input", "the module"])
def test_a_layer_that_torch_made_parallel_trains_as_one_process_does(results, name):
    whole = worker.problem(label_smoothing=0.1)
    truth = whole.dense()
    for run in outcome(results, name):
        assert_equal(run["loss"], truth, ROUNDING)
        assert_equal(run["gradients"], gradients(truth, whole), ROUNDING)


def test_a_replicated_input_gets_a_replicated_gradient_and_the_loss_is_plain(results):
    for run in outcome(results, "replicated input"):
        assert run["layout"] == "(Replicate(),)"
        assert run["type"] == "Tensor"


def test_groups_of_ranks_work_on_batches_of_their_own(results):
    for run in outcome(results, "two dimensions"):
        whole = worker.first(run["tokens"], worker.problem(label_smoothing=0.1))
        dx, dw, db = gradients(whole.dense(), whole)
        rows = slice(*run["rows"])
        assert_equal(run["gradients"], [dx, dw[rows], db[rows]], ROUNDING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_error_is_within_that_of_dense_tensor_parallelism(results, dtype):
    given = worker.narrow_problem(getattr(torch, dtype))
    exact = given.to(torch.float64)
    truth = [exact.dense(), *gradients(exact.dense(), exact)]
    ours, dense = outcome(results, dtype), outcome(results, f"{dtype}, dense")
    for mine, theirs in zip(ours, dense, strict=True):
        assert mine["loss"].dtype == torch.float32
        found = [mine["loss"], *mine["gradients"]]
        others = [theirs["loss"], *theirs["gradients"]]
        for tensor, other, want in zip(found, others, truth, strict=True):
            error, dense_error = ((t.double() - want).abs().max() for t in (tensor, other))
            eps = torch.finfo(tensor.dtype).eps
            assert error <= error_budget(dense_error, want.abs().max(), eps)


def test_autocast_narrows_the_input_and_leaves_the_gradients_wide(results):
    exact = worker.narrow_problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        truth = exact.fused()
    for run in outcome(results, "autocast"):
        # Other sums of the same products: float32 rounding of terms of order one.
        torch.testing.assert_close(run["loss"], truth, rtol=1e-6, atol=1e-6)
        for found, want in zip(run["gradients"], gradients(truth, exact), strict=True):
            assert found.dtype == torch.float32
            # The gradient of the input crosses bfloat16 on each rank, as its forward did.
            bound = torch.finfo(torch.bfloat16).eps * want.abs().max()
            torch.testing.assert_close(found, want, rtol=0, atol=bound.item())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2], indirect=True)
def test_compiled_into_one_graph_for_any_number_of_tokens(results):
    for runs in outcome(results, "compiled"):
        for tokens, run in zip((9, 7, 6), runs, strict=True):
            some = worker.first(tokens, worker.problem(label_smoothing=0.1, z_loss=0.01))
            truth = some.dense()
            assert_equal(run["loss"], truth, ROUNDING)
            assert_equal(run["gradients"], gradients(truth, some), ROUNDING)
        assert [run["graphs"] for run in runs] == [1, 1, 1]


def test_neither_logits_nor_weight_exist_in_full_on_any_rank(results):
    for run in outcome(results, "memory"):
        assert run["largest"] <= max(run["shard"], 2**18) < run["weight"] < run["logits"]
        assert run["of_the_shard"] == 1  # its gradient
    for run in outcome(results, "memory, frozen head"):
        assert run["largest"] <= 2**18
        assert run["of_the_shard"] == 0


def test_a_gathered_weight_would_be_seen(results):
    for run in outcome(results, "memory, gathered"):
        assert run["largest"] >= run["weight"]


REFUSED = {
    "sharded over hidden units": "(Shard(dim=1),)",
    "not sharded": "(Replicate(),)",
    "partial": "(Partial(sum),)",
    "plain bias": "linear_bias must be a DTensor on the mesh of linear_weight",
    "bias not sharded": "with placements (Replicate(),); use distribute_tensor(linear_bias",
    "sharded input": "input.redistribute(placements=[Replicate()])",
    "target": "use target.full_tensor()",
    "token weight": "use token_weight.full_tensor()",
    "other shards": "rank 0 holds",
    "other targets": "must work on the same batch",
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2], indirect=True)
def test_where_looking_would_cost_a_synchronisation_other_targets_make_nan(results):
    assert all(loss.isnan() for loss in outcome(results, "compiled, other targets"))
