"""What a patched model carries: what the probe has found, and the options of the patch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ...ops.checks import can_look
from .loss_call import Objective
from .options import check_positive
from .probe import HeadTransform, Probed
from .reads import Seen


@dataclass(frozen=True)
class PatchState:
    """What a patched model carries in its `__dict__`: what the probe found, and the options."""

    probed: Probed
    smoothing: float | Tensor
    temperature: float | Tensor
    softcap: float | Tensor | None
    eval_smoothing: float
    eval_logits: bool
    objective: Objective | None = None  # of training, in place of the smoothed cross-entropy
    looks: int = 0  # how often a value that its loss reads has changed
    seen: Seen = field(default_factory=Seen, compare=False)
    # Values of the model that change without effect on its loss, by place and name.
    no_matter: frozenset[tuple[str, str]] = frozenset()

    @property
    def transform(self) -> HeadTransform:
        """Return what the model does with the output of its head."""
        return self.probed.transform

    def training_transform(self) -> HeadTransform:
        """Return the model's own transform followed by temperature and softcap."""
        if isinstance(self.temperature, Tensor) and can_look(self.temperature):
            check_positive("temperature", self.temperature)  # it may have been filled since
        own = self.transform
        if isinstance(self.temperature, Tensor) or self.temperature != 1:
            own = own.at_temperature(self.temperature)
        softcap: Any = self.softcap
        return own if softcap is None else replace(own, softcap=softcap)


def patch_state(model: nn.Module) -> PatchState | None:
    """Return the patch of `model`; None if it has none."""
    return vars(model).get("_levelhead")  # not getattr, which a wrapper would forward


def set_patch_state(model: nn.Module, state: PatchState | None) -> None:
    """Give `model` a patch, or take it away; the classes of the model and its head are another matter."""
    if state is None:
        del vars(model)["_levelhead"]
    else:
        vars(model)["_levelhead"] = state
