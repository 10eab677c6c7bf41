"""The smoothed cross-entropy of a token in terms of its logit statistics, and its derivative.

With ``q = (1 - eps) onehot(target) + eps / V`` (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567)::

    loss = -sum_v q_v log p_v + z_loss * logsumexp^2
         = logsumexp - (1 - eps) * picked - eps * mean + z_loss * logsumexp^2

``q`` sums to 1, so the three may all be relative to the largest logit, and are: their digits are not spent on an offset
that cancels.

Where the target's probability is almost 1, so is what its logit's gradient loses: ``p_t - 1`` is almost 0, and what a
z-loss adds, ``2 z_loss logsumexp p_t``, is all that is left. It must not be rounded beside the 1. So with a z-loss the
target is picked twice: the gradient of the first pick takes away what that of ``logsumexp`` holds of both, the gradient
of the second gives the z-loss's share back.
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
    again: Tensor | None = None,  # (N,), the second pick: needed by autograd, with a z-loss
) -> Tensor:
    """Return the loss of each token, shape (N,)."""
    z_logsumexp = largest + logsumexp
    if again is not None:  # adds 0
        z_logsumexp = z_logsumexp + (again - picked).nan_to_num()  # NaN where both are -inf
    picked = picked - largest
    if label_smoothing is None or not _is_on(label_smoothing):
        loss = logsumexp - picked
    else:
        if isinstance(label_smoothing, Tensor):
            # The mean is -inf where entries are masked out. Without smoothing it counts for nothing, but 0 * -inf is
            # NaN. Two conditions and no `&`, which DTensors get wrong in inference mode.
            unsmoothed = torch.where(label_smoothing == 0, picked, mean)
            mean = torch.where(mean == -torch.inf, unsmoothed, mean)
        loss = logsumexp - (1 - label_smoothing) * picked - label_smoothing * mean
    return loss + z_loss * z_logsumexp.square() if _is_on(z_loss) else loss


def token_loss_backward(
    token_weight: Tensor,  # (N,), upstream gradient of each token's loss
    largest: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,), relative to the largest logit
    label_smoothing: Tensor | None,  # (N,)
    z_loss: Tensor | float,
) -> StatsGradient:
    """Return the gradients of the statistics that :func:`token_loss` uses, picked of shape (N, 1), or (N, 2)."""
    if label_smoothing is None:
        of_picked, of_mean = -token_weight, None
    else:
        of_picked, of_mean = token_weight * (label_smoothing - 1), -token_weight * label_smoothing
    if not _is_on(z_loss):
        return StatsGradient(token_weight, of_picked[:, None], of_mean, None)
    share = 2 * z_loss * (largest + logsumexp) * token_weight
    of_picks = torch.stack([of_picked - share, share], 1)
    return StatsGradient(token_weight + share, of_picks, of_mean, None)


def picks(target: Tensor, z_loss: Tensor | float) -> Tensor:
    """Return what to pick for targets (N,), (N, 1), or with a z-loss (N, 2)."""
    return target[:, None].expand(-1, 2 if _is_on(z_loss) else 1)


def _is_on(option: Tensor | float) -> bool:
    """Return whether there is a z-loss, or smoothing; a tensor's value is not looked at."""
    return isinstance(option, Tensor) or option != 0
