"""A model with an adapter trains, patched before or after, as it does without the patch."""

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import VOCAB_SIZE, batch, next_tokens, tiny

from levelhead.integrations import patch_model, unpatch_model
from levelhead.integrations.patch.loss_head import LossHead

peft = pytest.importorskip("peft")

pytestmark = [
    # Transformers 5.23 renames the property that PEFT 0.21 reads, 5.24 the argument that its prefix tuning gives.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]


def _patch_first(model, config):
    return peft.get_peft_model(patch_model(model), config)


def _peft_first(model, config):
    return patch_model(peft.get_peft_model(model, config))


def _patch_inside(model, config):
    model = peft.get_peft_model(model, config)
    patch_model(model.get_base_model())
    return model


ORDERS = [_patch_first, _peft_first, _patch_inside]
AFTER = [_peft_first, _patch_inside]


def _lora(**options):
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)


def _adapted(config, family="llama", wrap=peft.get_peft_model):
    """A tiny model with an adapter that has left its start, where half of the gradients are zero."""
    model = wrap(tiny(family), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.05 * noise)
    return model.double().train()


def _dense_loss(model, smoothing=0.1):
    """The smoothed loss of the logits of an unpatched model; virtual tokens have no label."""
    logits = model(input_ids=batch()["input_ids"]).logits
    labels = batch()["labels"]
    labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    target = next_tokens(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1), target, label_smoothing=smoothing)


def _gradients(model, loss):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def _assert_same_training(patched, plain):
    got, want = patched(**batch()), _dense_loss(plain)
    assert "logits" not in got
    # float64: what sums of a few hundred terms of order one lose
    torch.testing.assert_close(got.loss, want, rtol=0, atol=1e-12)
    ours, dense = _gradients(patched, got.loss), _gradients(plain, want)
    assert ours.keys() == dense.keys()
    assert any(gradient is not None and gradient.any() for gradient in dense.values())
    for name, gradient in dense.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-12, msg=name)


ADAPTERS = {
    "lora": lambda: _lora(),
    "lora everywhere": lambda: _lora(target_modules="all-linear"),
    "dora": lambda: _lora(use_dora=True),
    "lora and a head": lambda: _lora(modules_to_save=["lm_head"]),
    "lora, head and embeddings": lambda: _lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora and tokens": lambda: _lora(trainable_token_indices=[3, 5]),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    # A regulariser that is not there in the loss, but that PEFT insists on.
    "adalora": lambda: peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, orth_reg_weight=1e-300
    ),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loss_and_every_gradient_equal_those_without_the_patch(adapter, order):
    patched = _adapted(ADAPTERS[adapter](), wrap=order)
    _assert_same_training(patched, _adapted(ADAPTERS[adapter]()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "config",
    [_lora(), _lora(modules_to_save=["lm_head"]), _lora(target_modules=["embed_tokens"])],
    ids=["lora", "lora and a head", "lora on the embeddings"],
)
def test_with_tied_weights(config, order):
    patched = _adapted(config, "qwen3", order)
    _assert_same_training(patched, _adapted(config, "qwen3"))


@pytest.mark.parametrize("order", AFTER)
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_head_and_embeddings_that_are_trained_tied_are_patched_last(layer, order):
    config = _lora(modules_to_save=[layer], ensure_weight_tying=True)
    patched = _adapted(config, "qwen3", order)
    _assert_same_training(patched, _adapted(config, "qwen3"))
    early = _adapted(config, "qwen3", _patch_first)  # PEFT puts a head of its own in its place
    with pytest.raises(RuntimeError, match="or call patch_model again"):
        early(**batch())
    _assert_same_training(patch_model(unpatch_model(early)), _adapted(config, "qwen3"))


def test_the_regulariser_of_adalora_is_added_once():
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, orth_reg_weight=0.5
    )
    plain, patched = _adapted(config), _adapted(config, wrap=_patch_first)
    regulariser = plain(**batch()).loss - plain.get_base_model()(**batch()).loss
    assert regulariser > 1e-2
    got = patched(**batch()).loss - _dense_loss(plain)
    # The plain losses come from logits.float(), rounded to about 1e-7 of 4.
    torch.testing.assert_close(got, regulariser.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_the_active_one_of_two_heads_is_trained(order):
    def build(wrap):
        model = _adapted(_lora(modules_to_save=["lm_head"]), wrap=wrap)
        torch.manual_seed(2)
        model.add_adapter("second", _lora(modules_to_save=["lm_head"]))
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["second"].weight.mul_(0.5)
        return model.double()

    patched, plain = build(order), build(peft.get_peft_model)
    for adapter in ("second", "default"):
        patched.set_adapter(adapter)
        plain.set_adapter(adapter)
        _assert_same_training(patched, plain)
    with patched.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(patched(**batch()).loss, _dense_loss(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("head", [None, ["lm_head"]])
def test_disabled_and_merged_adapters(order, head):
    patched = _adapted(_lora(modules_to_save=head), wrap=order)
    plain = _adapted(_lora(modules_to_save=head))
    with patched.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(patched(**batch()).loss, _dense_loss(plain), rtol=0, atol=1e-12)
    patched.merge_adapter()
    torch.testing.assert_close(patched(**batch()).loss, _dense_loss(plain), rtol=0, atol=1e-12)
    patched.unmerge_adapter()
    torch.testing.assert_close(patched(**batch()).loss, _dense_loss(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("head", [None, ["lm_head"]])
def test_merge_and_unload_leaves_a_patched_model_that_can_be_unpatched(order, head):
    config = _lora(modules_to_save=head)
    merged = _adapted(config, wrap=order).merge_and_unload()
    plain = _adapted(config).merge_and_unload()
    assert isinstance(merged.lm_head, LossHead)
    for model in (merged, plain):
        model.requires_grad_(True)
    _assert_same_training(merged, plain)
    assert type(unpatch_model(merged)) is type(plain)
    assert type(merged.lm_head) is torch.nn.Linear
    assert torch.equal(merged(**batch()).logits, plain(**batch()).logits)


@pytest.mark.parametrize("order", ORDERS)
def test_unpatched_inside_its_wrapper(order):
    config = _lora(modules_to_save=["lm_head"])
    model, plain = unpatch_model(_adapted(config, wrap=order)), _adapted(config)
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("head", [None, ["lm_head"]])
def test_a_saved_adapter_is_that_of_the_unpatched_model(order, head, tmp_path):
    config = _lora(modules_to_save=head)
    patched, plain = _adapted(config, wrap=order), _adapted(config)
    patched.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("patched", "plain")]
    assert names[0] == names[1]
    weights = [
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("patched", "plain")
    ]
    assert weights[0] == weights[1]
    for base in (tiny(), patch_model(tiny())):  # an adapter loads into either
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "patched", is_trainable=True)
        _assert_same_training(patch_model(loaded).train(), plain)


def test_all_linear_layers_do_not_include_the_patched_head():
    model = _adapted(ADAPTERS["lora everywhere"](), wrap=_patch_first)
    assert type(model.get_base_model().lm_head) is LossHead
    assert model.get_base_model().lm_head.out_features == VOCAB_SIZE


def test_mixed_precision_adapters_on_a_narrow_model_train():
    """PEFT keeps adapters of a bfloat16 model in float32, and so their gradients."""
    torch.manual_seed(0)
    model = peft.get_peft_model(patch_model(tiny(dtype=torch.bfloat16)), _lora())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch()).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.any() for gradient in gradients)
