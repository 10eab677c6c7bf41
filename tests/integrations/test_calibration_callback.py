"""Calibration on held-out text, logged as Trainer evaluates, equals that of all the logits."""

import pytest
import torch
from tests.integrations.test_trainer import new_trainer, rows
from tests.integrations.tiny_models import next_tokens, tiny, transformers

from levelhead.calibration import calibration_error
from levelhead.heads.token_calibration import TokenCalibration
from levelhead.integrations import patch_model
from levelhead.integrations.transformers import CalibrationCallback

NAMES = ("ece", "mean_confidence", "token_accuracy", "entropy")


def sure(family="llama", **options):
    """A model with confidence of all sizes."""
    model = tiny(family, dtype=torch.float32, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
    return model


def data():
    """Rows of which the model predicts some tokens: half of them are its own guesses."""
    model, found = sure().eval(), rows()
    for example in found:
        ids = example["input_ids"].clone()
        for position in range(1, len(ids), 2):
            ids[position] = model(input_ids=ids[None, :position]).logits[0, -1].argmax()
        keep = example["labels"] == -100
        example["input_ids"] = ids
        example["labels"] = ids.masked_fill(keep, -100)
    return found


def dense(model, examples, bins=10):
    """What the metrics should be, of all logits in float64."""
    model = model.eval()
    logits, target = [], []
    for example in examples:
        labels = next_tokens(example["labels"][None])[0]
        with torch.no_grad():
            z = model(input_ids=example["input_ids"][None]).logits[0].double()
        logits.append(z[labels != -100])
        target.append(labels[labels != -100])
    p, target = torch.cat(logits).softmax(-1), torch.cat(target)
    confidence, guess = p.max(-1)
    correct = guess == target
    return {
        "ece": calibration_error(confidence, correct, bins=bins),
        "mean_confidence": confidence.mean().item(),
        "token_accuracy": correct.double().mean().item(),
        "entropy": -torch.xlogy(p, p).sum(-1).mean().item(),
    }


def evaluated(model, folder, *, callback=None, eval_data=None, **options):
    callbacks = [CalibrationCallback() if callback is None else callback]
    options = {"per_device_eval_batch_size": 3, "callbacks": callbacks} | options
    return new_trainer(model, folder, eval_data=eval_data or data(), **options)


def metrics(logs, prefix="eval"):
    return {name: logs[f"{prefix}_{name}"] for name in NAMES}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "cohere"])
def test_metrics_equal_those_of_all_logits(family, tmp_path):
    got = evaluated(sure(family), tmp_path).evaluate()
    want = dense(sure(family), data())
    assert metrics(got) == pytest.approx(want, abs=1e-5)  # float32 against float64
    if family == "llama":
        assert 0.2 < want["token_accuracy"] < 0.8  # there was something to get wrong


@pytest.mark.parametrize("options", [{}, {"eval_logits": False}, {"eval_smoothing": 0.1}])
def test_a_patched_model_gives_the_same(options, tmp_path):
    patched = patch_model(sure(), softcap=5.0, temperature=0.5, **options)
    got = evaluated(patched, tmp_path).evaluate()
    assert metrics(got) == pytest.approx(dense(sure(), data()), abs=1e-5)


def test_bins_are_those_asked_for(tmp_path):
    got = evaluated(sure(), tmp_path, callback=CalibrationCallback(bins=3)).evaluate()
    assert metrics(got) == pytest.approx(dense(sure(), data(), bins=3), abs=1e-5)


def test_the_backbone_runs_once_and_the_loss_is_what_it_was(tmp_path):
    model, calls = sure(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    got = evaluated(model, tmp_path).evaluate()
    assert len(calls) == 3  # batches of eight rows
    plain = new_trainer(sure(), tmp_path, eval_data=data(), per_device_eval_batch_size=3)
    assert got["eval_loss"] == plain.evaluate()["eval_loss"]


def test_every_evaluation_in_training_is_logged_with_them(tmp_path):
    trainer = evaluated(patch_model(sure()), tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2
    assert metrics(evaluations[0]) != metrics(evaluations[1])
    assert metrics(evaluations[1]) == pytest.approx(dense(trainer.model, data()), abs=1e-5)
    others = [log for log in trainer.state.log_history if "eval_loss" not in log]
    assert not any("ece" in name for log in others for name in log)


def test_training_is_what_it_was(tmp_path):
    def losses(callbacks):
        trainer = new_trainer(
            patch_model(sure()),
            tmp_path,
            callbacks=callbacks,
            eval_data=data(),
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses([CalibrationCallback()]) == losses([])


def test_the_best_model_and_early_stopping_see_it(tmp_path):
    trainer = evaluated(
        sure(),
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ece",
        greater_is_better=False,
    )
    trainer.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=9))
    trainer.train()
    logged = [log["eval_ece"] for log in trainer.state.log_history if "eval_ece" in log]
    assert trainer.state.best_metric == min(logged)
    assert trainer.evaluate()["eval_ece"] == pytest.approx(min(logged), abs=1e-6)


def test_several_data_sets_and_predictions_keep_their_prefixes(tmp_path):
    first, second = data()[:3], data()[3:]
    trainer = evaluated(sure(), tmp_path, eval_data={"a": first, "b": second})
    got = trainer.evaluate()
    assert metrics(got, "eval_a") == pytest.approx(dense(sure(), first), abs=1e-5)
    assert metrics(got, "eval_b") == pytest.approx(dense(sure(), second), abs=1e-5)
    got = trainer.predict(first).metrics
    assert metrics(got, "test") == pytest.approx(dense(sure(), first), abs=1e-5)


def test_reporters_see_it_if_it_comes_first(tmp_path):
    class Reporter(transformers.TrainerCallback):
        seen = ()

        def on_log(self, *_args, logs=None, **_kwargs):
            self.seen = tuple(logs)

    reporter = Reporter()
    trainer = new_trainer(
        sure(),
        tmp_path,
        eval_data=data(),
        callbacks=[reporter],
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.callback_handler.callbacks.insert(0, CalibrationCallback())
    trainer.train()
    trainer.evaluate()
    assert {f"eval_{name}" for name in NAMES} <= set(reporter.seen)


def test_autocast_is_measured_as_it_computes(tmp_path):
    got = evaluated(sure(), tmp_path, bf16=True).evaluate()
    # Logits of order ten with the rounding of bfloat16, which moves some argmax.
    assert metrics(got) == pytest.approx(dense(sure(), data()), abs=0.05)


@pytest.mark.slow
def test_torch_compile_gives_the_same(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = evaluated(
        patch_model(sure()), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, **compiled
    )
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_ece" in log]
    assert metrics(logged[0]) != metrics(logged[1])  # the second one saw other weights
    assert metrics(logged[1]) == pytest.approx(dense(trainer.model, data()), abs=1e-4)


def test_an_evaluation_without_labels_is_an_error(tmp_path):
    trainer = evaluated(sure(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match="saw no label in this evaluation"):
        trainer.evaluate()


def test_a_callback_that_came_too_late_is_an_error(tmp_path):
    trainer = new_trainer(sure(), tmp_path, eval_data=data())
    trainer.add_callback(CalibrationCallback())
    with pytest.raises(RuntimeError, match="has not seen the model before this evaluation"):
        trainer.evaluate()


def test_a_model_it_cannot_read_is_refused_when_trainer_is_made(tmp_path):
    model = sure()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="no statistics of the logits of LlamaForCausalLM"):
        evaluated(model, tmp_path)


def test_bins_must_be_some():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        CalibrationCallback(bins=0)


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("last", [9, 5])
@torch.no_grad()
def test_the_labels_of_a_call_are_those_that_it_says(patched, last):
    model = sure()
    model = patch_model(model, eval_smoothing=0.1) if patched else model
    watch = TokenCalibration(model.eval(), bins=10)
    ids = torch.stack([example["input_ids"] for example in rows()])[:, -last:]
    ignored = ids[0, -1].item()
    model(
        input_ids=torch.stack([example["input_ids"] for example in rows()]),
        labels=ids,
        ignore_index=ignored,
        logits_to_keep=last,
    )
    assert watch.sums[0].sum() == (ids[:, 1:] != ignored).sum()
