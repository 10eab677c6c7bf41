"""One thin file per framework; none of them imports its framework before it is used."""

from .check import PatchCheck, check_patch
from .inductor import inductor_options
from .info import PatchInfo, patch_info
from .objective import set_objective
from .patch import patch_model, unpatch_model

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
