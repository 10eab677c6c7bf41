"""Calibration on evaluation data is that of all of it, however the work is shared out."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from tests.distributed.calibration_worker import questions_of
from tests.distributed.launch import outcome, ranks
from tests.integrations.test_calibration_callback import data, dense, sure

WORKER = "tests.distributed.calibration_worker"


@pytest.fixture(scope="module")
def results():
    with ranks(WORKER, env={"ACCELERATE_USE_CPU": "true"}) as started:
        yield started


def assert_as_in_one_process(got):
    assert got["metrics"] == pytest.approx(dense(sure(), data()), abs=1e-5)
    for rank in (0, 1):  # each asks its own questions, at its own positions
        asked = questions_of(rank, 2)
        at = asked["answer_position"]
        with torch.no_grad():
            logits = sure().eval()(input_ids=asked["input_ids"]).logits
        want = logits[torch.arange(len(at)), at][:, asked["choices"][0]].float()
        # float32 weights that may have been gathered from parts: sums of 16 terms in another order
        torch.testing.assert_close(got["choices"][asked["question"]], want, rtol=1e-5, atol=1e-5)


def test_rows_that_the_loader_repeats_count_once(results):
    for got in outcome(results, "ddp"):
        assert got.pop("processes") == 2
        assert got == pytest.approx(dense(sure(), data()[:7]), abs=1e-5)


@pytest.mark.slow
def test_a_process_without_labels_adds_nothing(results):
    for got in outcome(results, "ddp_with_labels_on_one_rank"):
        assert got == pytest.approx(dense(sure(), data()[:1]), abs=1e-5)


@pytest.mark.slow
def test_fsdp2_gathers_the_head_before_it_is_measured(results):
    for got in outcome(results, "fsdp2"):
        assert_as_in_one_process(got)


# Not importorskip: the import takes seconds, and only the worker needs it.
@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3_gathers_the_head_before_it_is_measured():
    with ranks(WORKER, env={"DS_ACCELERATOR": "cpu"}) as started:
        for got in outcome(started, "zero3"):
            assert_as_in_one_process(got)
