"""The smoothed cross-entropy of a token in terms of its logit statistics, and its derivative.

With ``q = (1 - eps) onehot(target) + eps / V`` (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567)::

    loss = -sum_v q_v log p_v + z_loss * logsumexp^2
         = logsumexp - (1 - eps) * picked - eps * mean + z_loss * logsumexp^2

``q`` sums to 1, so the three may all be relative to the largest logit, and are: their digits are not spent on an offset
that cancels.
"""

import torch
from torch import Tensor

from .statistics import StatsGradient


def token_loss(
    largest: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,), relative to the largest logit
    picked: Tensor,  # (N,), the target's logit
    mean: Tensor,  # (N,), relative to the largest logit
    label_smoothing: Tensor | float | None,  # (N,), or one for all
    z_loss: Tensor | float,
) -> Tensor:
    """Return the loss of each token, shape (N,)."""
    picked = picked - largest
    if label_smoothing is None:
        loss = logsumexp - picked
    else:
        if isinstance(label_smoothing, Tensor):
            # The mean is -inf where entries are masked out. Without smoothing it counts for nothing, but 0 * -inf is
            # NaN. Two conditions and no `&`, which DTensors get wrong in inference mode.
            unsmoothed = torch.where(label_smoothing == 0, picked, mean)
            mean = torch.where(mean == -torch.inf, unsmoothed, mean)
        loss = logsumexp - (1 - label_smoothing) * picked - label_smoothing * mean
    return loss if _is_nothing(z_loss) else loss + z_loss * (largest + logsumexp).square()


def token_loss_backward(
    token_weight: Tensor,  # (N,), upstream gradient of each token's loss
    largest: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,), relative to the largest logit
    label_smoothing: Tensor | None,  # (N,)
    z_loss: Tensor | float,
) -> StatsGradient:
    """Return the gradients of the statistics that :func:`token_loss` uses, picked of shape (N, 1)."""
    of_logsumexp = token_weight
    if not _is_nothing(z_loss):
        of_logsumexp = token_weight * (1 + 2 * z_loss * (largest + logsumexp))
    if label_smoothing is None:
        return StatsGradient(of_logsumexp, -token_weight[:, None], None, None)
    of_picked = token_weight * (label_smoothing - 1)
    return StatsGradient(of_logsumexp, of_picked[:, None], -token_weight * label_smoothing, None)


def _is_nothing(z_loss: Tensor | float) -> bool:
    """Return whether there is no z-loss; a tensor's value is not looked at."""
    return not isinstance(z_loss, Tensor) and z_loss == 0
