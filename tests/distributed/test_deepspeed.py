"""Under DeepSpeed the ranks together take the steps of one process."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.distributed.launch import cases, outcome, ranks, run

from levelhead.measure.gate import error_budget

# Not importorskip: the import takes seconds, and only the workers need it.
MISSING = [name for name in ("deepspeed", "peft") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
WORKER = "tests.distributed.deepspeed_worker"  # by name: the import of DeepSpeed takes seconds
STAGES = range(4)
RUNS = [f"{what}ZeRO-{stage}" for what in ("", "tied, ", "accumulation, ") for stage in STAGES]
RUNS += [f"patched after initialize, ZeRO-{stage}" for stage in (0, 3)]
RUNS += [f"LoRA, ZeRO-{stage}" for stage in (2, 3)]
RUNS += [f"bf16, ZeRO-{stage}" for stage in (0, 1, 3)]
RUNS += ["zero.Init", "softcap, ZeRO-3", "gradient checkpointing, ZeRO-3"]
RUNS += ["fp16, ZeRO-3", "autocast, ZeRO-3"]
RESUMED = [f"resumed, ZeRO-{stage}" for stage in STAGES]
THROUGH_TRAINER = ["Trainer", "Ulysses"]
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16, "autocast": torch.bfloat16}


def started(tmp_path_factory):
    env = {"DS_ACCELERATOR": "cpu", "CHECKPOINTS": str(tmp_path_factory.mktemp("checkpoints"))}
    with ranks(WORKER, env=env) as waiting:
        yield waiting


engines = pytest.fixture(started, scope="module")
compiled = pytest.fixture(started, scope="module")
trainers = pytest.fixture(started, scope="module")  # Trainer makes engines by a state of its own


def distance(got, want):
    """The largest difference of two lists, or of two dictionaries, of tensors."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = got.values(), want.values()
    pairs = zip(got, want, strict=True)
    return max((mine.double() - truth.double()).abs().max().item() for mine, truth in pairs)


def assert_as_near_as_without_the_patch(runs, eps):
    """To the losses and parameters of one process, given one rounding by `eps` of its values."""
    want = runs["one process"]
    patched, unpatched = runs["patched"], runs["unpatched"]
    travelled = distance(want["start"], want["parameters"])
    assert travelled > 0.1  # so that none of what follows is about steps too small to see
    far = distance(unpatched["parameters"], want["parameters"])
    # A comparison with an engine that is wrong would show nothing. This one rounds in each of a
    # few layers and three steps, and stores parameters of order one in float32 or, under ZeRO-0,
    # in its own type.
    assert far < 16 * eps * travelled + eps
    # Twice that of the same engine, which rounds as often but elsewhere, and one rounding of
    # float32, in which the optimizer keeps parameters of order one.
    budget = error_budget(far, 1, torch.finfo(torch.float32).eps)
    assert distance(patched["parameters"], want["parameters"]) <= budget
    # The same for losses of size four, in sums over logits rounded by `eps`.
    far = distance(unpatched["losses"], want["losses"])
    assert distance(patched["losses"], want["losses"]) <= error_budget(far, 4, eps)


@pytest.mark.parametrize("scenario", cases(RUNS, "ZeRO-3"))
def test_three_steps_equal_those_of_one_process_as_nearly_as_without_the_patch(engines, scenario):
    if scenario.startswith("fp16") and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("DeepSpeed refuses fp16 on a processor without instructions for it")
    precision = PRECISION.get(scenario.split(",")[0], torch.float32)
    for runs in outcome(engines, scenario):
        assert_as_near_as_without_the_patch(runs, torch.finfo(precision).eps)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_resumes_to_the_same_continuation_bit_by_bit(engines, stage):
    through = outcome(engines, f"ZeRO-{stage}")
    for runs, whole in zip(outcome(engines, RESUMED[stage]), through, strict=True):
        for steps in (runs["continued"], runs["resumed"]):
            assert distance(steps["parameters"], whole["patched"]["parameters"]) == 0
            assert distance(steps["losses"], whole["patched"]["losses"]) == 0


@pytest.mark.slow
def test_evaluation_under_zero_3_gives_the_unpatched_loss_and_logits(engines):
    for outputs in outcome(engines, "evaluation"):
        want = outputs["one process"]
        for name in ("patched", "after unpatch_model"):
            # float32 rounding of logits below one, and of a loss of four
            assert distance([outputs[name]["logits"]], [want["logits"]]) < 1e-6
            assert distance([outputs[name]["loss"]], [want["loss"]]) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("scenario", THROUGH_TRAINER)
def test_trainer_with_a_deepspeed_config_takes_the_steps_of_one_process(trainers, scenario):
    for runs in outcome(trainers, scenario):
        want = runs["one process"]
        # float32 rounding of parameters of order one and losses of four, over three steps
        assert distance(runs["patched"]["parameters"], want["parameters"]) < 1e-6
        assert distance(runs["patched"]["losses"], want["losses"]) < 2e-6


@pytest.mark.slow
def test_trainer_resumes_a_deepspeed_checkpoint_to_the_same_end(trainers):
    for runs in outcome(trainers, "Trainer"):
        assert distance(runs["resumed"]["parameters"], runs["patched"]["parameters"]) == 0
        assert distance(runs["resumed"]["losses"], runs["patched"]["losses"]) == 0


@pytest.mark.slow
def test_a_head_split_by_tensor_parallelism_is_refused_before_and_after_the_patch(engines):
    for messages in outcome(engines, "tensor parallel"):
        assert messages["patched after"].startswith("ValueError: patch_model cannot serve Llama")
        assert "its head lm_head is of class deepspeed." in messages["patched after"]
        assert messages["patched before"].startswith("RuntimeError: ")
        assert "LinearLayer now: it was replaced or wrapped" in messages["patched before"]


@pytest.mark.slow
def test_a_compiled_engine_takes_the_steps_of_one_process(compiled):
    for runs in outcome(compiled, "compiled, ZeRO-3"):
        assert runs["compiled frames"] > 0
        assert_as_near_as_without_the_patch(runs, torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_the_example_trains_a_model_that_transformers_loads(tmp_path):
    job = run(
        Path(__file__).with_name("deepspeed_example.py"),
        *("--deepspeed_config", "examples/deepspeed/zero3.json", "--output", str(tmp_path)),
        env={"DS_ACCELERATOR": "cpu"},
    )
    assert job.returncode == 0, job.output
    for losses in job.results:
        # log 256 = 5.5 before it knows anything of 256 tokens; with labels smoothed by 0.1 the
        # least possible is 0.9.
        assert losses[-1] < 4 < 5 < losses[0]
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = (7 + 2 * torch.arange(32)).unsqueeze(0)
    assert model(input_ids=ids, labels=ids).loss < 4
