"""`patch_model`, the pass of `torch.compile`, and a thin file per framework, imported when it is used."""

from .inductor import inductor_options
from .patch.api import (
    PatchInfo,
    patch_info,
    patch_model,
    set_objective,
    unpatch_model,
)
from .patch.check import PatchCheck, check_patch

__all__ = [
    "PatchCheck",
    "PatchInfo",
    "check_patch",
    "inductor_options",
    "patch_info",
    "patch_model",
    "set_objective",
    "unpatch_model",
]
