"""What the options of patch_model change, and that they change nothing else."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import (
    assert_same_training,
    batch,
    dense_loss,
    next_tokens,
    tiny,
)

from levelhead.integrations import patch_model


@torch.no_grad()
def test_eval_smoothing_smooths_the_loss_and_keeps_the_logits():
    plain, patched = tiny().eval(), patch_model(tiny(), eval_smoothing=0.2).eval()
    output = patched(**batch())
    torch.testing.assert_close(output.loss, dense_loss(plain, **batch(), smoothing=0.2))
    assert torch.equal(output.logits, plain(**batch()).logits)


@pytest.mark.parametrize("eval_smoothing", [0.0, 0.2])
@torch.no_grad()
def test_eval_without_logits(eval_smoothing):
    model = patch_model(tiny(), eval_smoothing=eval_smoothing, eval_logits=False).eval()
    output = model(**batch())
    assert "logits" not in output
    want = dense_loss(tiny().eval(), **batch(), smoothing=eval_smoothing)
    torch.testing.assert_close(output.loss, want)
    assert "logits" in model(batch()["input_ids"])
    assert "logits" in model(**batch(), skip_logits=False)


@torch.no_grad()
def test_one_eval_call_may_skip_its_logits():
    model = patch_model(tiny()).eval()
    output = model(**batch(), skip_logits=True)
    assert "logits" not in output
    torch.testing.assert_close(output.loss, dense_loss(tiny(), **batch(), smoothing=0.0))


def test_a_training_call_may_keep_its_logits():
    plain, patched = tiny(), patch_model(tiny())
    output = patched(**batch(), skip_logits=False)
    assert torch.equal(output.logits, plain(**batch()).logits)
    assert_same_training(patched, output.loss, plain, dense_loss(plain, **batch()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_temperature_divides_the_logits_and_multiplies_the_loss(family):
    plain, patched = tiny(family), patch_model(tiny(family), temperature=0.5)
    logits = plain(batch()["input_ids"]).logits / 0.5
    want = 0.5 * _smoothed(logits)
    assert_same_training(patched, patched(**batch()).loss, plain, want)
    with torch.no_grad():
        assert torch.equal(patched.eval()(**batch()).loss, plain.eval()(**batch()).loss)


def test_a_softcap_of_the_users_comes_after_the_temperature():
    plain, patched = tiny(), patch_model(tiny(), temperature=0.5, softcap=0.1)
    want = 0.5 * _smoothed(0.1 * torch.tanh(plain(batch()["input_ids"]).logits / 0.5 / 0.1))
    assert_same_training(patched, patched(**batch()).loss, plain, want)


def _smoothed(logits):
    target = next_tokens(batch()["labels"])
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.1)


def test_a_softcap_on_top_of_the_models_own_is_refused():
    with pytest.raises(ValueError, match=r"caps its logits at 0.5 already.* Leave softcap out"):
        patch_model(tiny("gemma2"), softcap=30.0)


def test_a_tensor_changes_the_smoothing_from_step_to_step():
    smoothing = torch.tensor(0.1)
    plain, patched = tiny(), patch_model(tiny(), smoothing)
    for share in (0.1, 0.0, 0.3):
        smoothing.fill_(share)
        want = dense_loss(plain, **batch(), smoothing=smoothing.item())
        # float32 holds the smoothing, to 1e-8 of losses of order one
        assert_same_training(patched, patched(**batch()).loss, plain, want, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_changes_the_temperature_from_step_to_step(dtype):
    temperature = torch.tensor(0.5, dtype=dtype)
    plain, patched = tiny(), patch_model(tiny(), temperature=temperature)
    for value in (0.5, 2.0, 0.25):
        temperature.fill_(value)
        want = value * _smoothed(plain(batch()["input_ids"]).logits / value)
        assert_same_training(patched, patched(**batch()).loss, plain, want)


def test_a_softcap_may_be_a_tensor():
    plain, patched = tiny(), patch_model(tiny(), softcap=torch.tensor(0.25))
    want = _smoothed(0.25 * torch.tanh(plain(batch()["input_ids"]).logits / 0.25))
    assert_same_training(patched, patched(**batch()).loss, plain, want)


def test_patching_again_sets_every_option():
    model = patch_model(tiny(), 0.1, temperature=0.5, softcap=1.0, eval_logits=False)
    patch_model(model, 0.3)
    torch.testing.assert_close(model(**batch()).loss, dense_loss(tiny(), **batch(), smoothing=0.3))
    with torch.no_grad():
        assert "logits" in model.eval()(**batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 1.1}, r"smoothing must lie in \[0, 1\], got 1.1; a common choice is 0.1"),
        ({"smoothing": float("nan")}, r"smoothing must lie in \[0, 1\], got nan"),
        ({"smoothing": torch.tensor(-0.5)}, r"smoothing must lie in \[0, 1\], got -0.5"),
        ({"eval_smoothing": -0.1}, r"eval_smoothing must lie in \[0, 1\], got -0.1"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0"),
        (
            {"temperature": torch.tensor(torch.inf)},
            "temperature must be a positive number, got inf",
        ),
        ({"softcap": float("nan")}, "softcap must be a positive number, got nan"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        patch_model(tiny(), **options)


NO_NUMBERS = {
    "'0.1' of type str": "0.1",
    "True of type bool": True,
    "None of type NoneType": None,
    "[0.1] of type list": [0.1],
    "0.1j of type complex": 0.1j,
    "Fraction(1, 2) of type Fraction": Fraction(1, 2),
    "a tensor of shape (1,) and dtype torch.float32": torch.tensor([0.1]),
    "a tensor of shape () and dtype torch.int64": torch.tensor(1),
    "a tensor of shape () and dtype torch.bool": torch.tensor(True),
}


@pytest.mark.parametrize("option", ["smoothing", "temperature", "softcap", "eval_smoothing"])
@pytest.mark.parametrize("shown", NO_NUMBERS)
def test_options_that_are_no_numbers(option, shown):
    if option == "softcap" and NO_NUMBERS[shown] is None:
        return  # no cap
    with pytest.raises(TypeError, match=f"^{option} must be a number .*") as error:
        patch_model(tiny(), **{option: NO_NUMBERS[shown]})
    assert str(error.value).endswith(f", got {shown}")
    assert ("floating-point tensor, got" in str(error.value)) == (option != "eval_smoothing")


@pytest.mark.parametrize("option", ["smoothing", "temperature", "softcap"])
def test_an_option_that_requires_a_gradient_would_never_be_trained(option):
    learned = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(
        ValueError, match=rf"^{option} is a tensor that requires a gradient.*would "
    ):
        patch_model(tiny(), **{option: learned})
    patch_model(tiny(), **{option: learned.detach()})


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.float16(0.5), 1])
def test_numbers_of_numpy_are_numbers(number):
    options = {"smoothing": number, "temperature": number, "softcap": number}
    got = patch_model(tiny(), **options)(**batch()).loss
    want = patch_model(tiny(), **{name: float(number) for name in options})(**batch()).loss
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("value", "shown"), [(1, "1 of type int"), ("no", "'no' of type str"), (None, "None of type")]
)
def test_eval_logits_is_true_or_false(value, shown):
    with pytest.raises(TypeError, match=f"eval_logits must be True or False, got {shown}"):
        patch_model(tiny(), eval_logits=value)


def test_options_are_looked_at_before_the_model():
    with pytest.raises(TypeError, match="smoothing must be a number"):
        patch_model("gpt2", "0.1")


def test_a_temperature_filled_with_what_is_none_is_refused_by_its_name():
    temperature = torch.tensor(2.0)
    model = patch_model(tiny(), temperature=temperature)
    temperature.fill_(0.0)
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        model(**batch())
