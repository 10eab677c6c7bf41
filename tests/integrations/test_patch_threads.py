"""Threads that call patched models at once do not see each other's calls."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tests.integrations.tiny_models import batch, dense_loss, tiny

from levelhead.integrations import patch_model


def _meet(model, barrier):
    """Have `model` wait for the other threads between its backbone and its head."""

    def wait(*_):
        barrier.wait(timeout=60)

    model.model.register_forward_hook(wait)


def test_two_models_train_at_once():
    barrier = Barrier(2)
    models = [patch_model(tiny("llama"), 0.1), patch_model(tiny("gemma2"), 0.3)]
    for model in models:
        _meet(model, barrier)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda model: model(**batch()).loss, models))
    want = [
        dense_loss(tiny(f), **batch(), smoothing=s) for f, s in (("llama", 0.1), ("gemma2", 0.3))
    ]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_one_trains_while_another_evaluates_and_a_third_has_no_labels():
    barrier = Barrier(3)
    models = [patch_model(tiny("llama")) for _ in range(3)]
    for model in models:
        _meet(model, barrier)
    models[1].eval(), models[2].eval()

    def call(index):
        inputs = batch() if index < 2 else {"input_ids": batch()["input_ids"]}
        with torch.set_grad_enabled(index == 0):
            return models[index](**inputs)

    with ThreadPoolExecutor(3) as pool:
        trained, evaluated, logits = pool.map(call, range(3))
    plain = tiny("llama")
    torch.testing.assert_close(trained.loss, dense_loss(plain, **batch()), rtol=0, atol=1e-12)
    assert torch.equal(evaluated.loss, plain(**batch()).loss)
    assert torch.equal(logits.logits, plain(**batch()).logits)


def test_a_call_that_fails_leaves_nothing_behind_in_its_thread():
    model, broken = patch_model(tiny()), patch_model(tiny())
    broken.model.register_forward_hook(lambda *_: 1 / 0)

    def call(_):
        with pytest.raises(ZeroDivisionError):
            broken(**batch())
        with torch.no_grad():
            logits = model.lm_head(torch.zeros(1, 1, 16, dtype=torch.float64))
        return logits.shape, model(**batch()).loss

    with ThreadPoolExecutor(1) as pool:
        shape, loss = pool.submit(call, None).result()
    assert shape == (1, 1, 67)
    assert torch.equal(loss, model(**batch()).loss)
