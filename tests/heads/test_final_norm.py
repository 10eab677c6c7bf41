"""The norm before the head is found by what it does, and bounds what reaches the head."""

import pytest
import torch
from tests.integrations.tiny_models import FAMILIES, batch, tiny
from torch import nn

from levelhead.heads.final_norm import final_norm
from levelhead.heads.head import head_input


def shaken(family, **options):
    """A model whose norms have gains and shifts of all signs and sizes."""
    model = tiny(family, torch.float32, **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reaches_the_head_is_gain_times_a_bounded_vector_plus_shift(family):
    model = shaken(family)
    norm = final_norm(model)
    hidden = head_input(model, batch())
    unit = (hidden - norm.shift) / norm.gain
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(2, 9), rtol=2e-3, atol=0)
    assert hidden.norm(dim=-1).max() <= norm.norm_ceiling * 1.0001  # rounding of float32


def test_shifts_of_a_layer_norm_count_and_those_of_an_rms_norm_are_zero():
    model = shaken("gpt2")
    torch.testing.assert_close(final_norm(model).shift, model.transformer.ln_f.bias.data)
    assert not final_norm(shaken("llama")).shift.any()


class Doubled(nn.Module):
    """A norm, and a factor that its output gets in place."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x).mul_(2)


def test_a_factor_after_a_norm_is_part_of_what_is_found():
    model = shaken("llama")
    gain = final_norm(model).gain
    model.model.norm = Doubled(model.model.norm)
    found = final_norm(model)
    assert found.module is model.model.norm
    torch.testing.assert_close(found.gain, 2 * gain)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(16, 16), nn.Tanh()])
def test_without_a_norm_there_is_none(module):
    model = shaken("llama")
    model.model.norm = module
    assert final_norm(model) is None


def test_a_norm_that_is_called_twice_is_none():
    model = shaken("llama")
    model.model.layers[0].input_layernorm = model.model.norm
    assert final_norm(model) is None


def test_what_is_scaled_on_its_way_to_the_head_is_not_bounded_by_its_norm():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=67,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    config.scale_decoder_outputs = True
    assert final_norm(transformers.T5ForConditionalGeneration(config)) is None
