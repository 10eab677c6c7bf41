"""What the margin of one logit, or the norm of all of them, says of their softmax.

References:
    Zhai et al. Stabilizing transformer training by preventing attention entropy collapse. ICML 2023,
    https://arxiv.org/abs/2303.06296, for the bound on the entropy.
"""

import math


def margin_in_ball(radius: float, vocab_size: int) -> float:
    """The largest margin of a logit over the mean of the others, if their norm, less their mean, is `radius`."""
    return radius * math.sqrt(vocab_size / (vocab_size - 1))


def max_probability(margin: float, vocab_size: int) -> float:
    """The largest probability of an entry with this margin over the mean of the others' logits.

    `1 / (1 + (V - 1) exp(-margin))`, reached if the other logits are equal. Without a bias and within
    a ball of radius rho, the margin is `rho * sqrt(V / (V - 1))`; under a softcap c it is 2 c at most.
    """
    return 1 / (1 + (vocab_size - 1) * math.exp(-margin))


def min_entropy(radius: float, vocab_size: int) -> float:
    """The least entropy, in nats, of the softmax of V logits whose norm, less their mean, is `radius`.

    With kappa = radius * sqrt(V / (V - 1)) and B = exp(-kappa):
    `log(1 + (V - 1) B) + kappa (V - 1) B / (1 + (V - 1) B)`, reached by one logit above V - 1 equal ones.
    """
    margin = margin_in_ball(radius, vocab_size)
    rest = (vocab_size - 1) * math.exp(-margin)
    return math.log1p(rest) + margin * rest / (1 + rest)
