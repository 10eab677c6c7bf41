"""Levelhead: language models that know what they don't know, at no extra cost."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from .integrations import (
    check_patch,
    inductor_options,
    patch_info,
    patch_model,
    unpatch_model,
)
from .ops import LinearCrossEntropyLoss, LogitStats, linear_cross_entropy, linear_logit_stats

try:
    __version__ = _version("levelhead")
except _PackageNotFoundError:  # a source tree that is not installed, such as `make gpu` runs from
    __version__ = "unknown"
__all__ = [
    "LinearCrossEntropyLoss",
    "LogitStats",
    "check_patch",
    "inductor_options",
    "linear_cross_entropy",
    "linear_logit_stats",
    "patch_info",
    "patch_model",
    "unpatch_model",
]
