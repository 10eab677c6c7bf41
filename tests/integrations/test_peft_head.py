"""An adapter on the head itself is refused, or served right; it never trains on another loss."""

import pytest
import torch
from tests.integrations.tiny_models import batch, dense_loss, tiny

from levelhead.integrations import patch_model, unpatch_model

peft = pytest.importorskip("peft")

pytestmark = [
    # Transformers 5.23 renames the property that PEFT 0.21 reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]


def _config(name="LoraConfig", **options):
    return getattr(peft, name)(task_type="CAUSAL_LM", target_modules=["lm_head"], **options)


CONFIGS = {
    "lora": lambda: _config(),
    "lora that does something": lambda: _config(init_lora_weights=False),
    "lora of rank 1": lambda: _config(r=1),
    "dora": lambda: _config(use_dora=True),
    "adalora": lambda: _config("AdaLoraConfig", total_step=10),
    "loha": lambda: _config("LoHaConfig"),
    "vera": lambda: _config("VeraConfig", r=4),
    # These change the output of the head entry by entry: they would fit a loss in its place.
    "ia3": lambda: _config("IA3Config", feedforward_modules=[]),
    "tokens": lambda: peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head"], token_indices=[3, 5]
    ),
}


def _one_token():
    """One position with one label: the logits of LoRA are (1, 1, V), the shape of a bias."""
    return {"input_ids": torch.tensor([[5]]), "shift_labels": torch.tensor([[7]])}


@pytest.mark.parametrize("options", [{}, {"skip_logits": False}], ids=["", "with logits"])
@pytest.mark.parametrize("inputs", [batch, _one_token])
@pytest.mark.parametrize("adapter", CONFIGS)
def test_added_after_the_patch_is_refused_at_the_call(adapter, inputs, options):
    model = peft.get_peft_model(patch_model(tiny()), CONFIGS[adapter]()).double().train()
    with pytest.raises(RuntimeError, match="wrapped after patch_model") as error:
        model(**inputs(), **options)
    assert "modules_to_save" in str(error.value)


@pytest.mark.parametrize("adapter", CONFIGS)
def test_added_before_the_patch_is_refused_by_the_patch(adapter):
    model = peft.get_peft_model(tiny(), CONFIGS[adapter]())
    classes = [type(module) for module in model.modules()]
    for target in (model, model.get_base_model()):
        with pytest.raises(
            ValueError, match=r"its head lm_head is of class peft\.tuners\..*, not a plain torch"
        ) as error:
            patch_model(target)
        assert "modules_to_save" in str(error.value)
    assert [type(module) for module in model.modules()] == classes
    model(**batch()).loss.backward()  # and trains on without the patch


def test_tokens_of_a_tied_head_are_refused_in_both_orders():
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 5]
    )
    model = peft.get_peft_model(patch_model(tiny("qwen3")), config)
    with pytest.raises(RuntimeError, match="wrapped after patch_model"):
        model(**batch())
    with pytest.raises(ValueError, match=r"its head lm_head is of class .*TrainableTokensWrapper"):
        patch_model(peft.get_peft_model(tiny("qwen3"), config))


@torch.no_grad()
def test_evaluation_with_a_head_that_was_adapted_after_the_patch():
    """Without eval options an eval call is the model's own, adapter and all; with them refused."""
    model = peft.get_peft_model(patch_model(tiny()), CONFIGS["lora that does something"]())
    plain = unpatch_model(peft.get_peft_model(patch_model(tiny()), CONFIGS["lora"]()))
    plain.load_state_dict(model.state_dict())
    got, want = model.eval()(**batch()), plain.eval()(**batch())
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    for options in ({"eval_smoothing": 0.2}, {"eval_logits": False}):
        model = patch_model(tiny(), **options)
        model = peft.get_peft_model(model, CONFIGS["lora that does something"]()).eval()
        with pytest.raises(RuntimeError, match="wrapped after patch_model"):
            model(**batch())


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("again", [patch_model, lambda model: patch_model(unpatch_model(model))])
def test_a_copy_of_a_tied_head_is_served_once_it_is_patched_again(layer, again):
    """PEFT ties a layer of its own making to the embeddings, beside the head that was patched."""

    def adapted(model):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj"],
            modules_to_save=[layer],
            ensure_weight_tying=True,
        )
        model = peft.get_peft_model(model, config).double().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "modules_to_save" in name)
        return model

    plain, patched = adapted(tiny("qwen3")), adapted(patch_model(tiny("qwen3")))
    with pytest.raises(RuntimeError, match="or call patch_model again"):
        patched(**batch())
    got, want = again(patched)(**batch()).loss, dense_loss(plain, **batch())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got.backward()
    want.backward()
    for (name, parameter), other in zip(
        plain.named_parameters(), patched.parameters(), strict=True
    ):
        if parameter.requires_grad:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=0, atol=1e-12, msg=name)


def test_the_way_out_works():
    model = peft.get_peft_model(patch_model(tiny()), CONFIGS["lora that does something"]())
    merged = unpatch_model(model).merge_and_unload().train()
    merged.requires_grad_(True)
    want = dense_loss(merged, **batch())
    torch.testing.assert_close(patch_model(merged)(**batch()).loss, want, rtol=0, atol=1e-12)
    assert merged.lm_head.weight.sub(tiny().lm_head.weight).abs().max() > 1e-3
