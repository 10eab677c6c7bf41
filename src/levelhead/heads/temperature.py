"""One temperature for a whole model: fitted on held-out tokens, and put into its checkpoint.

References:
    Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.temperature import best_temperature
from ..integrations.patch.heads import language_model, output_heads
from ..integrations.patch.probe import HeadTransform, probe_head
from ..integrations.patch.state import patch_state
from .final_norm import FinalNorm, final_norm
from .head import Head, HeadInputs

Way = Literal["logit_scale", "head", "final_norm", "generation_config"]

# Fields of configs, tried in this order and kept if the logits are then what they should be.
_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
_SOFTCAP = "final_logit_softcapping"


def fit_temperature(head: Head, inputs: HeadInputs) -> float:
    """The temperature T that makes held-out tokens most likely, over the full vocabulary.

    Minimises mean_i [logsumexp_v(z_iv / T) - z_iy / T], which is convex in beta = 1 / T; z are the
    model's logits, softcap included. Its derivative `mean(sum_v p_v z_v - z_y)` is a difference of two
    statistics of the logits, so that no logits are kept: a dozen products with the head in all, each
    with the small buffer of `levelhead.linear_logit_stats`, and none of the backbone. The root is found
    to 1e-6 in log T, as `levelhead.calibration.fit_temperature` finds it.

    Args:
        head: See `levelhead.heads.head.single_head`.
        inputs: See `levelhead.heads.head.collect`; tokens that the model was not trained on.

    Returns:
        T in (0.01, 100). Above 1 the model was over-confident; dividing its logits by T mends that.

    Raises:
        ValueError: No such T is best: the model gets every token right (T would fall to 0), or does no
            better than one that ignores what it reads (T would rise without end).

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """

    def slope(beta: float) -> float:
        with torch.no_grad():
            stats = head.logit_stats(inputs.hidden, inputs.target, 1 / beta)
        picked = stats.picked - stats.max
        value = float((stats.relative_expected - picked).double().mean())
        # Where every token is certain and right the difference is nothing but rounding.
        rounding = torch.finfo(picked.dtype).eps * float(picked.abs().double().mean())
        return value / beta if abs(value) > rounding else 0.0

    return best_temperature(slope, len(inputs.target), "tokens", tolerance=1e-6)


def apply_temperature(model: nn.Module, temperature: float) -> Way:
    """Divides the logits of a model by a temperature, in place, such that its checkpoint keeps it.

    After `model.save_pretrained(folder)` whoever loads the folder gets softmax(z / T) in place of
    softmax(z), with no code of ours. The first of these ways that the model allows is taken, and all
    but the last are exact up to the rounding of the model's dtype, for every use of its logits:

    - "logit_scale": a scale in the config, as Cohere (`logit_scale`) and Granite (`logits_scaling`) have.
    - "head": weight and bias of a head that is not tied to the embeddings.
    - "final_norm": gain and shift of the norm before a tied head, which divides what reaches the head,
      and with it the last of the model's hidden states.
    - "generation_config": `temperature` in the generation config. It serves sampling by `generate`, and
      servers that take their defaults from it, alone: probabilities from a forward stay what they were.

    The softcap of a model that caps its logits is divided as well, in its config: cap(z) / T is z / T
    capped at c / T. Sampling with a temperature of the generation config divides again by that.

    Args:
        model: A Hugging Face language model, without adapters and not patched.
        temperature: T > 0, as `fit_temperature` finds it.

    Returns:
        The way that was taken.

    Raises:
        ValueError: The temperature is no positive number, or no way is open; the model is as it was.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    inner: Any = language_model(model)
    if patch_state(inner) is not None:
        raise _refusal(inner, "it is patched", "Call unpatch_model first")
    if inner is not model or getattr(inner, "_hf_peft_config_loaded", False):
        raise _refusal(
            inner,
            "it is wrapped or has adapters, whose checkpoint does not hold the head",
            "Merge the adapters (merge_and_unload) and take the model out of its wrappers",
        )
    (head,) = output_heads(inner)
    transform = probe_head(inner)
    want = transform.at_temperature(temperature)
    if _scale_config(inner, want, temperature):
        return "logit_scale"
    # The head, or what reaches it, takes the scale; the config only the softcap.
    capped = replace(want, logit_scale=transform.logit_scale)
    with _set_fields(inner, {} if capped.softcap is None else {_SOFTCAP: capped.softcap}) as keep:
        if _agrees(probe_head(inner), capped):
            if not _is_tied(inner, head):
                keep()
                _divide(head.weight, temperature)
                if head.bias is not None:
                    _divide(head.bias, temperature)
                return "head"
            norm = final_norm(inner)
            if norm is not None and _scale_norm(norm, temperature):
                keep()
                if head.bias is not None:
                    _divide(head.bias, temperature)
                return "final_norm"
    _set_generation(inner, temperature)
    return "generation_config"


def _refusal(model: nn.Module, reason: str, remedy: str) -> ValueError:
    return ValueError(f"apply_temperature cannot serve {type(model).__name__}: {reason}. {remedy}.")


def _scale_config(model: Any, want: HeadTransform, temperature: float) -> bool:
    """Divide the scale in the config, multiplying it where the model divides by it."""
    capped = {} if want.softcap is None else {_SOFTCAP: want.softcap}
    for name in _SCALES:
        values = [vars(config)[name] for config in _configs(model) if _is_number(config, name)]
        for factor in (1 / temperature, temperature) if values else ():
            with _set_fields(model, capped | {name: values[0] * factor}) as keep:
                if _agrees(probe_head(model), want):
                    keep()
                    return True
    return False


def _configs(model: Any) -> tuple[Any, Any]:
    return model.config, model.config.get_text_config()


def _is_number(holder: Any, name: str) -> bool:
    return isinstance(vars(holder).get(name), float | int)


@contextmanager
def _set_fields(model: Any, fields: dict[str, float]) -> Iterator[Callable[[], None]]:
    """Set fields of configs and modules, and set them back but if what it yields is called."""
    holders = (*_configs(model), *model.modules())  # Cohere reads its config when it is made
    before = [(o, name, vars(o)[name]) for name in fields for o in holders if _is_number(o, name)]
    for holder, name, _ in before:
        setattr(holder, name, fields[name])
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        for holder, name, value in before if not kept else ():
            setattr(holder, name, value)


def _agrees(got: HeadTransform, want: HeadTransform) -> bool:
    def close(a: float | None, b: float | None) -> bool:
        return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-5)

    return close(got.logit_scale, want.logit_scale) and close(got.softcap, want.softcap)


def _is_tied(model: nn.Module, head: nn.Linear) -> bool:
    holders = [
        module
        for module in model.modules()
        if any(parameter is head.weight for parameter in module._parameters.values())
    ]
    return len(holders) > 1


def _divide(parameter: Tensor, temperature: float) -> None:
    wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    with torch.no_grad():
        parameter.copy_(wide / temperature)


def _scale_norm(norm: FinalNorm, temperature: float) -> bool:
    """Divide gain and shift of a norm whose gain is its weight, or one plus its weight."""
    weight = norm.module._parameters.get("weight")
    if weight is None or weight.shape != norm.gain.shape:
        return False
    wide = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32))
    for one in (0.0, 1.0):
        if torch.allclose(wide.float() + one, norm.gain, rtol=1e-4, atol=1e-5):
            with torch.no_grad():
                weight.copy_((wide + one) / temperature - one)
            bias = norm.module._parameters.get("bias")
            if bias is not None:
                _divide(bias, temperature)
            return True
    return False


def _set_generation(model: Any, temperature: float) -> None:
    config = getattr(model, "generation_config", None)
    if config is None or config.do_sample is not True:
        raise _refusal(
            model,
            "neither its config, its head nor its final norm can hold a temperature, and its "
            "generation config does not sample, so that a temperature there means nothing",
            "If it is to sample, set model.generation_config.do_sample = True first",
        )
    config.temperature = temperature
