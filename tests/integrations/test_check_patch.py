"""`check_patch` accepts what is right, rejects what is wrong, and leaves no trace."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
from tests.integrations.tiny_models import FAMILIES, batch, next_tokens, tiny, transformers
from torch import nn

from levelhead.integrations import patch_model, set_objective, unpatch_model
from levelhead.integrations.patch import loss_call
from levelhead.integrations.patch.check import check_patch

# The dtype of the weights, and that of autocast.
PRECISIONS = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def _autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _break(monkeypatch, change):
    """Give the op of patched models other arguments: `change` edits (tensors, options) in place."""
    real = loss_call.linear_cross_entropy

    def broken(hidden, weight, target, **options):
        tensors = {"hidden": hidden, "weight": weight}
        change(tensors, options)
        return real(tensors["hidden"], tensors["weight"], target, **options)

    monkeypatch.setattr(loss_call, "linear_cross_entropy", broken)


def _smooth_more(_tensors, options):
    options["label_smoothing"] = options["label_smoothing"] * 1.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_patch_is_accepted(family):
    assert check_patch(patch_model(tiny(family, torch.float32), 0.2), batch()).ok


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_right_patch_is_accepted_in_every_precision(family, dtype, autocast):
    with _autocast(autocast):
        result = check_patch(tiny(family, dtype), batch())
    assert result.ok, str(result)
    assert result.dtype == (autocast or dtype)


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_a_smoothing_of_0_11_for_0_1_is_rejected_in_every_precision(dtype, autocast, monkeypatch):
    _break(monkeypatch, _smooth_more)
    with _autocast(autocast):
        assert not check_patch(tiny("llama", dtype), batch()).ok


def test_float32_shows_a_smoothing_of_0_1002_for_0_1(monkeypatch):
    def smooth_a_little_more(_tensors, options):
        options["label_smoothing"] = options["label_smoothing"] * 1.002

    _break(monkeypatch, smooth_a_little_more)
    assert not check_patch(tiny(dtype=torch.float32), batch()).ok


@pytest.mark.parametrize(
    ("family", "option", "without"),
    [("cohere", "logit_scale", 1.0), ("granite", "logit_scale", 1.0), ("gemma2", "softcap", None)],
)
def test_a_missing_scale_or_softcap_is_rejected(family, option, without, monkeypatch):
    _break(monkeypatch, lambda _, options: options.update({option: without}))
    result = check_patch(tiny(family, torch.float32), batch())
    assert not result.ok
    assert result.gradient_error > result.gradient_budget


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_gradient_that_is_missing_is_rejected_and_named(family, monkeypatch):
    def detach(tensors, options):
        if family == "phi":
            options["linear_bias"] = options["linear_bias"].detach()
        else:
            tensors["weight"] = tensors["weight"].detach()

    _break(monkeypatch, detach)
    result = check_patch(tiny(family, torch.bfloat16), batch())
    assert not result.ok
    assert result.gradient_error == float("inf")
    assert result.parameter == ("lm_head.bias" if family == "phi" else "lm_head.weight")


def test_a_gradient_with_one_wrong_entry_is_rejected_and_named():
    model = tiny(dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    steps = iter(range(2))

    def spoil(gradient):
        if next(steps) == 1:  # the patched step comes second
            gradient = gradient.clone()
            gradient[3, 5] += 0.05  # a quarter of the largest gradient; a thirtieth is allowed
        return gradient

    weight.register_hook(spoil)
    result = check_patch(model, batch())
    assert not result.ok
    assert result.parameter == "model.layers.0.mlp.up_proj.weight"
    assert abs(result.loss - result.dense_loss) < 1e-3


def test_a_gradient_that_is_not_finite_is_rejected(monkeypatch):
    _break(monkeypatch, lambda tensors, _: tensors["hidden"].register_hook(lambda g: g * torch.nan))
    result = check_patch(tiny(dtype=torch.float32), batch())
    assert not result.ok
    assert result.gradient_error == float("inf")


def test_a_loss_that_is_off_by_itself_is_rejected(monkeypatch):
    real = loss_call.linear_cross_entropy
    monkeypatch.setattr(
        loss_call, "linear_cross_entropy", lambda *args, **options: real(*args, **options) + 0.01
    )
    result = check_patch(tiny(dtype=torch.float32), batch())
    assert not result.ok
    assert result.gradient_error < result.gradient_budget


def test_the_verdict_is_printed(capsys, monkeypatch):
    result = check_patch(tiny(dtype=torch.float32), batch())
    assert capsys.readouterr().out == f"{result}\n"
    assert str(result).startswith("check_patch: ok. The patched LlamaForCausalLM trains as ")
    assert "label smoothing 0.1, to the rounding of float32.\n" in str(result)
    _break(monkeypatch, _smooth_more)
    result = check_patch(tiny(dtype=torch.float32), batch())
    assert str(result).startswith("check_patch: WRONG. The patched LlamaForCausalLM does not train")


def test_the_smoothing_is_the_one_given_or_that_of_the_patch_or_0_1():
    assert check_patch(tiny(), batch()).smoothing == 0.1
    assert check_patch(tiny(), batch(), smoothing=0.3).smoothing == 0.3
    model = patch_model(tiny(), torch.tensor(0.2))
    assert check_patch(model, batch()).smoothing == pytest.approx(0.2)
    result = check_patch(model, batch(), smoothing=0.0)
    assert result.smoothing == 0.0
    # The model's own logits.float() rounds: a loss of order 4 to about 1e-7 of it.
    assert result.dense_loss == pytest.approx(unpatch_model(model)(**batch()).loss.item(), rel=1e-6)


def test_temperature_and_softcap_of_the_patch_belong_to_what_is_checked():
    model = patch_model(tiny(dtype=torch.float32), temperature=0.05, softcap=0.5)
    result = check_patch(model, batch())
    assert result.ok
    plain = check_patch(tiny(dtype=torch.float32), batch())
    assert abs(result.dense_loss - plain.dense_loss) > 1e-3


def test_num_items_and_shift_labels_count():
    inputs = batch()
    count = (next_tokens(inputs["labels"]) != -100).sum()
    half = inputs | {"num_items_in_batch": torch.tensor(26)}
    assert check_patch(tiny(), half).ok
    shifted = {"input_ids": inputs["input_ids"], "shift_labels": next_tokens(inputs["labels"])}
    whole = check_patch(tiny(), inputs)
    assert check_patch(tiny(), shifted).dense_loss == pytest.approx(whole.dense_loss)
    assert check_patch(tiny(), half).dense_loss == pytest.approx(
        whole.dense_loss * count.item() / 26
    )


def _last_positions():
    inputs = batch()
    return inputs | {"labels": inputs["labels"][:, -5:], "logits_to_keep": 5}


def _some_positions():
    inputs, positions = batch(), torch.tensor([1, 2, 5, 6])
    return inputs | {"labels": inputs["labels"][:, positions], "logits_to_keep": positions}


def _another_ignored_id():
    inputs = batch()
    ignored = inputs["input_ids"][0, 5].item()
    return inputs | {"labels": inputs["input_ids"], "ignore_index": ignored}


@pytest.mark.parametrize("inputs", [_last_positions, _some_positions, _another_ignored_id])
def test_what_a_call_says_of_its_labels_counts(inputs):
    inputs = inputs()
    output = tiny()(**inputs)
    ignored = inputs.get("ignore_index", -100)
    want = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1),
        inputs["labels"][:, 1:].flatten(),
        ignore_index=ignored,
        label_smoothing=0.1,
    )
    result = check_patch(tiny(), inputs)
    # The model's own logits.float() rounds: a loss of order 4 to about 1e-7 of it.
    assert result.dense_loss == pytest.approx(want.item(), rel=1e-6)
    assert result.ok, str(result)


@contextlib.contextmanager
def _trained_in_eval_mode():
    """Training in eval mode is warned of, once a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("patched", [True, False])
def test_a_model_in_eval_mode_is_checked_in_eval_mode(patched):
    model = tiny("gpt2", torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model = patch_model(model, 0.2) if patched else model
    training = check_patch(model, batch(), smoothing=0.2)
    with _trained_in_eval_mode():
        result = check_patch(model.eval(), batch(), smoothing=0.2)
    assert result.ok, str(result)
    want = tiny("gpt2", torch.float32)
    assert result.dense_loss == pytest.approx(check_patch(want, batch(), smoothing=0.2).dense_loss)
    assert result.dense_loss != pytest.approx(training.dense_loss)


def test_each_module_runs_in_the_mode_that_it_is_in():
    model, seen = tiny().eval(), []
    model.model.layers[0].train()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: seen.append(module.training))
    with _trained_in_eval_mode():
        check_patch(model, batch())
    assert seen == 2 * [True, False]  # the dense step and the patched one


def test_it_runs_where_gradients_are_off():
    with torch.no_grad():
        assert check_patch(tiny(), batch()).ok


def test_a_model_with_a_loss_of_its_own():
    sizes = {"vocab_size": 67, "d_model": 16, "decoder_ffn_dim": 24, "decoder_layers": 1}
    heads = {"decoder_attention_heads": 2, "pad_token_id": 0, "is_encoder_decoder": False}
    dropout = {"dropout": 0.1, "init_std": 0.3}
    config = transformers.BartConfig(**sizes, **heads, **dropout)
    torch.manual_seed(0)
    assert check_patch(transformers.BartForCausalLM(config), batch()).ok


def test_dropout_falls_alike_in_both_steps():
    model = tiny("gpt2", torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    assert check_patch(model, batch()).ok


# Transformers 5.23 renames the method; the oldest release that is supported has this name only.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = tiny(dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert check_patch(model, batch()).ok


def test_a_wrapped_model():
    model = torch.compile(tiny(dtype=torch.float32, num_hidden_layers=1), backend="eager")
    assert check_patch(model, batch()).ok
    assert "logits" in model(**batch())


def test_autocast_within_the_forward_is_seen():
    accelerate = pytest.importorskip("accelerate")
    reset = accelerate.state.AcceleratorState._reset_state  # shared by the process, and its tests
    reset(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(patch_model(tiny(dtype=torch.float32)))
        result = check_patch(model, batch())
    finally:
        reset(reset_partial_state=True)
    assert result.dtype == torch.bfloat16
    assert result.ok


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_are_as_precise_as_the_user_permits(precision):
    before = torch.get_float32_matmul_precision()
    wide = check_patch(tiny(dtype=torch.float32), batch())
    try:
        torch.set_float32_matmul_precision(precision)
        result = check_patch(tiny(dtype=torch.float32), batch())
    finally:
        torch.set_float32_matmul_precision(before)
    assert result.budget > 5 * wide.budget


class _Counting(nn.Module):
    """Counts its calls in a buffer, as running statistics do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def _traces(model):
    return {
        "classes": [type(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "patch": vars(model).get("_levelhead"),
    }


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_trace_is_left(patched, training, fails, monkeypatch):
    model = tiny("gpt2", torch.float32)
    for block in model.transformer.h:
        block.mlp.dropout = nn.Sequential(_Counting(), nn.Dropout(0.2))
    if patched:
        patch_model(model, 0.3, temperature=0.5, eval_smoothing=0.2)
    model(**batch()).loss.backward()  # gradients to be kept
    model.lm_head.weight.grad.fill_(3)
    model.transformer.wpe.weight.grad = None
    model.train(training)
    model.transformer.h[0].eval()
    if fails:
        _break(monkeypatch, lambda tensors, _: tensors.clear())
    before = _traces(model)
    raises = pytest.raises(KeyError) if fails else contextlib.nullcontext()
    with raises, _trained_in_eval_mode():
        assert check_patch(model, batch(), smoothing=0.15).ok
    after = _traces(model)
    for name in ("classes", "training", "hooks"):
        assert after[name] == before[name]
    assert after["patch"] is before["patch"]
    assert all(a is b for a, b in zip(after["gradients"], before["gradients"], strict=True))
    for got, want in zip(after["values"], before["values"], strict=True):
        assert (got is None and want is None) or torch.equal(got, want)
    assert torch.equal(after["random"], before["random"])
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), name


def test_the_result_is_frozen():
    result = check_patch(tiny(), batch())
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.ok = False


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"needs a batch with labels, got one of \['input_ids'\]"):
        check_patch(tiny(), {"input_ids": batch()["input_ids"]})


@pytest.mark.parametrize("spoil", ["labels", "frozen"])
def test_a_batch_or_model_with_nothing_to_learn_is_refused(spoil):
    model, inputs = tiny(), batch()
    if spoil == "labels":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    else:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    with pytest.raises(ValueError, match="no finite gradient to compare with; give a batch with"):
        check_patch(model, inputs)


def test_an_objective_is_no_label_smoothing():
    class Other:
        columns = ()

    model = set_objective(patch_model(tiny()), Other())
    with pytest.raises(
        ValueError, match=r"trains on the objective Other; call set_objective\(model, N"
    ):
        check_patch(model, batch())


def test_a_smoothing_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\], got 10"):
        check_patch(tiny(), batch(), smoothing=10)


def test_a_model_that_cannot_be_patched_is_refused_in_the_words_of_patch_model():
    model = tiny()
    model.lm_head = type("QuantLinear", (nn.Linear,), {"forward": lambda *_: None})(16, 67)
    with pytest.raises(ValueError, match="patch_model cannot serve LlamaForCausalLM: its head"):
        check_patch(model, batch())


def test_an_optimiser_that_steps_in_the_backward_pass_is_refused():
    model = tiny()
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    with pytest.raises(ValueError, match=r"lm_head\.weight has hooks that act when its gradient"):
        check_patch(model, batch())
    assert model.lm_head.weight.abs().sum() > 0
    assert type(model.lm_head) is nn.Linear
