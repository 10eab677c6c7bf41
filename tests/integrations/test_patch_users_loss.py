"""A loss of the user's own is served where it is a cross-entropy, as long as what it reads stays as it is."""

import functools
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import (
    VOCAB_SIZE,
    assert_same_training,
    batch,
    dense_loss,
    tiny,
    transformers,
)
from torch import nn
from transformers import TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from levelhead.integrations import patch_model
from levelhead.integrations.patch.probe import probe

Llama = transformers.LlamaForCausalLM
SCHEDULE = {"z": 0.0}


def _llama(forward, vocab_size=VOCAB_SIZE, **attributes):
    model = tiny(vocab_size=vocab_size)
    model.__class__ = type("OtherForCausalLM", (Llama,), {"forward": forward})
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def _computing(loss, vocab_size=VOCAB_SIZE, **attributes):
    """A Llama that computes `loss(self, logits, labels)` in its forward, of logits (N, V) and labels (N,)."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = Llama.forward(self, input_ids, **kwargs)
        if labels is not None:
            z = output.logits[:, :-1]
            output.loss = loss(self, z.flatten(0, 1), labels[:, 1:].flatten())
        return output

    return _llama(forward, vocab_size, **attributes)


def _with_loss_function(loss, vocab_size=VOCAB_SIZE):
    """A Llama with a loss function that makes its loss in the same way."""

    def function(logits, labels, num_items_in_batch=None, **_):
        got = loss(None, logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if num_items_in_batch is not None:
            got = got * (labels[:, 1:] != -100).sum() / num_items_in_batch
        return got

    model = tiny(vocab_size=vocab_size)
    model.loss_function = function
    return model


BOTH = pytest.mark.parametrize("made", [_computing, _with_loss_function])


def _plain(_, z, y):
    return F.cross_entropy(z, y)


def _mean_of_means(_, z, y):
    loss, count = F.cross_entropy(z, y, reduction="none").view(2, -1), (y != -100).view(2, -1)
    return (loss.sum(1) / count.sum(1)).mean()


def _of_each(change):
    def loss(_, z, y):
        return change(F.cross_entropy(z, y, reduction="none")).sum() / (y != -100).sum()

    return loss


def _with_half_the_gradient(_, z, y):
    loss = F.cross_entropy(z, y)
    return (loss + loss.detach()) / 2


def _without_the_gradient_of_sure_tokens(_, z, y):
    sure = (z.softmax(-1).amax(-1, keepdim=True) > 0.9).to(z.dtype)
    return F.cross_entropy(sure * z.detach() + (1 - sure) * z, y)


@BOTH
@pytest.mark.parametrize("vocab_size", [66, 67, 68, 100, 257])
def test_a_mean_over_sequences_is_refused_at_every_size(made, vocab_size):
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        patch_model(made(_mean_of_means, vocab_size=vocab_size))


@BOTH
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda _, z, y: F.cross_entropy(z.clamp(-30, 30), y), "where the cross-entropy is"),
        (lambda _, z, y: F.cross_entropy(z.clamp(min=-50), y), "where the cross-entropy is"),
        (_of_each(lambda loss: loss.clamp(max=10)), "where the cross-entropy is"),
        (_of_each(lambda loss: loss.where(loss < 12, 0)), "where the cross-entropy is"),
        (_of_each(lambda loss: loss.where(loss > 0.1, 0)), "where the cross-entropy is"),
        (
            lambda _, z, y: (F.cross_entropy(z, y) - 0.05).abs() + 0.05,
            "where the cross-entropy is",
        ),
        (_with_half_the_gradient, "the gradient of its loss is not that of a cross-entropy"),
        (_without_the_gradient_of_sure_tokens, "the gradient of its loss is not that of"),
    ],
)
def test_what_is_a_cross_entropy_of_usual_logits_alone_is_refused(made, loss, reason):
    with pytest.raises(ValueError, match=reason):
        patch_model(made(loss))


def test_a_parameter_that_acts_on_the_loss_is_refused_before_it_does():
    def loss(self, z, y):
        return F.cross_entropy(z, y) * self.log_scale.exp()

    for trainable in (True, False):
        scale = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=trainable)
        with pytest.raises(ValueError, match="a trainable parameter acts on its loss"):
            patch_model(_computing(loss, log_scale=scale))


class _Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(VOCAB_SIZE, dtype=torch.float64))

    def forward(self, z, y):
        return F.cross_entropy(z, y, self.weight)


def _by_criterion(self, z, y):
    return self.criterion(z, y)


def _by_weights(self, z, y):
    return F.cross_entropy(z, y, self.class_weights)


def _penalised(find):
    def loss(self, z, y):
        coefficient = find(self)
        penalty = coefficient * z.logsumexp(-1).square().mean() if coefficient else 0.0
        return F.cross_entropy(z, y) + penalty

    return loss


_WEIGHT = torch.linspace(0, 3, VOCAB_SIZE, dtype=torch.float64)


class _Options:
    z = 0.0


class _Slotted:
    __slots__ = ("z",)

    def __init__(self):
        self.z = 0.0


CHANGES = {
    "a criterion smooths": (
        _by_criterion,
        {"criterion": nn.CrossEntropyLoss},
        lambda model: setattr(model.criterion, "label_smoothing", 0.5),
    ),
    "a criterion is weighted": (
        _by_criterion,
        {"criterion": nn.CrossEntropyLoss},
        lambda model: setattr(model.criterion, "weight", _WEIGHT),
    ),
    "a criterion is replaced": (
        _by_criterion,
        {"criterion": nn.CrossEntropyLoss},
        lambda model: setattr(model, "criterion", nn.CrossEntropyLoss(_WEIGHT)),
    ),
    "a buffer of a criterion is filled": (
        _by_criterion,
        {"criterion": _Weighted},
        lambda model: model.criterion.weight.copy_(_WEIGHT),
    ),
    "a buffer of the model is loaded": (
        _by_weights,
        {"class_weights": lambda: nn.Buffer(torch.ones(VOCAB_SIZE, dtype=torch.float64))},
        lambda model: model.load_state_dict(
            {k: v.clone() for k, v in model.state_dict().items()} | {"class_weights": _WEIGHT}
        ),
    ),
    "a number of the model": (
        _penalised(lambda self: self.z),
        {"z": float},
        lambda model: setattr(model, "z", 0.1),
    ),
    "a number that was not there": (
        _penalised(lambda self: getattr(self, "z", 0.0)),
        {},
        lambda model: setattr(model, "z", 0.1),
    ),
    "a dictionary": (
        _penalised(lambda self: self.options["z"]),
        {"options": lambda: {"z": 0.0}},
        lambda model: model.options.update(z=0.1),
    ),
    "a dictionary in a list": (
        _penalised(lambda self: self.options[0]["z"]),
        {"options": lambda: [{"z": 0.0}]},
        lambda model: model.options[0].update(z=0.1),
    ),
    "a namespace": (
        _penalised(lambda self: self.options.z),
        {"options": lambda: SimpleNamespace(z=0.0)},
        lambda model: setattr(model.options, "z", 0.1),
    ),
    "an object": (
        _penalised(lambda self: self.options.z),
        {"options": _Options},
        lambda model: setattr(model.options, "z", 0.1),
    ),
    "an object with slots": (
        _penalised(lambda self: self.options.z),
        {"options": _Slotted},
        lambda model: setattr(model.options, "z", 0.1),
    ),
    "a global": (
        _penalised(lambda _: SCHEDULE["z"]),
        {},
        lambda _: SCHEDULE.update(z=0.1),
    ),
    "a function": (
        _penalised(lambda self: self.penalty()),
        {"penalty": lambda: lambda: 0.0},
        lambda model: setattr(model, "penalty", lambda: 0.1),
    ),
    "a class": (
        _penalised(lambda self: type(self).z),
        {},
        lambda model: setattr(type(model)._levelhead_original, "z", 0.1),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_loss_in_the_forward_reads_is_looked_at_in_each_call(change):
    loss, attributes, changed = CHANGES[change]
    model = _computing(loss)
    type(model).z = 0.0
    for name, make in attributes.items():
        setattr(model, name, make())
    patch_model(model)
    torch.testing.assert_close(model(**batch()).loss, dense_loss(tiny(), **batch()))
    try:
        changed(model)
        with pytest.raises(ValueError, match="where the cross-entropy is"):
            model(**batch())
    finally:
        SCHEDULE["z"] = 0.0


def test_what_the_config_holds_is_looked_at_in_each_call():
    model = _computing(_penalised(lambda self: self.config.weights["z"]))
    model.config.weights = {"z": 0.0}
    patch_model(model)(**batch())
    model.config.weights["z"] = 0.1
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        model(**batch())


class _Loss:
    def __init__(self):
        self.z, self.criterion, self.calls = 0.0, nn.CrossEntropyLoss(reduction="sum"), 0

    def __call__(self, logits, labels, num_items_in_batch=None, **_):
        z, y = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        items = (y != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = self.criterion(z, y) / items
        return loss + self.z * z.logsumexp(-1).square().mean() if self.z else loss


class _Counting(_Loss):
    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def _closure(loss):
    def function(**kwargs):
        return loss(**kwargs)

    return function


def _by_default(loss):
    def function(logits, labels, num_items_in_batch=None, using=loss, **_):
        return using(logits, labels, num_items_in_batch)

    return function


def _raise(loss):
    loss.z = 0.1


def _smooth(loss):
    loss.criterion.label_smoothing = 0.1


@pytest.mark.parametrize("change", [_raise, _smooth])
@pytest.mark.parametrize(
    "function",
    [
        lambda loss: loss,
        lambda loss: loss.__call__,
        lambda loss: functools.partial(_Loss.__call__, loss),
        _closure,
        _by_default,
    ],
)
def test_what_a_loss_function_reads_is_looked_at_in_each_call(function, change):
    loss, model = _Loss(), tiny()
    model.loss_function = function(loss)
    patch_model(model)
    torch.testing.assert_close(model(**batch()).loss, dense_loss(tiny(), **batch()))
    change(loss)
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        model(**batch())


def test_a_loss_function_that_counts_its_calls_is_refused():
    model = tiny()
    model.loss_function = _Counting()
    with pytest.raises(ValueError, match="the code of its loss changes what it reads"):
        patch_model(model)


def test_a_penalty_that_comes_in_a_later_step_is_refused_then():
    model = patch_model(_computing(_penalised(lambda self: 0.1 * (self.step > 3)), step=0))
    for step in range(4):
        model.step = step
        model(**batch())
    model.step = 4
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        model(**batch())


def test_what_a_call_leaves_on_a_module_for_a_loss_of_the_models_own_is_refused():
    def loss(self, z, y):
        return F.cross_entropy(z, y) + sum(layer.mlp.router for layer in self.model.layers)

    def beside(self, z, y):
        return F.cross_entropy(z, y) + getattr(self.model, "router", 0.0)

    model = _computing(loss)
    for layer in model.model.layers:
        layer.mlp.router = 0.0
    with pytest.raises(ValueError, match=r"reads model\.layers\.0\.mlp\.router for that"):
        patch_model(model)
    with pytest.raises(ValueError, match=r"reads model\.router for that.* self\.loss_function"):
        patch_model(_computing(beside))


@pytest.mark.parametrize("kept", ["last", "log"])
def test_a_loss_of_the_models_own_that_is_kept_is_refused(kept):
    def loss(self, z, y):
        got = F.cross_entropy(z, y)
        if kept == "last":
            self.last = got.item()
        else:
            self.log["loss"].append(got.item())
        return got

    model = _computing(loss, last=None, log={"loss": []})
    with pytest.raises(ValueError, match=f"with labels it also changes its {kept}, which"):
        patch_model(model)
    assert model.log == {"loss": []}


def test_what_wraps_a_function_of_transformers_is_code_of_the_users():
    @functools.wraps(ForCausalLMLoss)
    def loss(logits, labels, vocab_size, num_items_in_batch=None, token_weight=None, **kwargs):
        got = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **kwargs)
        return got if token_weight is None else got * token_weight.mean()

    @functools.wraps(Llama.forward)
    def forward(self, input_ids=None, labels=None, token_weight=None, **kwargs):
        output = Llama.forward(self, input_ids, **kwargs)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:])
            if token_weight is not None:
                output.loss = output.loss * token_weight.mean()
        return output

    model = tiny()
    model.loss_function = loss
    for patched in (patch_model(model), patch_model(_llama(forward))):
        torch.testing.assert_close(patched(**batch()).loss, dense_loss(tiny(), **batch()))
        with pytest.raises(RuntimeError, match=r"token_weight,? .*may change"):
            patched(**batch(), token_weight=torch.ones(2, 9))


@pytest.mark.parametrize("decorator", [transformers.utils.can_return_tuple, torch.enable_grad()])
def test_what_is_decorated_by_transformers_or_torch_is_still_the_users(decorator):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = Llama.forward(self, input_ids, **kwargs)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:]) + self.z
        return output

    model = patch_model(_llama(decorator(forward), z=0.0))
    assert probe(model).reads == {"self.z": 0.0}
    model.z = 1.0
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        model(**batch())


def test_code_that_hands_everything_on_reads_nothing_that_may_change():
    def forward(self, *args, **kwargs):
        return Llama.forward(self, *args, **kwargs)

    assert probe(_llama(forward)).reads is None  # the loss function is transformers' own
    assert probe(_computing(_plain)).reads == {}


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _compiled(model):
    model.config.use_cache = False
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_a_loss_may_read_numbers_of_the_model_and_nothing_else():
    plain = tiny()
    for loss in (_plain, _penalised(lambda self: self.z)):
        model = patch_model(_computing(loss, z=0.0))
        compiled = _compiled(model)
        found = compiled(**batch()).loss
        assert_same_training(model, found, plain, dense_loss(plain, **batch()))
    model.z = 0.1
    with pytest.raises(Exception, match="nothing tells whether z, which it can read, has changed"):
        compiled(**batch())
    model = patch_model(_computing(_by_criterion, criterion=nn.CrossEntropyLoss()))
    with pytest.raises(Exception, match=r"nothing tells whether self\.criterion\."):
        _compiled(model)(**batch())


@pytest.mark.usefixtures("_fresh_compiler")
def test_where_the_compiler_gives_up_a_change_is_looked_at():
    model = patch_model(_computing(_penalised(lambda self: self.z), z=0.0))
    model.config.use_cache = False
    compiled = torch.compile(model, backend="eager")
    compiled(**batch())
    model.z = 0.1
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        compiled(**batch())


@pytest.mark.parametrize("count", [1, 7])
def test_a_default_for_the_number_of_items_counts(count):
    model = tiny()
    model.loss_function = functools.partial(ForCausalLMLoss, num_items_in_batch=count)
    with pytest.raises(ValueError, match="where the cross-entropy is"):
        patch_model(model)


def _set_backbone(model):
    model.model.doubled = True


def _set_dictionary(model):
    model.schedule["factor"] = 2.0


def _set_array(model):
    model.factors[0] = 2.0


def _set_arguments(model):
    model.arguments.learning_rate = 2.0


@pytest.mark.parametrize("change", [_set_backbone, _set_dictionary, _set_array, _set_arguments])
def test_what_its_code_reads_in_other_places_is_looked_at(change):
    def loss(self, z, y):
        factor = self.schedule["factor"] * self.factors[0] * self.arguments.learning_rate
        return (2.0 if self.model.doubled else 1.0) * float(factor) * F.cross_entropy(z, y)

    model = _computing(
        loss,
        schedule=UserDict(factor=1.0),
        factors=np.ones(3),
        arguments=TrainingArguments("folder", learning_rate=1.0),
    )
    model.model.doubled = False
    patch_model(model)(**batch())
    change(model)
    with pytest.raises(ValueError, match="its loss is"):
        model(**batch())


def test_what_changes_in_every_call_is_warned_of():
    def loss(self, z, y):
        return F.cross_entropy(z, y) + 0 * self.calls

    model = patch_model(_computing(loss, calls=0))

    def train(steps):
        for _ in range(steps):
            model.calls += 1
            model(**batch())

    train(4)
    with pytest.warns(UserWarning, match=r"looked at anew 5 times.*self.calls"):
        train(1)


def test_a_class_of_arrays_that_its_code_names_is_no_array():
    ndarray = np.ndarray

    def loss(_, z, y):
        return F.cross_entropy(z, y) if not isinstance(z, ndarray) else None

    torch.testing.assert_close(
        patch_model(_computing(loss), 0.0)(**batch()).loss,
        dense_loss(tiny(), smoothing=0.0, **batch()),
    )
