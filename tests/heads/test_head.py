"""What reaches the head, collected without logits, gives the statistics of the model's own logits."""

import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import FAMILIES, batch, next_tokens, tiny
from torch import nn

from levelhead import patch_model
from levelhead.heads.head import collect, head_input, single_head


def own_logits(model, labelled):
    """The model's logits, (N, V), at positions with a target, and the targets."""
    target = next_tokens(labelled["labels"])
    training = model.training
    z = model.eval()(input_ids=labelled["input_ids"]).logits
    model.train(training)
    return z[target != -100].detach(), target[target != -100]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_logits_divided_by_the_temperature(family):
    model = tiny(family, torch.float32)
    inputs = collect(model, [batch(), batch()])
    stats = single_head(model).logit_stats(inputs.hidden, inputs.target, 0.7)
    z, target = own_logits(model, batch())
    z, target = torch.cat([z, z]) / 0.7, torch.cat([target, target])
    assert torch.equal(inputs.target, target)
    # Softcap and scale in another order of operations, in float32.
    torch.testing.assert_close(stats.logsumexp, z.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stats.picked, z.gather(1, target[:, None])[:, 0], rtol=1e-4, atol=1e-5
    )
    expected = (z.softmax(-1) * z).sum(-1)
    torch.testing.assert_close(stats.expected, expected, rtol=1e-4, atol=1e-5)


def test_a_patched_model_gives_the_same():
    plain, patched = tiny("cohere"), patch_model(tiny("cohere"), eval_logits=False)
    want, got = collect(plain, [batch()]), collect(patched, [batch()])
    assert torch.equal(got.hidden, want.hidden)
    assert single_head(patched).transform == single_head(plain).transform
    assert patched(**batch()).loss is not None  # no call was left under way


def test_a_compiled_model_gives_the_same():
    want = collect(tiny(), [batch()])
    model = torch.compile(tiny(), backend="eager")
    model.eval()(**batch())  # compiled now, before the hooks that collect
    assert torch.equal(collect(model, [batch()]).hidden, want.hidden)


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    collect(model, [batch()])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_stops_after_max_tokens():
    batches = iter([batch(), batch(), batch()])
    inputs = collect(tiny("llama"), batches, max_tokens=15)
    assert inputs.hidden.shape == (15, 16)
    assert len(list(batches)) == 1


def test_an_encoder_decoder_predicts_the_labels_themselves():
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
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = collect(model, [batch()])
    stats = single_head(model).logit_stats(inputs.hidden, inputs.target)
    loss = (stats.logsumexp - stats.picked).mean()
    torch.testing.assert_close(loss, model(**batch()).loss)


def test_what_cannot_be_collected_is_refused():
    nothing = batch() | {"labels": torch.full((2, 9), -100)}
    with pytest.raises(ValueError, match="no token has a label"):
        collect(tiny("llama"), [nothing])
    with pytest.raises(ValueError, match="no token has a label"):
        collect(tiny("llama"), [])
    broken = tiny("llama")
    nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        collect(broken, [batch()])
    with pytest.raises(ValueError, match="no loss_function"):
        head_input(nn.Linear(2, 2), batch())


def test_no_tensor_of_the_size_of_logits_is_made():
    model = tiny("llama", torch.float32)
    sizes = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: sizes.append(getattr(out, "shape", ())))
        for module in model.modules()
    ]
    inputs = collect(model, [batch()])
    for hook in hooks:
        hook.remove()
    assert sizes
    assert all(67 not in shape for shape in sizes)
    z = F.linear(inputs.hidden, model.lm_head.weight)
    torch.testing.assert_close(z, own_logits(model, batch())[0])
