"""Every text that a user can be shown says what was asked, what came, what is valid and what to do."""

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import levelhead

X, W, Y = torch.randn(2, 3, 8), torch.randn(11, 8), torch.zeros(2, 3, dtype=torch.int64)


def _refusal(error: type[Exception], *args: Any, function: Any = None, **options: Any) -> str:
    with pytest.raises(error) as caught:
        (function or levelhead.linear_cross_entropy)(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, W.long(), Y), TypeError, "linear_weight must be float16, bfloat16, float32 or float64, got torch.int64"),
        ((X, W[0], Y), ValueError, "linear_weight must have shape (V, D) with at least one vocabulary entry, got (8,)"),
        ((X, W[:0], Y), ValueError, "linear_weight must have shape (V, D) with at least one vocabulary entry, got (0, 8)"),
        ((X[..., :5], W, Y), ValueError, "input must have shape (..., D) with D = 8 as in linear_weight (11, 8), got (2, 3, 5)"),
        ((X, W, Y[0]), ValueError, "target must have shape (2, 3) for input (2, 3, 8), got (3,)"),
        ((X, W, Y.float()), TypeError, "target must hold integer ids, got torch.float32; class probabilities are not supported"),
        ((X, W, Y.bool()), TypeError, "target must hold integer ids, got torch.bool"),
        ((X, W.to("meta"), Y), ValueError, "linear_weight is on meta but input is on cpu; move one of them"),
        ((X, W, Y.to("meta")), ValueError, "target is on meta but input is on cpu; move one"),
        ((X.half(), W, Y), TypeError, "input is torch.float16 but linear_weight and linear_bias are torch.float32; cast them to one dtype, or use torch.autocast"),
        ((X, W, Y + 11), IndexError, "target[0, 0] is 11, outside [0, 11) and not ignore_index = -100; 6 of 6 targets are"),
        ((X, W, (Y - 100).to(torch.uint8)), IndexError, "target[0, 0] is 156, outside [0, 11) and not ignore_index = -100; 6 of 6 targets are"),
        ((X, W, Y - 1), IndexError, "target[0, 0] is -1, outside [0, 11) and not ignore_index = -100; 6 of 6 targets are"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(args: Any, error: type[Exception], text: str) -> None:
    assert _refusal(error, *args) == text


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors is in prototype")
def test_a_masked_tensor_is_refused() -> None:
    text = _refusal(TypeError, X, W, torch.masked.masked_tensor(Y, Y == 0))
    assert text.startswith(
        "target must be a plain tensor, got a MaskedTensor; use target.to_tensor(value)"
    )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in [0, 1], got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must lie in [0, 1], got -0.1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must lie in [0, 1], got nan"),
        ({"label_smoothing": torch.zeros(4)}, ValueError, "label_smoothing must be a number, a 0-dim tensor or of target's shape (2, 3), got shape (4,)"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be a positive number or None, got inf"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be a positive number, got 0.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a number >= 0, got -1.0"),
        ({"reduction": "average"}, ValueError, "unknown reduction 'average'; expected 'mean', 'sum' or 'none'"),
        ({"impl": "naive"}, ValueError, "unknown impl 'naive'; expected None, 'chunked', 'triton' or 'reference'"),
        ({"linear_bias": torch.zeros(8)}, ValueError, "linear_bias must have shape (V,) = (11,), got (8,)"),
        ({"linear_bias": torch.zeros(11).double()}, TypeError, "input is torch.float32 but linear_weight and linear_bias are torch.float32 and torch.float64; cast them to one dtype, or use torch.autocast"),
        ({"token_weight": torch.ones(6)}, ValueError, "token_weight must have target's shape (2, 3), got (6,)"),
        ({"token_weight": Y}, TypeError, "token_weight must be floating point, got torch.int64"),
        ({"token_weight": torch.ones(2, 3, device="meta")}, ValueError, "token_weight is on meta but target is on cpu; move one"),
    ],
)  # fmt: skip
def test_options_out_of_range(options: Any, error: type[Exception], text: str) -> None:
    assert _refusal(error, X, W, Y, **options) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ignore_index": None}, "ignore_index must be an integer, got None; where every target counts, any that is no id, such as -100"),
        ({"ignore_index": 1.0}, "ignore_index must be an integer, got 1.0; where every target counts, any that is no id, such as -100"),
        ({"label_smoothing": None}, "label_smoothing must be a number, got None; 0.0 is none"),
        ({"label_smoothing": "0.1"}, "label_smoothing must be a number, got '0.1'; use float('0.1')"),
        ({"label_smoothing": True}, "label_smoothing must be a number, got True; 0.0 is none"),
        ({"label_smoothing": torch.tensor(1)}, "label_smoothing must be floating point, got torch.int64"),
        ({"logit_scale": None}, "logit_scale must be a number, got None; 1.0 is none"),
        ({"softcap": "30"}, "softcap must be a number, got '30'; use float('30')"),
        ({"softcap": [30.0]}, "softcap must be a number, got [30.0]; None is none"),
        ({"z_loss": None}, "z_loss must be a number, got None; 0.0 is none"),
        ({"reduction": None}, "reduction must be 'mean', 'sum' or 'none', got None; 'none' is a loss for each token"),
        ({"linear_bias": [0.0]}, "linear_bias must be a torch.Tensor, got [0.0]; use torch.tensor"),
        ({"token_weight": 1.0}, "token_weight must be a torch.Tensor, got 1.0; give a tensor"),
    ],
)  # fmt: skip
def test_options_of_another_type(options: Any, text: str) -> None:
    assert _refusal(TypeError, X, W, Y, **options) == text


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "logit_scale"])
def test_numbers_of_numpy_integers_and_fractions_are_numbers(name: str) -> None:
    expected = levelhead.linear_cross_entropy(X, W, Y, **{name: 1.0})
    for one in (1, np.float32(1), np.float64(1), np.int64(1), Fraction(1)):
        assert levelhead.linear_cross_entropy(X, W, Y, **{name: one}) == expected
    assert levelhead.linear_cross_entropy(X, W, Y, ignore_index=np.int64(-1)).isfinite()


_JAGGED = "must have one shape for all sequences, got a nested tensor; give the tokens of all sequences in one row"


# A nested tensor that is not jagged says that it is a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_what_is_no_dense_tensor(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([X[0], X[1, :2]], layout=layout)
    ids = torch.nested.nested_tensor([Y[0], Y[1, :2]], layout=layout)
    for function in (levelhead.linear_cross_entropy, levelhead.linear_logit_stats):
        refusal = partial(_refusal, TypeError, function=function)
        name = "target" if function is levelhead.linear_cross_entropy else "picks"
        assert refusal(X.tolist(), W, Y).startswith("input must be a torch.Tensor, got [[[")
        assert refusal(X.tolist(), W, Y).endswith("; use torch.tensor")
        assert refusal(X, W.numpy(), Y).endswith("; use torch.from_numpy")
        assert refusal(X, W, None) == f"{name} must be a torch.Tensor, got None; give a tensor"
        assert (
            refusal(X.to_sparse(), W, Y)
            == "input must be dense, got torch.sparse_coo; use input.to_dense()"
        )
        assert refusal(nested, W, Y).startswith(f"input {_JAGGED}")
        assert refusal(X, W, ids).startswith(f"{name} {_JAGGED}")


def test_a_target_of_another_class_is_looked_at_too() -> None:
    class Labels(torch.Tensor):
        pass

    text = _refusal(IndexError, X, W, (Y + 11).as_subclass(Labels))
    assert (
        text
        == "target[0, 0] is 11, outside [0, 11) and not ignore_index = -100; 6 of 6 targets are"
    )


def test_float64_is_not_mixed_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = _refusal(TypeError, X, W.double(), Y)
    assert text == (
        "input is torch.bfloat16 but linear_weight and linear_bias are torch.float64; "
        "autocast leaves float64 alone, so cast them to one dtype"
    )


def test_picks_may_be_one_or_several_a_token() -> None:
    text = _refusal(ValueError, X, W, Y[0], function=levelhead.linear_logit_stats)
    assert text == "picks must have shape (2, 3) or (2, 3) + (K,) for input (2, 3, 8), got (3,)"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused_where_it_is_asked_for(reduction: Any) -> None:
    x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
    loss = levelhead.linear_cross_entropy(x, weight, Y, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="levelhead does not implement double backward"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_target_out_of_range_makes_the_loss_nan_where_nobody_looks(
    reduction: Any, grad: bool
) -> None:
    """The documented behaviour on an accelerator and under torch.compile: loud, without a host synchronisation."""
    torch.compiler.reset()  # where another test's compilation of it failed, the compiler leaves it out
    target = Y.clone()
    target[1, 2] = 11
    weight = W.clone().requires_grad_(grad)
    compiled = torch.compile(levelhead.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(X, weight, target, reduction=reduction)
    assert loss.flatten()[-1].isnan()
    if reduction == "none":
        assert loss.flatten()[:-1].isfinite().all()
