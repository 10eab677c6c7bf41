"""The operators: statistics of the logits, and the smoothed cross-entropy made of them."""

from .api import LinearCrossEntropyLoss, linear_cross_entropy, linear_logit_stats
from .statistics import LogitStats, merge

__all__ = [
    "LinearCrossEntropyLoss",
    "LogitStats",
    "linear_cross_entropy",
    "linear_logit_stats",
    "merge",
]
