"""The Hugging Face Trainer with a patched model takes the steps of its own label smoothing."""

import pytest
import torch
from tests.integrations.tiny_models import batch, tiny, transformers

from levelhead.integrations import patch_model

pytest.importorskip("accelerate", reason="Trainer needs accelerate")


def _train(model, folder, label_smoothing_factor):
    rows = [
        {name: value[i].roll(shift) for name, value in batch().items()}
        for shift in range(4)
        for i in range(2)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        label_smoothing_factor=label_smoothing_factor,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()


def test_parameters_after_four_steps_equal_label_smoothing_factor(tmp_path):
    start, plain = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    patched = patch_model(tiny(dtype=torch.float32), smoothing=0.1)
    _train(plain, tmp_path, label_smoothing_factor=0.1)
    _train(patched, tmp_path, label_smoothing_factor=0.0)
    for name, want in plain.named_parameters():
        # float32 rounding of four steps of 0.5 with gradients of order 0.1
        torch.testing.assert_close(patched.get_parameter(name), want, rtol=0, atol=1e-6)
    moved = (patched.lm_head.weight - start.lm_head.weight).abs().max()
    assert moved > 1e-2
