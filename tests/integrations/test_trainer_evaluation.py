"""What evaluation by a Trainer gives for a patched model, by default and by the options."""

import numpy as np
import pytest
import torch
from tests.integrations.test_trainer import new_trainer, rows
from tests.integrations.tiny_models import LENGTH, VOCAB_SIZE, tiny

from levelhead.integrations import patch_model


def _evaluate(model, folder, compute_metrics=None, **options):
    hooks = {"compute_metrics": compute_metrics}
    options = {"eval_data": rows(), "per_device_eval_batch_size": 3, "trainer": hooks} | options
    return new_trainer(model, folder, **options).evaluate()


def _accuracy(prediction):
    logits, labels = prediction
    assert logits.shape == (8, LENGTH, VOCAB_SIZE)
    valid = labels[:, 1:] != -100
    return {"accuracy": np.mean(logits[:, :-1].argmax(-1)[valid] == labels[:, 1:][valid])}


def test_compute_metrics_sees_the_logits_and_the_loss_is_not_smoothed(tmp_path):
    want = _evaluate(tiny(dtype=torch.float32), tmp_path, _accuracy)
    got = _evaluate(patch_model(tiny(dtype=torch.float32), smoothing=0.9), tmp_path, _accuracy)
    assert got["eval_loss"] == want["eval_loss"]
    assert got["eval_accuracy"] == want["eval_accuracy"]


def test_eval_smoothing_gives_the_eval_loss_of_label_smoothing_factor(tmp_path):
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 20  # or smoothing would change the loss of a new model by nothing
    want = _evaluate(model, tmp_path, _accuracy, label_smoothing_factor=0.1)
    hard = _evaluate(model, tmp_path, _accuracy)
    got = _evaluate(patch_model(model, smoothing=0.3, eval_smoothing=0.1), tmp_path, _accuracy)
    # float32 rounding of losses of order 5
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], abs=5e-6)
    assert got["eval_accuracy"] == want["eval_accuracy"]
    assert abs(hard["eval_loss"] - want["eval_loss"]) > 1e-3


@pytest.mark.parametrize("options", [{}, {"prediction_loss_only": True}])
def test_eval_logits_false_gives_the_loss_alone(options, tmp_path):
    seen = []
    model = patch_model(tiny(dtype=torch.float32), eval_logits=False)
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.shape[:-1].numel())
    )
    got = _evaluate(model, tmp_path, **options)
    want = _evaluate(tiny(dtype=torch.float32), tmp_path, **options)
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], abs=5e-6)
    assert set(seen) == {1}  # the head answered with numbers for one token


NEEDED = (
    r"eval_logits=False, but Trainer wants its logits.*eval_logits=True\), or leave compute_met"
)


# Mixtral returns more than logits, which Trainer would take for them.
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_eval_logits_false_beside_compute_metrics_is_refused(family, tmp_path):
    model = patch_model(tiny(family, dtype=torch.float32), eval_logits=False)
    with pytest.raises(RuntimeError, match=NEEDED):
        _evaluate(model, tmp_path, lambda _: {})
    got = _evaluate(
        patch_model(model), tmp_path, lambda prediction: {"n": len(prediction.label_ids)}
    )
    assert got["eval_n"] == 8


def test_eval_logits_false_has_no_predictions_to_return(tmp_path):
    trainer = new_trainer(patch_model(tiny(dtype=torch.float32), eval_logits=False), tmp_path)
    with pytest.raises(RuntimeError, match=NEEDED):
        trainer.predict(rows())


def test_evaluation_between_steps_leaves_training_what_it_was(tmp_path):
    def losses(**options):
        model = patch_model(tiny(dtype=torch.float32), eval_smoothing=0.1)
        trainer = new_trainer(model, tmp_path, eval_data=rows(), **options)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(eval_strategy="steps", eval_steps=1) == losses()
