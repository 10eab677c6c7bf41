"""The operators: statistics of the logits, and the smoothed cross-entropy made of them."""

from .api import LinearCrossEntropyLoss, linear_cross_entropy, linear_logit_stats
from .statistics import LogitStats
from .topk import TopK, linear_topk

__all__ = [
    "LinearCrossEntropyLoss",
    "LogitStats",
    "TopK",
    "linear_cross_entropy",
    "linear_logit_stats",
    "linear_topk",
]
