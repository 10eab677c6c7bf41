"""A term that a model makes of its logits after its loss is refused; one that is not of them is served."""

import copy
import dataclasses
import pickle

import pytest
import torch
from tests.integrations.tiny_models import (
    SIZES,
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)
from torch.utils._pytree import tree_map

from levelhead.integrations import patch_model


def _llama(after, **attributes):
    """A Llama that does `after(self, output)` with what it returns for labels."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if labels is not None:
                after(self, output)
            return output

    model = tiny()
    model.__class__ = Other
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def _z_loss(_, output):
    output.loss = output.loss + 0.01 * output.logits.logsumexp(-1).pow(2).mean()


def _z_loss_in_place(_, output):
    output.loss += 0.01 * output.logits.logsumexp(-1).pow(2).mean()


def _penalty(_, output):
    p = output.logits.softmax(-1)
    output.loss = output.loss + (p * p.log()).sum(-1).mean()


def _detached(_, output):
    output.loss = output.loss + output.logits.detach().amax()


def _weighted(_, output):
    output.loss = output.loss * output.logits[..., 0].sigmoid().mean()


def _half(_, output):
    output.loss = 0.5 * output.loss


def _none(_, output):
    output.loss = None


def _another(_, output):
    output.loss = output.logits.square().mean()


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (_z_loss, "its loss depends on them"),
        (_z_loss_in_place, "its loss depends on them"),
        (_penalty, "its loss depends on them"),
        (_detached, "its loss depends on them"),
        (_weighted, "it multiplies its loss by 0"),
        (_half, "it multiplies its loss by 0.5"),
        (_none, "does not return what its loss_function gives"),
        (_another, "it multiplies its loss by 0"),
    ],
)
def test_refused_when_patched(after, reason):
    with pytest.raises(ValueError, match=reason):
        patch_model(_llama(after))


def test_a_metric_made_of_the_logits_is_refused():
    def accuracy(self, output):
        output.hidden_states = (
            (output.logits[:, :-1].argmax(-1) == self.labels[:, 1:]).float().mean()
        )

    with pytest.raises(ValueError, match="its hidden_states depends on them, and in training"):
        patch_model(_llama(accuracy, labels=torch.tensor([[1, -100, 0], [-100, 0, 1]])))


def test_what_the_model_keeps_of_its_logits_is_refused():
    def entropy(self, output):
        self.last = torch.distributions.Categorical(logits=output.logits).entropy()

    with pytest.raises(ValueError, match="its last depends on them, and in training"):
        patch_model(_llama(entropy, last=None))


def test_a_term_of_the_weights_is_served():
    def decay(self, output):
        output.loss = output.loss + 0.1 * self.lm_head.weight.square().sum()

    plain, patched = _llama(decay), patch_model(_llama(decay))
    want = dense_loss(plain, **batch()) + 0.1 * plain.lm_head.weight.square().sum()
    assert_same_training(patched, patched(**batch()).loss, plain, want)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("term", [False, True])
def test_a_term_that_comes_later_is_refused_at_the_call(in_place, term):
    coefficients = []

    def after(self, output):
        if term:
            output.loss = output.loss + self.lm_head.weight.sum()
        if coefficients:
            (_z_loss_in_place if in_place else _z_loss)(self, output)

    model = patch_model(_llama(after))
    model(**batch())
    coefficients.append(1)
    with pytest.raises(
        RuntimeError, match=r"makes more of its logits than its loss.* skip_logits=F"
    ):
        model(**batch())
    model(**batch(), skip_logits=False)


@pytest.mark.parametrize("value", [1, 0.1, True, torch.ones(())])
def test_a_coefficient_that_the_model_keeps_is_looked_at_again(value):
    def after(self, output):
        if self.coefficient is not None:
            _z_loss(self, output)

    model = patch_model(_llama(after, coefficient=None))
    model(**batch())
    model.coefficient = value
    with pytest.raises(ValueError, match="its loss depends on them"):
        model(**batch())


def _bamba(**options):
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]}
    options = SIZES | sizes | {"mamba_n_groups": 1, "mamba_chunk_size": 8} | options
    torch.manual_seed(0)
    return transformers.BambaForCausalLM(transformers.BambaConfig(**options)).train()


def test_the_z_loss_of_bamba_is_refused_when_patched_and_when_raised_later():
    with pytest.raises(
        ValueError,
        match=r"its loss depends on them.*set the coefficient of a term of the loss to 0",
    ):
        patch_model(_bamba(z_loss_coefficient=0.1))
    model = patch_model(_bamba())
    model(**batch())
    model.z_loss_coefficient = 0.1
    with pytest.raises(ValueError, match="its loss depends on them"):
        model(**batch())


@dataclasses.dataclass
class _Call:
    """What a forward has when it makes more of its logits than its loss."""

    model: torch.nn.Module
    z: torch.Tensor
    labels: torch.Tensor
    out: dict

    def add(self, term):
        self.out["loss"] = self.out["loss"] + term

    def correct(self):
        return (self.z.argmax(-1) == self.labels).double().mean()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones_like(ctx.saved_tensors[0])


MORE = {
    "z loss": lambda c: c.add(c.z.logsumexp(-1).pow(2).mean()),
    "z loss in place": lambda c: c.out["loss"].add_(c.z.logsumexp(-1).mean()),
    "entropy": lambda c: c.add(-torch.distributions.Categorical(logits=c.z).entropy().mean()),
    "no gradient": lambda c: c.add((c.z > 0).double().mean()),
    "NaN as 0": lambda c: c.add(c.z.nan_to_num().mean()),
    "factor": lambda c: c.out.update(loss=c.out["loss"] * (1 + c.correct())),
    "chosen": lambda c: c.add(1.0 if (c.z > 0).any() else 0.0),
    "metric": lambda c: c.out.update(accuracy=c.correct()),
    "metric within": lambda c: c.out.update(metrics=[{"accuracy": c.correct()}]),
    "number": lambda c: c.out.update(accuracy=c.correct().item()),
    "text": lambda c: c.out.update(accuracy=f"{c.correct():.3f}"),
    "array": lambda c: c.out.update(top=c.z.argmax(-1).numpy()),
    "list": lambda c: c.out.update(top=[row.tolist() for row in c.z]),
    "kept number": lambda c: setattr(c.model, "last", float(c.z.detach().amax())),
    "kept": lambda c: setattr(c.model, "last", c.correct()),
    "kept in a tensor": lambda c: c.model.seen.copy_(c.z.detach().amax()),
    "kept in an entry": lambda c: c.model.seen.__setitem__(..., c.z.detach().amax()),
    "logits within": lambda c: c.out.update(outputs={"logits": c.z}),
    "later tokens": lambda c: c.out.update(last=c.z[:, 1:].sum()),
    "function of its own": lambda c: c.add(_Sum.apply(c.z)),
}


def _making(more, *, when="after", copied=False):
    """A Llama that does `more` with its logits if asked, before or after its loss, or with a copy of them."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, asked=False, **kwargs):
            z = self.lm_head(self.model(input_ids).last_hidden_state)
            out = {"loss": 0.0}
            if asked and when == "before":
                out["loss"] = z.new_zeros(())
                more(_Call(self, z, labels, out))
            given = 1.0 * z if copied else z
            out["loss"] = out["loss"] + self.loss_function(given, labels, 67, **kwargs)
            if asked and when == "after":
                more(_Call(self, z, labels, out))
            return out | {"logits": z}

    model = tiny()
    model.__class__ = Other
    model.seen = torch.zeros((), dtype=torch.float64)
    return patch_model(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("more", MORE)
def test_whatever_a_call_makes_of_the_logits_is_refused(more, copied, when):
    model = _making(MORE[more], when=when, copied=copied)
    want = model(**batch())["loss"]
    with pytest.raises(
        RuntimeError, match=r"makes more of its logits than its loss.*skip_logits=F"
    ):
        model(**batch(), asked=True)
    assert model.seen == 0
    assert torch.equal(model(**batch())["loss"], want)
    model(**batch(), asked=True, skip_logits=False)


def test_a_term_made_by_transforms_of_torch_func_is_refused_after_the_loss():
    """Which stand-ins do not survive; but their numbers are NaN then."""
    slope = torch.func.grad(lambda z: z.logsumexp(-1).pow(2).mean())
    for term in (slope, torch.func.vmap(lambda z: z.logsumexp(-1))):
        model = _making(lambda c, term=term: c.add(term(c.z).sum()))
        with pytest.raises(RuntimeError, match="its loss depends on them"):
            model(**batch(), asked=True)


def test_whatever_a_call_without_logits_in_eval_mode_makes_of_them_is_refused():
    model = patch_model(_making(MORE["number"]), eval_logits=False).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="makes more of its logits than its"):
        model(**batch(), asked=True)


def test_a_hook_that_reads_what_the_head_returns_is_refused():
    model, seen = patch_model(tiny()), []
    model.lm_head.register_forward_hook(lambda _head, _inputs, z: seen.append(z.amax().item()))
    with pytest.raises(RuntimeError, match=r"or a hook in it, reads them \(item\).*skip_logits=F"):
        model(**batch())
    model(**batch(), skip_logits=False)


def test_a_term_of_copied_logits_in_bfloat16_is_refused():
    coefficients = []

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            z = self.lm_head(self.model(input_ids).last_hidden_state)
            loss = self.loss_function(z.float(), labels, 67, **kwargs)
            for coefficient in coefficients:
                loss = loss + coefficient * z.float().logsumexp(-1).pow(2).mean()
            return {"loss": loss, "logits": z}

    model = tiny(dtype=torch.bfloat16)
    model.__class__ = Other
    patch_model(model)(**batch())
    coefficients.append(1e-4)
    with pytest.raises(RuntimeError, match="its loss depends on them"):
        model(**batch())


def test_what_takes_only_the_shape_of_the_logits_is_served():
    def shape(_, output):
        zeros, z = torch.zeros_like(output.logits), output.logits
        if z.shape[1] == 1:  # the probe has three tokens
            assert repr(z) == "<no logits: call with skip_logits=False to have them>"
        output.loss = output.loss + zeros.sum() + z.new_tensor(0.0) + 0 * z.dim()
        output.loss = output.loss.to(z)

    torch.testing.assert_close(
        patch_model(_llama(shape))(**batch()).loss, dense_loss(tiny(), **batch())
    )


@pytest.mark.parametrize("anomaly", [True, False])
def test_terms_that_come_later_are_served_where_they_are_not_of_the_logits(anomaly):
    asked = []

    def regulariser(self, output):
        for scale in asked:
            output.loss = output.loss + scale * self.lm_head.weight.square().sum()

    plain, patched = _llama(regulariser), patch_model(_llama(regulariser))
    patched(**batch())
    asked.append(0.1)
    want = dense_loss(plain, **batch()) + 0.1 * plain.lm_head.weight.square().sum()
    with torch.autograd.set_detect_anomaly(anomaly):
        assert_same_training(patched, patched(**batch()).loss, plain, want)


def test_a_subclass_that_passes_on_keeps_its_router_loss_under_anomaly_detection():
    class Other(transformers.MixtralForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return super().forward(input_ids, labels=labels, **kwargs)

    plain, patched = tiny("mixtral"), tiny("mixtral")
    patched.__class__ = Other
    with torch.autograd.set_detect_anomaly(True):
        loss = patch_model(patched)(**batch()).loss
        assert_same_training(patched, loss, plain, dense_loss(plain, **batch()))


def test_logits_used_inside_the_forward_name_the_cure():
    seen = []

    def look(_, output):
        if output.logits.shape[1] != 3:  # the probe has three tokens
            seen.append(output.logits[:, 3].argmax(-1))

    model = patch_model(_llama(look))
    with pytest.raises(
        RuntimeError, match=r"failed after its head \(IndexError.* skip_logits=False"
    ):
        model(**batch())
    model(**batch(), skip_logits=False)
    assert seen[0].shape == (2,)


def _detached(output):
    return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, output)


REBUILT = {
    "as it is": lambda output: output,
    "by pytree": lambda output: tree_map(lambda x: x, output),
    "as Accelerate does": lambda output: type(output)(dict(output)),
    "by dataclasses": dataclasses.replace,
    "by copy": lambda output: copy.deepcopy(_detached(output)),
    "by pickle": lambda output: pickle.loads(pickle.dumps(_detached(output))),
}


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits[:, -1],
        lambda logits: logits.argmax(-1),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: logits + 1,
        len,
        list,
    ],
)
@pytest.mark.parametrize("rebuilt", REBUILT)
def test_logits_used_by_the_caller_name_the_cure(use, rebuilt):
    output = REBUILT[rebuilt](patch_model(tiny())(**batch(), use_cache=False))
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        use(output.logits)
    assert "skip_logits=False" in repr(output.logits)
    with pytest.raises(KeyError, match="skip_logits=False"):
        output["logits"]
    assert "logits" not in output
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        use(output.get("logits"))


def test_an_interrupt_leaves_nothing_of_the_logits_on_the_model():
    interrupted = []

    def after(self, output):
        self.kept = output.logits
        if interrupted:
            raise KeyboardInterrupt
        self.kept = None
        return output

    model = patch_model(_llama(after))
    interrupted.append(True)
    with pytest.raises(KeyboardInterrupt):
        model(**batch())
    assert model.kept is None
