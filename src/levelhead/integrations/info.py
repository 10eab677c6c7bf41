"""What `patch_model` has made of a model, to be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .heads import language_model, path_of_head
from .patched import check_call, patch_state


@dataclass(frozen=True)
class PatchInfo:
    """The options of a patch and what it found in the model; `str()` of it says both.

    Attributes:
        model: the class of the patched language model.
        head: where its output head is, within it.
        smoothing: of `patch_model`, a number or a float32 Tensor of shape (), as the next two.
        temperature: of training, a number or a float32 Tensor of shape ().
        softcap: of training, a number, a float32 Tensor of shape (), or None.
        eval_smoothing: of calls in eval mode without gradients.
        eval_logits: whether those give logits.
        objective: what `set_objective` trains on in place of the smoothed cross-entropy, or None.
        training: whether the language model itself is in training mode, whatever its wrappers say.
        logit_scale: found in the model: the factor on the output of its head.
        own_softcap: found in the model: the cap of its logits, or None.
        vocab_size: found in the model: how many entries of its head reach its loss; None: all.
        shift: found in the model: whether it shifts its labels.
        own_loss: found in the model: whether it computes its loss, in nats, without `loss_function`.
    """

    model: str
    head: str
    smoothing: float | Tensor
    temperature: float | Tensor
    softcap: float | Tensor | None
    eval_smoothing: float
    eval_logits: bool
    objective: Any
    training: bool
    logit_scale: float
    own_softcap: float | None
    vocab_size: int | None
    shift: bool
    own_loss: bool

    def __str__(self) -> str:
        loss = "a smoothed cross-entropy" if self.objective is None else f"{self.objective!r}"
        mode = "training" if self.training else "eval"
        vocabulary = "all" if self.vocab_size is None else f"the first {self.vocab_size}"
        return (
            f"patch_model: {self.model} trains on {loss}, computed at {self.head}. It is in {mode} mode.\n"
            f"  training    smoothing={self.smoothing}, temperature={self.temperature}, "
            f"softcap={self.softcap}\n"
            f"  evaluation  smoothing={self.eval_smoothing}, logits={self.eval_logits}\n"
            f"  the model   logit_scale={self.logit_scale:g}, softcap={self.own_softcap}, "
            f"{vocabulary} of its entries, labels {'' if self.shift else 'not '}shifted, loss of "
            f"{'its own' if self.own_loss else 'transformers'}"
        )


def patch_info(model: nn.Module) -> PatchInfo | None:
    """What `patch_model` has made of `model`.

    Args:
        model: a language model, or a wrapper around one.

    Returns:
        The options of the patch and what it found in the model; None if the model is not patched.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no language model in `model`.
        RuntimeError: the patched model would refuse a call, since it was changed after the patch.

    Example:
        >>> print(patch_info(patch_model(model, smoothing=0.1)))
        patch_model: LlamaForCausalLM trains on a smoothed cross-entropy, computed at lm_head. ...
    """
    inner = language_model(model)
    state = patch_state(inner)
    if state is None:
        return None
    found = check_call(inner, state, {}).transform
    return PatchInfo(
        model=type(inner).__name__,
        head=path_of_head(inner),
        smoothing=state.smoothing,
        temperature=state.temperature,
        softcap=state.softcap,
        eval_smoothing=state.eval_smoothing,
        eval_logits=state.eval_logits,
        objective=state.objective,
        training=inner.training,
        logit_scale=found.logit_scale,
        own_softcap=found.softcap,
        vocab_size=found.vocab_size,
        shift=found.shift,
        own_loss=found.own_loss,
    )
