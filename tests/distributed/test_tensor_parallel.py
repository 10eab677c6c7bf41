"""A patched model that shares its weights among ranks takes the steps of one process."""

import functools
import re

import pytest
import torch
from packaging.version import Version
from tests.distributed import tensor_parallel_worker as worker
from tests.distributed.launch import ROOT, cases, outcome, ranks, run
from tests.distributed.problem import assert_same_run, batches, one_process
from tests.integrations.tiny_models import dense_loss, tiny, transformers

# Before, transformers gathered the output of a head only where all its parts are of one size.
UNEVEN = Version(transformers.__version__) >= Version("5.23")
ON_TWO = [name for name in worker.SCENARIOS if name != "with FSDP" and (UNEVEN or name != "uneven")]
ON_FOUR = ["llama", "gemma2", "with FSDP", "output in parts"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (family, options) in worker.MODELS.items():
        tiny(family, **options).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def two(models):
    with ranks(worker, env={"MODELS": str(models)}) as started:
        yield started


@pytest.fixture(scope="module")
def four(models):
    with ranks(worker, processes=4, env={"MODELS": str(models)}) as started:
        yield started


@functools.cache
def truth(name):
    family, options = worker.MODELS[name]
    return one_process(family=family, **options)


@pytest.mark.parametrize(
    "scenario", cases([name for name in ON_TWO if name in worker.STEPS], "gemma2")
)
def test_three_steps_of_two_ranks_equal_those_of_one_process(two, scenario):
    for trained in outcome(two, scenario):
        assert_same_run(trained, truth(worker.STEPS[scenario][0]))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ON_FOUR)
def test_three_steps_of_four_ranks_equal_those_of_one_process(four, scenario):
    for trained in outcome(four, scenario):
        assert_same_run(trained, truth(worker.STEPS[scenario][0]))


@pytest.mark.slow
def test_evaluation_generation_and_the_unpatched_model_are_what_they_were(two):
    family, options = worker.MODELS["gemma2"]
    model = tiny(family, **options)
    want = dense_loss(model, **batches()[0])
    logits = model(**batches()[0]).logits
    for result in outcome(two, "patched and not"):
        for name in ("logits", "losses", "generated", "unpatched"):
            patched, plain = result[name]
            assert patched.equal(plain), name
        # What rounding leaves of float64 numbers of order one.
        torch.testing.assert_close(result["kept"]["loss"], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(result["kept"]["logits"], logits, rtol=0, atol=1e-12)
        assert result["attributes"]


@pytest.mark.slow
def test_a_patched_model_is_saved_whole(two):
    assert outcome(two, "saved") == [[], []]


def test_a_batch_for_every_rank_is_refused(two):
    for message in outcome(two, "other batches"):
        assert "must work on the same batch" in message


@pytest.mark.slow
def test_the_example_trains_and_saves_the_whole_model(tmp_path):
    job = run(ROOT / "examples" / "tensor_parallel.py", "--steps", "31", "--output", str(tmp_path))
    assert job.returncode == 0, job.output
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", job.output, re.M)]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert whole.lm_head.weight.shape == (256, 32)
