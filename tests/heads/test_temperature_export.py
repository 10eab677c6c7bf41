"""A checkpoint that was given a temperature, loaded by transformers alone, has softmax(z / T)."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from tests.integrations.tiny_models import batch, tiny

from levelhead import patch_model
from levelhead.heads.head import head_input
from levelhead.heads.temperature import apply_temperature

WAYS = [
    ("llama", {}, "head"),
    ("llama", {"tie_word_embeddings": True}, "final_norm"),
    ("gemma2", {}, "final_norm"),
    ("gemma2", {"tie_word_embeddings": False}, "head"),
    ("granite", {}, "logit_scale"),
    ("granite", {"tie_word_embeddings": True}, "logit_scale"),
    ("cohere", {}, "logit_scale"),
    ("phi", {}, "head"),
    ("phi", {"tie_word_embeddings": True}, "final_norm"),
    ("gpt2", {}, "final_norm"),
]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=batch()["input_ids"]).logits


def saved(model, folder):
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def random_model(family, dtype=torch.float64, **options):
    """With large weights, that the cap bends the logits and norms have gains and shifts."""
    model = tiny(family, dtype, **options)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


@pytest.mark.parametrize("temperature", [0.4, 1.7])
@pytest.mark.parametrize(("family", "options", "way"), WAYS)
def test_a_loaded_checkpoint_has_the_logits_divided(family, options, way, temperature, tmp_path):
    model = random_model(family, **options)
    want = logits(model) / temperature
    assert apply_temperature(model, temperature) == way
    torch.testing.assert_close(logits(saved(model, tmp_path)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma2", {})])
def test_bfloat16_weights_are_rounded_once(family, options, tmp_path):
    model = random_model(family, torch.bfloat16, **options)
    exact = copy.deepcopy(model).float()
    want = logits(exact) / 1.7
    terms = head_input(exact, batch()).abs() @ exact.lm_head.weight.detach().abs().T / 1.7
    apply_temperature(model, 1.7)
    reloaded = saved(model, tmp_path)
    assert reloaded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: half a unit in the last place is 2**-9 of each term of a logit at most,
    # and twice that where one is taken from a gain to make it Gemma's weight.
    error = (logits(reloaded.float()) - want).abs()
    assert (error <= 2**-8 * terms + 1e-5).all()
    assert error.max() > 0


def test_twice_is_the_product(tmp_path):
    model = random_model("cohere")
    want = logits(model) / 3
    apply_temperature(model, 2.0)
    apply_temperature(model, 1.5)
    torch.testing.assert_close(logits(saved(model, tmp_path)), want)


def without_norm():
    """A tied model whose final norm is none, so that nothing but sampling is left."""
    model = random_model("llama", tie_word_embeddings=True)
    model.model.norm = nn.Identity()
    return model


def test_otherwise_sampling_gets_it(tmp_path):
    model = without_norm()
    model.generation_config.do_sample = True
    before = logits(model)
    assert apply_temperature(model, 1.7) == "generation_config"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    model.generation_config.save_pretrained(tmp_path)
    loaded = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.temperature, loaded.do_sample) == (1.7, True)


def test_a_softcap_that_cannot_be_kept_is_put_back():
    model = random_model("gemma2")
    model.model.norm = nn.Identity()
    model.generation_config.do_sample = True
    before = logits(model)
    assert apply_temperature(model, 2.0) == "generation_config"
    assert model.config.final_logit_softcapping == 0.5
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_greedy_generation_is_refused_where_only_sampling_is_left():
    model = without_norm()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="do_sample = True"):
        apply_temperature(model, 1.7)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# Transformers 5.23 renames the property that PEFT 0.21 reads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_whose_checkpoint_would_not_hold_it_is_refused():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="unpatch_model"):
        apply_temperature(patch_model(tiny("llama")), 1.7)
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        apply_temperature(adapted, 1.7)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        apply_temperature(tiny("llama"), temperature)
