"""SmoothingSchedule: the smoothing of a Trainer's run follows a function of its progress."""

import doctest
import math

import pytest
import torch
from tests.integrations.test_trainer import assert_same_parameters, new_trainer, rows
from tests.integrations.tiny_models import dense_loss, tiny

from levelhead.integrations import patch_model

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from levelhead.integrations.transformers import SmoothingSchedule

STEPS = 4
# All rows in every step, so that their order does not matter.
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": STEPS}


def decay(progress):
    return 0.8 * (1 - progress)


def scheduled(model, folder, schedule=decay, **options):
    """A finished Trainer of `STEPS` steps under the schedule."""
    trainer = new_trainer(model, folder, callbacks=[SmoothingSchedule(schedule)], **WHOLE | options)
    trainer.train()
    return trainer


def logged(trainer):
    return [entry["smoothing"] for entry in trainer.state.log_history if "loss" in entry]


def test_equals_a_loop_written_by_hand(tmp_path):
    got = patch_model(tiny(dtype=torch.float32))
    scheduled(got, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    want = tiny(dtype=torch.float32)
    examples = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    for smoothing in (0.8, 0.6, 0.4, 0.2):
        loss = dense_loss(want, smoothing=smoothing, **examples)
        parameters = dict(want.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= 0.5 * gradient
    assert_same_parameters(got, want)


def test_logs_its_value(tmp_path):
    trainer = scheduled(patch_model(tiny(dtype=torch.float32)), tmp_path)
    assert logged(trainer) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_does_not_recompile(tmp_path):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = patch_model(tiny(dtype=torch.float32))
    scheduled(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()

    eager = patch_model(tiny(dtype=torch.float32))
    scheduled(eager, tmp_path)
    assert_same_parameters(model, eager)


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    saving = {"save_strategy": "steps", "save_steps": 2}
    want = scheduled(patch_model(tiny(dtype=torch.float32)), whole, **saving)

    model = patch_model(tiny(dtype=torch.float32))
    got = new_trainer(model, half, callbacks=[SmoothingSchedule(decay)], **WHOLE)
    got.train(resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert logged(got)[-2:] == pytest.approx([0.4, 0.2])
    assert_same_parameters(got.model, want.model)


def test_keeps_the_other_options(tmp_path):
    model = patch_model(tiny(dtype=torch.float32), eval_smoothing=0.3, eval_logits=False)
    trainer = scheduled(model, tmp_path, eval_data=rows())
    want = patch_model(tiny(dtype=torch.float32), eval_smoothing=0.3)
    want.load_state_dict(model.state_dict())
    got = trainer.evaluate()["eval_loss"]
    assert got == pytest.approx(
        new_trainer(want, tmp_path, eval_data=rows()).evaluate()["eval_loss"]
    )
    with torch.no_grad():
        output = model.eval()(**{name: value[None] for name, value in rows()[0].items()})
    assert "logits" not in output


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_finds_the_model_in_a_wrapper(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(patch_model(tiny(dtype=torch.float32)), lora)
    assert logged(scheduled(model, tmp_path)) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_refuses_a_model_that_is_not_patched(tmp_path):
    with pytest.raises(ValueError, match=r"no patched model in the LlamaForCausalLM.*patch_model"):
        scheduled(tiny(), tmp_path)


def test_refuses_a_value_that_is_no_share(tmp_path):
    with pytest.raises(ValueError, match=r"gave 1.5 for progress 0.5; a smoothing must lie in"):
        scheduled(patch_model(tiny()), tmp_path, schedule=lambda progress: 3 * progress)


@pytest.mark.parametrize("name", ["warm_up", "decay"])
def test_the_schedules_of_the_docstring_run_up_and_down(name):
    names = {"SmoothingSchedule": lambda schedule: schedule, "math": math}
    for example in doctest.DocTestParser().get_examples(SmoothingSchedule.__doc__)[:2]:
        exec(example.source, names)
    values = [names[name](step / 100) for step in range(100)]
    assert max(values) == pytest.approx(0.1)
    assert min(values) >= 0
    assert values == sorted(values, reverse=name == "decay")
