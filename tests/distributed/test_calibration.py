"""Calibration on evaluation data is that of all of it, however the work is shared out."""

from importlib.util import find_spec

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from tests.distributed.launch import outcome, ranks
from tests.integrations.test_calibration_callback import data, dense, sure

WORKER = "tests.distributed.calibration_worker"


@pytest.fixture(scope="module")
def results():
    with ranks(WORKER, env={"ACCELERATE_USE_CPU": "true"}) as started:
        yield started


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
        assert got == pytest.approx(dense(sure(), data()), abs=1e-5)


# Not importorskip: the import takes seconds, and only the worker needs it.
@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3_gathers_the_head_before_it_is_measured():
    with ranks(WORKER, env={"DS_ACCELERATOR": "cpu"}) as started:
        for got in outcome(started, "zero3"):
            assert got == pytest.approx(dense(sure(), data()), abs=1e-5)
