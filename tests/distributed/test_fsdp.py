"""Under FSDP1 and FSDP2 the ranks together take the steps of one process."""

import pytest
import torch
from tests.distributed import fsdp_worker
from tests.distributed.fsdp_worker import ONE_LAYER, SCENARIOS, TIED
from tests.distributed.launch import cases, outcome, ranks
from tests.distributed.problem import assert_same_run, batches, largest_error, one_process, tiny

from levelhead.measure.gate import error_budget

MIXED = ["FSDP1, bfloat16", "FSDP2, bfloat16", "FSDP2, bfloat16 outputs"]
EXACT = [name for name in SCENARIOS if name not in (*MIXED, "FSDP2, evaluated")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with ranks(fsdp_worker, env={"CHECKPOINTS": str(folder)}) as started:
        yield started


@pytest.mark.parametrize("scenario", cases(EXACT, "FSDP1, layers", "FSDP2, head"))
def test_three_steps_equal_those_of_one_process(results, scenario):
    options = ONE_LAYER if "compiled" in scenario else {}
    options = options | (TIED if "tied" in scenario else {})
    atol = 1e-12
    if "inductor" in scenario:
        options = options | {"dtype": torch.float32}
        atol = 2e-6  # losses of 4, and parameters below 1 after steps of 0.3 times gradients of 0.1
    want = one_process(**options)
    for run in outcome(results, scenario):
        assert_same_run(run, want, atol)


@pytest.mark.slow
def test_evaluation_is_that_of_the_unpatched_model(results):
    want = tiny().eval()(**batches()[0])
    for got in outcome(results, "FSDP2, evaluated"):
        # float64: products of the same rows, in another order at most
        torch.testing.assert_close(got["logits"], want.logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(got["loss"], want.loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scenario", cases(MIXED, "FSDP2, bfloat16"))
def test_steps_in_bfloat16_are_as_precise_as_without_the_patch(results, scenario):
    truth = one_process(dtype=torch.float32)
    for run in outcome(results, scenario):
        budget = error_budget(largest_error(run["unpatched"], truth), 0, 0)  # without a rounding
        assert 0 < largest_error(run["patched"], truth) <= budget


@pytest.mark.parametrize("scenario", cases(MIXED, "FSDP2, bfloat16"))
def test_the_reported_loss_is_float32_unless_fsdp_is_told_to_cast_it(results, scenario):
    dtype = torch.bfloat16 if scenario == "FSDP2, bfloat16 outputs" else torch.float32
    for run in outcome(results, scenario):
        assert [loss.dtype for loss in run["patched"]["losses"]] == 3 * [dtype]
        assert [loss.dtype for loss in run["unpatched"]["losses"]] == 3 * [dtype]
