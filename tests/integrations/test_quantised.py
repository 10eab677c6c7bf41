"""A quantised head is refused, before the patch or at the call; a quantised body is no concern."""

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import assert_same_training, batch, dense_loss, tiny
from torch import Tensor, nn

from levelhead.integrations import patch_model

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


class _Quantised(Tensor):
    """A weight that a linear layer multiplies otherwise than the numbers it shows (as torchao's)."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight = (arg.as_subclass(Tensor) for arg in args[:2])
            return F.linear(x, weight.sign() * weight.abs().mean())
        return super().__torch_function__(function, types, args, kwargs or {})


class _QuantLinear(nn.Linear):
    """A layer that computes otherwise than a linear one (as bitsandbytes')."""

    def forward(self, input):  # noqa: A002
        return F.linear(input, self.weight.round(decimals=2))


def _subclass_weight(model):
    weight = model.lm_head.weight.detach().as_subclass(_Quantised)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    assert type(model.lm_head.weight) is not nn.Parameter
    return model


def _narrow_weight(dtype):
    def quantise(model):
        weight = (100 * model.lm_head.weight.detach()).to(dtype)
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        return model

    return quantise


def _other_layer(model):
    model.lm_head = _QuantLinear(16, 67, bias=False, dtype=torch.float64)
    return model


def _other_class(model):
    model.lm_head.__class__ = _QuantLinear  # as convert functions do that keep the module
    return model


QUANTISERS = {
    "a weight of another class": _subclass_weight,
    "int8": _narrow_weight(torch.int8),
    "float8": _narrow_weight(torch.float8_e4m3fn),
    "another layer": _other_layer,
    "another class of layer": _other_class,
}


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_head_quantised_before_the_patch_is_refused(kind):
    model = QUANTISERS[kind](tiny())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="Keep the head out of quantisation"):
        patch_model(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_head_quantised_after_the_patch_is_refused_at_the_call(kind):
    model = QUANTISERS[kind](patch_model(tiny()))
    with pytest.raises((RuntimeError, TypeError), match=r"head|linear_weight"):
        model(**batch())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch.ao is to become torchao
@pytest.mark.filterwarnings("ignore:.*quant.*:UserWarning")
def test_dynamic_quantisation_of_the_head_is_refused():
    quantize = torch.ao.quantization.quantize_dynamic
    model = quantize(tiny(dtype=torch.float32), {"lm_head"}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"of class torch\.ao\..*\.Linear, not a plain torch"):
        patch_model(model)


def test_a_quantised_body_trains_what_is_left():
    """The head and adapters of a quantised model, whose other weights need no gradient."""

    def build():
        model = tiny()
        for name, layer in model.model.layers.named_modules():
            if isinstance(layer, nn.Linear):
                layer.__class__ = _QuantLinear
                layer.requires_grad_(name.endswith("o_proj"))
        return model

    plain, patched = build(), patch_model(build())
    for model in (plain, patched):  # what assert_same_training compares needs a gradient
        model.requires_grad_(True)
    assert_same_training(patched, patched(**batch()).loss, plain, dense_loss(plain, **batch()))


@pytest.mark.parametrize(
    "config",
    ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"],
)
def test_torchao(config):
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(model):
        is_head = lambda _, path: path == "lm_head"  # noqa: E731
        quantization.quantize_(model, getattr(quantization, config)(), filter_fn=is_head)
        return model

    with pytest.raises(ValueError, match="Keep the head out of quantisation"):
        patch_model(quantise(tiny(dtype=torch.float32, **SIZES)))
    model = quantise(patch_model(tiny(dtype=torch.float32, **SIZES)))
    with pytest.raises((RuntimeError, TypeError)):
        model(**batch())


@pytest.mark.parametrize("layer", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes(layer):
    layers = pytest.importorskip("bitsandbytes").nn
    model = tiny(dtype=torch.float32, **SIZES)
    model.lm_head = getattr(layers, layer)(64, 128, bias=False)
    with pytest.raises(ValueError, match=f"its head lm_head is of class bitsandbytes.*{layer}"):
        patch_model(model)
    model = patch_model(tiny(dtype=torch.float32, **SIZES))
    model.lm_head = getattr(layers, layer)(64, 128, bias=False)
    with pytest.raises(RuntimeError, match="wrapped after patch_model"):
        model(**batch())
