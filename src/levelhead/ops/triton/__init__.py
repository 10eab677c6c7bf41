"""Triton implementation: logits on the chip, or in a bounded buffer where that is faster; sums with one owner each.

| stage | kernel | operations | beyond its operands it moves |
|---|---|---|---|
| statistics | ``forward.state_kernel`` | 2 NVD | a few numbers a token |
| any gradient | ``backward.gradient_kernel``, two products of the library | 6 NVD | 6 bytes a logit |
| loss with its gradient | a product, ``softmax.softmax_kernel``, two products | 6 NVD | 14 bytes a logit |

NVD is one multiply-add per token, vocabulary entry and hidden unit. float16, bfloat16, float32 and float64; sums are
float32, or float64. Nothing is added to by two programs: results repeat bit for bit on one device.
"""

from .backward import linear_logit_stats_backward
from .forward import linear_logit_stats
from .softmax import linear_cross_entropy

__all__ = ["linear_cross_entropy", "linear_logit_stats", "linear_logit_stats_backward"]
