"""`levelhead.integrations.accelerate.prepare` under every kind of parallelism, in either order."""

import importlib.util

import pytest
import torch
from tests.distributed.launch import cases, outcome, ranks
from tests.distributed.problem import (
    assert_same_run,
    batches,
    dense_loss,
    largest_error,
    one_process,
    tiny,
)

pytest.importorskip("accelerate")

from tests.distributed import accelerate_worker
from tests.distributed.accelerate_worker import DEEPSPEED, EXACT, MIXED, RESUMED

from levelhead.measure.gate import error_budget

QUICK = ("DDP", "FSDP2, prepared first")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    env = {"CHECKPOINTS": str(folder), "ACCELERATE_USE_CPU": "true"}
    with ranks(accelerate_worker, env=env) as started:
        yield started


@pytest.fixture(scope="module")
def deepspeed_results():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    with ranks(accelerate_worker, env=env) as started:
        yield started


@pytest.mark.parametrize("scenario", cases([*EXACT, *RESUMED], *QUICK))
def test_three_steps_equal_those_of_one_process(results, scenario):
    for run in outcome(results, scenario):
        assert_same_run(run, one_process())


@pytest.mark.parametrize("scenario", cases(DEEPSPEED))
def test_three_steps_with_deepspeed_equal_those_of_one_process(deepspeed_results, scenario):
    for run in outcome(deepspeed_results, scenario):
        # float32: losses of 4, and parameters below 1 after steps of 0.3 times gradients of 0.1
        assert_same_run(run, one_process(dtype=torch.float32), atol=2e-6)


@pytest.mark.parametrize("scenario", cases(EXACT, *QUICK))
def test_parameters_are_sharded_where_they_should_be(results, scenario):
    for run in outcome(results, scenario):
        assert run["sharded"] == scenario.startswith("FSDP2")


@pytest.mark.parametrize("scenario", cases(EXACT, *QUICK))
def test_what_unwrap_model_gives_back_is_patched_too(results, scenario):
    assert all(run["unwrapped"] for run in outcome(results, scenario))


@pytest.mark.parametrize("scenario", cases(MIXED))
def test_steps_in_bfloat16_are_as_precise_as_without_the_patch(results, scenario):
    truth = one_process(dtype=torch.float32)
    for run in outcome(results, scenario):
        budget = error_budget(largest_error(run["unpatched"], truth), 0, 0)  # without a rounding
        # What float32 leaves is 1e-7: above it, the products were in bfloat16.
        assert 1e-5 < largest_error(run["patched"], truth) <= budget


@pytest.mark.parametrize("scenario", cases(MIXED))
def test_the_order_of_patching_and_preparing_makes_no_difference(results, scenario):
    for run in outcome(results, scenario):
        for name, want in run["patched"]["parameters"].items():
            assert torch.equal(run["prepared first"]["parameters"][name], want), name


@pytest.mark.parametrize("scenario", cases(MIXED))
def test_the_loss_in_bfloat16_is_reported_in_float32(results, scenario):
    truth = one_process(dtype=torch.float32)
    for run in outcome(results, scenario):
        for loss, want in zip(run["patched"]["losses"], truth["losses"], strict=True):
            assert loss.dtype == torch.float32
            # bfloat16 alone would round a loss of 4.2 by up to 8e-3; hidden states of eight bits
            # leave an error of that order in each token, of which the loss is a mean.
            assert abs(loss - want) < 1e-3


@pytest.mark.slow
def test_a_model_that_fsdp2_holds_already_reports_the_loss_that_accelerate_rounds(results):
    for run in outcome(results, "FSDP2, bfloat16"):
        assert run["prepared first"]["losses"][0].dtype == torch.bfloat16


@pytest.mark.slow
def test_a_saved_model_is_one_of_transformers_own(results):
    want = tiny().state_dict()
    for got in outcome(results, "exported"):
        assert got["class"] == "LlamaForCausalLM"
        assert got["state"].keys() == want.keys()
        assert all(torch.equal(got["state"][name], want[name]) for name in want)


@pytest.mark.slow
def test_unwrap_model_keeps_the_patch(results):
    want = dense_loss(tiny(dtype=torch.float32), **batches()[0])
    for got in outcome(results, "unwrapped"):
        assert got["logits"] is None
        # float32: sums of 67 terms of order one, in another order
        torch.testing.assert_close(got["loss"], want, rtol=0, atol=2e-6)


def test_a_prepared_model_that_cannot_be_patched_is_refused_and_left_as_it_was(results):
    for got in outcome(results, "refused"):
        assert "forward was replaced on the instance" in got["message"]
        assert got["same"]
