"""The Hugging Face Trainer takes with a patched model the steps of its own label smoothing."""

import pytest
import torch
from tests.integrations.tiny_models import batch, tiny, transformers
from torch.profiler import ProfilerActivity, profile

from levelhead.integrations import patch_model
from levelhead.measure.gate import error_budget

pytest.importorskip("accelerate", reason="Trainer needs accelerate")


def rows():
    """Eight examples with different numbers of labels, so that micro-batches weigh differently."""
    both = batch()
    found = []
    for shift in range(4):
        for row in range(2):
            example = {name: value[row].roll(shift) for name, value in both.items()}
            example["labels"][: 2 * shift] = -100
            found.append(example)
    return found


def new_trainer(model, folder, *, callbacks=None, data=None, eval_data=None, trainer=None, **own):
    """A Trainer of four steps of plain SGD on the CPU, `own` among its arguments."""
    arguments = {
        "output_dir": str(folder),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments | own),
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        callbacks=callbacks,
        **trainer or {},
    )


def train(model, folder, **options):
    """`model` after the steps of `new_trainer`, and the losses that were logged."""
    trainer = new_trainer(model, folder, **options)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_parameters(got, want, atol=1e-6):
    """Within float32 rounding of a few steps of 0.5 with gradients of order 0.1."""
    for name, parameter in want.named_parameters():
        torch.testing.assert_close(got.get_parameter(name), parameter, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory):
    """What Trainer's own label smoothing makes of the model."""
    folder = tmp_path_factory.mktemp("by_trainer")
    return train(tiny(dtype=torch.float32), folder, label_smoothing_factor=0.1)


# transformers 5.23 renamed the argument.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average_tokens_across_devices": False},
        {CHECKPOINTING: True},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options), "accumulation"),
)
def test_parameters_and_losses_equal_label_smoothing_factor(options, by_trainer, tmp_path):
    want, want_losses = by_trainer
    model = patch_model(tiny(dtype=torch.float32), smoothing=0.1)
    got, got_losses = train(model, tmp_path, **options)
    assert_same_parameters(got, want)
    # Trainer logs the loss with some digits; float32 rounding of losses of order 4.
    assert got_losses == pytest.approx(want_losses, abs=1e-5)
    moved = (got.lm_head.weight - tiny(dtype=torch.float32).lm_head.weight).abs().max()
    assert moved > 1e-2  # there was something to get wrong


def test_bf16_autocast_is_as_close_to_float32_as_label_smoothing_factor(by_trainer, tmp_path):
    def error(model):
        return max(
            (model.get_parameter(name) - parameter).abs().max()
            for name, parameter in by_trainer[0].named_parameters()
        )

    plain, _ = train(
        tiny(dtype=torch.float32), tmp_path / "plain", bf16=True, label_smoothing_factor=0.1
    )
    patched, _ = train(patch_model(tiny(dtype=torch.float32)), tmp_path / "patched", bf16=True)
    # The project's error budget: twice the dense path's; it is far above float32 rounding.
    assert 1e-6 < error(patched) <= error_budget(error(plain), 0, 0)  # without a rounding


def test_a_step_needs_a_fraction_of_the_memory(tmp_path):
    def peak_of_a_step(model, **options):
        length, vocabulary = 512, model.config.vocab_size
        ids = torch.arange(length).remainder(vocabulary)
        data = [{"input_ids": ids, "labels": ids}] * 2
        arguments = {"max_steps": 1, "gradient_accumulation_steps": 1} | options
        trainer = new_trainer(model, tmp_path, data=data, **arguments)
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            trainer.train()
        now = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    sizes = {"dtype": torch.float32, "vocab_size": 32_000, "num_hidden_layers": 1}
    logits = 2 * 512 * 32_000 * 4
    plain = peak_of_a_step(tiny(**sizes), label_smoothing_factor=0.1)
    patched = peak_of_a_step(patch_model(tiny(**sizes)))
    assert plain > 2 * logits  # the logits and their gradient, at least
    # At most 31.5 MiB of logits, of 125; gradients of the two (V, 16) weights, 4 MiB; a transformer
    # of width 16. What is measured is 35 MiB of 500.
    assert patched < logits / 2
    assert patched < plain / 8
