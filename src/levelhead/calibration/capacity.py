"""Whether an output head can become over-confident at all: what its weights allow, and what smoothing asks.

Cross-entropy with smoothed labels is least at one finite margin of the target's logit over the others.
A head whose logits cannot spread that far is never more confident than the smoothed target, so that
smoothing has nothing to hold back: the reason that Huang et al. give for its loss of effect in models
with a large vocabulary and small hidden states.

Two bounds say how far they can spread. The margin of entry y over the mean of the others is, for logits
`z = W h + b` (V entries),

    z_y - mean of the others = V / (V - 1) * ((W_y - mean row) . h + b_y - mean b)
                            <= V / (V - 1) * (||W_y - mean row|| ||h|| + b_y - mean b)              (rows)

and the logits less their mean lie in a ball, whatever the bias (triangle inequality),

    ||z - mean z|| <= rho = sigma_max(W - mean row) ||h|| + ||b - mean b||,                        (ball)

in which no margin exceeds `rho * sqrt(V / (V - 1))`. By Jensen's inequality an entry with margin g has
at most the probability `1 / (1 + (V - 1) exp(-g))`. Without a bias (rows) is never the weaker bound, as
`||W_y - mean row|| <= sqrt((V - 1) / V) sigma_max`; (ball) bounds the entropy too. Softmax does not see
what all logits share, so the mean row, often the largest part of a head, does not count.

References:
    Huang et al. Calibrated language models and how to find them with label smoothing. ICML 2025,
    https://arxiv.org/abs/2508.00264.
    Zhai et al. Stabilizing transformer training by preventing attention entropy collapse. ICML 2023,
    https://arxiv.org/abs/2303.06296, for the bound on the entropy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .predictions import as_number, check_dense

_CHUNK = 2**24  # entries of the head that are copied at a time: 64 MiB in float32


@dataclass(frozen=True)
class Capacity:
    """How confident a head can be on hidden states up to a given norm, and whether smoothing will act.

    All of it holds for the weights as they are; training changes them.

    Attributes:
        vocab_size: V.
        hidden_norm: The norm of the hidden states that was asked for. If it is the largest in a sample,
            what follows is proven for hidden states up to that norm, not for those of other inputs.
        radius: rho, the largest norm of the logits less their mean, before the softcap.
        margin: Bound on the margin of a logit over the mean of the others, in nats, softcap included.
        max_probability: Bound on the probability of an entry.
        min_entropy: Bound on the entropy, in nats.
        smoothed_margin: The margin of the target at which the smoothed loss is least, in nats:
            `log(V (1 - eps) / eps + 1)` for label_smoothing = eps; inf for 0, 0 for 1.
        loss_floor: The least smoothed loss of a token, in nats: the entropy of `(1 - eps) onehot + eps / V`.
        required_norm: The least norm of a hidden state with which the bounds allow that margin; inf if
            no norm does.
    """

    vocab_size: int
    hidden_norm: float
    radius: float
    margin: float
    max_probability: float
    min_entropy: float
    smoothed_margin: float
    loss_floor: float
    required_norm: float

    @property
    def reachable(self) -> bool:
        """Whether the bounds allow the optimum of the smoothed loss.

        False is a proof: no hidden state up to this norm makes the head as confident as the smoothed
        target. True is none: weights and hidden states may point elsewhere.
        """
        return self.margin >= self.smoothed_margin

    @property
    def max_temperature(self) -> float:
        """The largest T by which the logits may be divided (after the softcap) with it still reachable."""
        return self.margin / self.smoothed_margin if self.smoothed_margin else math.inf


def head_capacity(
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    hidden_norm: float,
    gain: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.1,
) -> Capacity:
    """Return whether the logits `cap(logit_scale * (W h + b))` can become over-confident, for ||h|| <= hidden_norm.

    A softcap leaves the order of the logits and brings every two of them closer, so that probability and
    entropy without it are bounds with it; its own, a margin of 2 c, is taken where that is tighter.

    The singular values come from the D x D matrix of inner products between columns, so that neither a
    copy of the head nor anything V x V is made: 64 MiB at a time, and 12 D^2 bytes (192 MiB for D = 4096).

    Precision: products in float32, or float64 for a float64 head; singular values are right to about 1e-5.

    Args:
        linear_weight: The head W, (V, D), V >= 2, of any floating dtype on any device.
        linear_bias: b, (V,).
        hidden_norm: Largest norm of the hidden states, finite, at least 0.
        gain: Factor on each hidden unit, (D,): measures `W * gain` without making it. With the weight
            of a final norm, whose output before the gain has norm sqrt(D) at most, this bounds the
            logits of every input more tightly than `max|gain| * sqrt(D)` does for W itself.
        logit_scale: Factor on the output of the head; 1 / T for a temperature T before the softcap. One
            after it is 1 / T on both, the scale and the softcap.
        softcap: c of cap(x) = c tanh(x / c); None: no cap.
        label_smoothing: Of the training loss, in [0, 1].

    Returns:
        The bounds, and what smoothing asks.

    Raises:
        TypeError: What is given is no dense tensor that holds values, or not of a floating dtype; an
            option is no number.
        ValueError: Shapes do not fit, a value is NaN or infinite, or an option lies outside its range.

    References:
        Huang et al. 2025, https://arxiv.org/abs/2508.00264.

    Example:
        >>> import torch
        >>> capacity = head_capacity(torch.eye(1000), hidden_norm=6.0)
        >>> capacity.reachable, round(capacity.margin, 2), round(capacity.smoothed_margin, 2)
        (False, 6.0, 9.11)
    """
    return head_geometry(linear_weight, linear_bias, gain=gain).capacity(
        hidden_norm, logit_scale=logit_scale, softcap=softcap, label_smoothing=label_smoothing
    )


@dataclass(frozen=True, eq=False)
class HeadGeometry:
    """What bounds the spread of the logits `W h + b` over all hidden states h of a given norm.

    Attributes:
        vocab_size: V, the number of entries.
        spectral_norm: Largest singular value of W, as the papers have it.
        centred_spectral_norm: The same of W less its mean row.
        row_norm: Norm of each row of W less the mean row, (V,) float64.
        row_bias: b less its mean, (V,) float64; zeros without a bias.
    """

    vocab_size: int
    spectral_norm: float
    centred_spectral_norm: float
    row_norm: Tensor
    row_bias: Tensor

    def capacity(
        self,
        hidden_norm: float,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        label_smoothing: float = 0.1,
    ) -> Capacity:
        """Return `head_capacity` of the head that was measured."""
        logit_scale = _positive("logit_scale", logit_scale)
        softcap = None if softcap is None else _positive("softcap", softcap)
        hidden_norm = as_number("hidden_norm", hidden_norm)
        if not 0 <= hidden_norm < math.inf:
            raise ValueError(f"hidden_norm must be a finite number from 0 on, got {hidden_norm}")
        target = smoothed_margin(self.vocab_size, label_smoothing)
        radius = logit_scale * self.radius(hidden_norm)
        margin = logit_scale * self.margin(hidden_norm)
        reach = math.inf  # of a margin under the softcap
        if softcap is not None:
            reach = 2 * softcap
            margin = min(margin, reach)
        probability = max_probability(margin, self.vocab_size)
        return Capacity(
            vocab_size=self.vocab_size,
            hidden_norm=hidden_norm,
            radius=radius,
            margin=margin,
            max_probability=probability,
            # No entropy is less than minus the logarithm of the largest probability.
            min_entropy=max(min_entropy(radius, self.vocab_size), -math.log(probability)),
            smoothed_margin=target,
            loss_floor=smoothed_loss_floor(self.vocab_size, label_smoothing),
            required_norm=math.inf if target > reach else self.required_norm(target / logit_scale),
        )

    def radius(self, hidden_norm: float) -> float:
        """Return the bound (ball) on the norm of the logits less their mean."""
        return self.centred_spectral_norm * hidden_norm + float(self.row_bias.norm())

    def margin(self, hidden_norm: float) -> float:
        """Return the tighter of the bounds (rows) and (ball) on the margin of a logit."""
        rows = float((self.row_norm * hidden_norm + self.row_bias).max())
        rows *= self.vocab_size / (self.vocab_size - 1)
        return min(rows, _margin_in_ball(self.radius(hidden_norm), self.vocab_size))

    def required_norm(self, margin: float) -> float:
        """Return the least norm of a hidden state with which both bounds allow a margin, or inf."""
        share = (self.vocab_size - 1) / self.vocab_size
        rows = margin * share - self.row_bias
        by_rows = torch.where(rows > 0, rows / self.row_norm, 0.0).min().item()
        ball = torch.tensor(margin * math.sqrt(share)).double() - self.row_bias.norm()
        in_ball = torch.where(ball > 0, ball / self.centred_spectral_norm, 0.0).item()
        return max(by_rows, in_ball)


def head_geometry(
    linear_weight: Tensor, linear_bias: Tensor | None = None, *, gain: Tensor | None = None
) -> HeadGeometry:
    """Measure a head, for bounds at several norms; arguments and errors are those of `head_capacity`."""
    _check_head(linear_weight, linear_bias, gain)
    vocab_size, width = linear_weight.shape
    weight = linear_weight.detach()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gain = torch.ones(width) if gain is None else gain
    gain = gain.detach().to(weight.device, dtype)
    chunks = torch.split(weight, max(1, _CHUNK // width))
    mean = sum(chunk.to(dtype).sum(0) for chunk in chunks) / vocab_size
    gram = torch.zeros(width, width, dtype=dtype, device=weight.device)
    norms = []
    for chunk in chunks:
        rows = (chunk.to(dtype) - mean) * gain
        gram.addmm_(rows.T, rows)
        norms.append(rows.norm(dim=1).double().cpu())
    centred, mean = gram.double().cpu(), (mean * gain).double().cpu()
    if not centred.isfinite().all():
        raise ValueError(
            "the head holds NaN or infinity, for which no bound holds, or overflows; check the "
            "checkpoint, or pass float64"
        )
    bias = torch.zeros(vocab_size) if linear_bias is None else linear_bias.detach()
    bias = bias.double().cpu()
    return HeadGeometry(
        vocab_size=vocab_size,
        spectral_norm=_root_of_largest(centred + vocab_size * mean.outer(mean)),
        centred_spectral_norm=_root_of_largest(centred),
        row_norm=torch.cat(norms),
        row_bias=bias - bias.mean(),
    )


def smoothed_margin(vocab_size: int, label_smoothing: float) -> float:
    """Return the margin of the target's logit at which the smoothed loss is least, in nats."""
    label_smoothing = _check_smoothing(label_smoothing)
    if label_smoothing == 0:
        return math.inf
    return math.log1p(vocab_size * (1 - label_smoothing) / label_smoothing)


def smoothed_loss_floor(vocab_size: int, label_smoothing: float) -> float:
    """Return the least smoothed loss of a token, the entropy of its target, in nats."""
    label_smoothing = _check_smoothing(label_smoothing)
    share = label_smoothing / vocab_size
    top = 1 - label_smoothing + share
    rest = -(vocab_size - 1) * share * math.log(share) if share else 0.0
    return rest - top * math.log(top)


def max_probability(margin: float, vocab_size: int) -> float:
    """Return the largest probability of an entry with this margin: the other logits are equal."""
    return 1 / (1 + (vocab_size - 1) * math.exp(-margin))


def min_entropy(radius: float, vocab_size: int) -> float:
    """Return the least entropy, in nats, of the softmax of V logits whose norm, less their mean, is `radius`.

    With kappa = radius * sqrt(V / (V - 1)) and B = exp(-kappa):
    `log(1 + (V - 1) B) + kappa (V - 1) B / (1 + (V - 1) B)`, reached by one logit above V - 1 equal ones.
    """
    margin = _margin_in_ball(radius, vocab_size)
    rest = (vocab_size - 1) * math.exp(-margin)
    return math.log1p(rest) + margin * rest / (1 + rest)


def _margin_in_ball(radius: float, vocab_size: int) -> float:
    return radius * math.sqrt(vocab_size / (vocab_size - 1))


@dataclass(frozen=True)
class HiddenNorms:
    """Norms of a sample of hidden states.

    Attributes:
        count: How many there are.
        mean: Their mean.
        quantiles: By share of the sample below: 0.05, 0.5 (the median), 0.95 and 0.99, each one a norm
            of the sample.
        max: The largest. Other inputs may have larger ones.
    """

    count: int
    mean: float
    quantiles: dict[float, float]
    max: float


def hidden_norms(norms: Tensor) -> HiddenNorms:
    """Return count, mean, quantiles and maximum of norms of any shape; refuse what are none."""
    check_dense("norms", norms)
    if norms.is_complex():
        raise TypeError(f"norms must hold real numbers, got {norms.dtype}")
    ascending = norms.detach().double().flatten().sort().values
    if not len(ascending) or not ascending[-1].isfinite():  # NaN sorts last
        raise ValueError("hidden states must be one at least and finite; these are not")
    if ascending[0] < 0:
        raise ValueError(
            f"a norm is at least 0, got {ascending[0]:g}; pass norms, not hidden states"
        )
    ranks = {share: round(share * (len(ascending) - 1)) for share in (0.05, 0.5, 0.95, 0.99)}
    return HiddenNorms(
        count=len(ascending),
        mean=ascending.mean().item(),
        quantiles={share: ascending[rank].item() for share, rank in ranks.items()},
        max=ascending[-1].item(),
    )


def _root_of_largest(gram: Tensor) -> float:
    return math.sqrt(max(0.0, torch.linalg.eigvalsh(gram)[-1].item()))


def _check_head(weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> None:
    for name, tensor in {"linear_weight": weight, "linear_bias": bias, "gain": gain}.items():
        if tensor is not None or name == "linear_weight":
            check_dense(name, tensor)
    shape = tuple(weight.shape)
    if weight.ndim != 2 or shape[0] < 2 or shape[1] < 1:
        raise ValueError(f"linear_weight must be (V, D) with V >= 2 and D >= 1, got {shape}")
    expected = {"linear_weight": (weight, shape), "linear_bias": (bias, shape[:1])}
    for name, (tensor, size) in (expected | {"gain": (gain, shape[1:])}).items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.shape != size:
            raise ValueError(f"{name} must have shape {size}, got {tuple(tensor.shape)}")
        if name != "linear_weight" and not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinity, for which no bound holds; check the checkpoint"
            )


def _check_smoothing(label_smoothing: float) -> float:
    label_smoothing = as_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"label_smoothing must lie in [0, 1], got {label_smoothing}; a common choice is 0.1"
        )
    return label_smoothing


def _positive(name: str, value: float) -> float:
    number = as_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")
    return number
