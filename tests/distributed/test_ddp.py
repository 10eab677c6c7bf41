"""Under DistributedDataParallel the ranks together take the steps of one process."""

import pytest
import torch
from tests.distributed import ddp_worker
from tests.distributed.ddp_worker import SCENARIOS
from tests.distributed.launch import cases, outcome, ranks
from tests.distributed.problem import assert_same_run, one_process

OPTIONS = {
    "tied": {"tie_word_embeddings": True},
    "compiled": {"intermediate_size": 3000},
    "compiled by inductor": {"num_hidden_layers": 1, "dtype": torch.float32},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with ranks(ddp_worker, env={"CHECKPOINTS": str(folder)}) as started:
        yield started


@pytest.mark.parametrize("scenario", cases(SCENARIOS, "wrapped"))
def test_three_steps_equal_those_of_one_process(results, scenario):
    want = one_process(**OPTIONS.get(scenario, {}))
    # float32: losses of 4, and parameters below 1 after steps of 0.3 times gradients of 0.1
    atol = 2e-6 if scenario == "compiled by inductor" else 1e-12
    for run in outcome(results, scenario):
        assert_same_run(run, want, atol)
