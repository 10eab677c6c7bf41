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
what all logits share, which is why the mean row, often the largest part of a head, counts nowhere.

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

from .bounds import margin_in_ball, max_probability, min_entropy
from .predictions import as_number, check_dense

_CHUNK = 2**24  # entries of the head that are copied at a time: 64 MiB in float32


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

    def radius(self, hidden_norm: float) -> float:
        """Rho, the largest norm of the logits less their mean.

        Args:
            hidden_norm: Largest norm of the hidden states.

        Returns:
            The bound (ball), in nats.

        Raises:
            TypeError: `hidden_norm` is no number.
            ValueError: It is negative or NaN.
        """
        hidden_norm = _norm(hidden_norm)
        return self.centred_spectral_norm * hidden_norm + float(self.row_bias.norm())

    def margin(self, hidden_norm: float) -> float:
        """The largest margin of a logit over the mean of the others that the two bounds allow.

        Args:
            hidden_norm: Largest norm of the hidden states.

        Returns:
            The tighter of (rows) and (ball), in nats.

        Raises:
            TypeError: `hidden_norm` is no number.
            ValueError: It is negative or NaN.
        """
        hidden_norm = _norm(hidden_norm)
        rows = float((self.row_norm * hidden_norm + self.row_bias).max())
        rows *= self.vocab_size / (self.vocab_size - 1)
        return min(rows, margin_in_ball(self.radius(hidden_norm), self.vocab_size))

    def required_norm(self, margin: float) -> float:
        """The least norm of a hidden state with which the two bounds allow a margin.

        Args:
            margin: Of a logit over the mean of the others, in nats.

        Returns:
            The norm; inf if none is enough.

        Raises:
            TypeError: `margin` is no number.
            ValueError: It is NaN.
        """
        margin = as_number("margin", margin)
        if math.isnan(margin):
            raise ValueError("margin must be a number of nats, got nan")
        share = (self.vocab_size - 1) / self.vocab_size
        rows = margin * share - self.row_bias
        by_rows = torch.where(rows > 0, rows / self.row_norm, 0.0).min().item()
        ball = torch.tensor(margin * math.sqrt(share)).double() - self.row_bias.norm()
        in_ball = torch.where(ball > 0, ball / self.centred_spectral_norm, 0.0).item()
        return max(by_rows, in_ball)


def head_geometry(
    linear_weight: Tensor, linear_bias: Tensor | None = None, *, gain: Tensor | None = None
) -> HeadGeometry:
    """Measures a head: largest singular values, and the norms of its rows.

    The singular values come from the D x D matrix of inner products between columns, so that neither a
    copy of the head nor anything V x V is made: 64 MiB at a time, and 12 D^2 bytes (192 MiB for D = 4096).

    Precision: products in float32, or float64 for a float64 head; singular values are right to about 1e-5.

    Args:
        linear_weight: The head W, (V, D), V >= 2, of any floating dtype on any device.
        linear_bias: b, (V,).
        gain: Factor on each hidden unit, (D,): measures `W * gain` without making it. With the weight
            of a final norm, whose output before the gain has norm sqrt(D) at most, this bounds the
            logits of every input more tightly than `max|gain| * sqrt(D)` does for W itself.

    Returns:
        What bounds its logits, on the CPU.

    Raises:
        TypeError: What is given is no dense tensor that holds values, or not of a floating dtype.
        ValueError: Shapes do not fit, or a value is NaN or infinite.

    Example:
        >>> import torch
        >>> geometry = head_geometry(torch.eye(4))
        >>> geometry.spectral_norm, round(geometry.margin(3.0), 4)
        (1.0, 3.4641)
    """
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
    """The margin of the target's logit over the others at which the smoothed loss is least.

    Args:
        vocab_size: V, at least 2.
        label_smoothing: eps, in [0, 1].

    Returns:
        `log(V (1 - eps) / eps + 1)`, in nats: infinite for eps = 0, where cross-entropy has no minimum,
        and 0 for eps = 1.

    Raises:
        TypeError: V or eps is no number.
        ValueError: V is below 2 or not whole, or eps outside [0, 1].

    Example:
        >>> round(smoothed_margin(128256, 0.1), 3)
        13.959
    """
    label_smoothing = _check_smoothing(vocab_size, label_smoothing)
    if label_smoothing == 0:
        return math.inf
    return math.log1p(vocab_size * (1 - label_smoothing) / label_smoothing)


def smoothed_loss_floor(vocab_size: int, label_smoothing: float) -> float:
    """The least smoothed loss of a token: the entropy of its target `(1 - eps) onehot + eps / V`.

    Args:
        vocab_size: V, at least 2.
        label_smoothing: eps, in [0, 1].

    Returns:
        In nats, from 0 for eps = 0 to log(V) for eps = 1.

    Raises:
        TypeError: V or eps is no number.
        ValueError: V is below 2 or not whole, or eps outside [0, 1].

    Example:
        >>> round(smoothed_loss_floor(128256, 0.1), 3)
        1.501
    """
    label_smoothing = _check_smoothing(vocab_size, label_smoothing)
    share = label_smoothing / vocab_size
    top = 1 - label_smoothing + share
    rest = -(vocab_size - 1) * share * math.log(share) if share else 0.0
    return rest - top * math.log(top)


@dataclass(frozen=True)
class Capacity:
    """How confident a head can be on hidden states up to a given norm, and whether smoothing will act.

    All of it holds for the weights as they are; training changes them.

    Attributes:
        vocab_size: V.
        hidden_norm: The norm of the hidden states that was asked for. If it is the largest in a sample,
            what follows is proven for hidden states up to that norm, not for those of other inputs.
        radius: rho, the largest norm of the logits less their mean, before the softcap.
        margin: Bound on the margin of a logit over the mean of the others, softcap included.
        max_probability: Bound on the probability of an entry.
        min_entropy: Bound on the entropy, in nats.
        smoothed_margin: The margin at which the smoothed loss is least; see the function of this name.
        loss_floor: The least smoothed loss of a token, in nats.
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
    geometry: HeadGeometry,
    hidden_norm: float,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.1,
) -> Capacity:
    """Whether the logits `cap(logit_scale * (W h + b))` can become over-confident, for ||h|| <= hidden_norm.

    A softcap leaves the order of the logits and brings every two of them closer, so that probability and
    entropy without it are bounds with it; its own, a margin of 2 c, is taken where that is tighter.

    Args:
        geometry: Of the head; see `head_geometry`.
        hidden_norm: Largest norm of the hidden states, finite, at least 0.
        logit_scale: Factor on the output of the head; 1 / T for a temperature T before the softcap. One
            after it is 1 / T on both, the scale and the softcap.
        softcap: c of cap(x) = c tanh(x / c); None: no cap.
        label_smoothing: eps of the training loss, in [0, 1].

    Returns:
        The bounds, and what smoothing asks.

    Raises:
        TypeError: An option is no number.
        ValueError: An option lies outside its range.

    References:
        Huang et al. 2025, https://arxiv.org/abs/2508.00264.

    Example:
        >>> import torch
        >>> capacity = head_capacity(head_geometry(torch.eye(1000)), 6.0)
        >>> capacity.reachable, round(capacity.margin, 2), round(capacity.smoothed_margin, 2)
        (False, 6.0, 9.11)
    """
    logit_scale = _positive("logit_scale", logit_scale)
    softcap = None if softcap is None else _positive("softcap", softcap)
    hidden_norm = as_number("hidden_norm", hidden_norm)
    if not 0 <= hidden_norm < math.inf:
        raise ValueError(f"hidden_norm must be a finite number from 0 on, got {hidden_norm}")
    vocab_size = geometry.vocab_size
    target = smoothed_margin(vocab_size, label_smoothing)
    radius = logit_scale * geometry.radius(hidden_norm)
    margin = min(
        logit_scale * geometry.margin(hidden_norm), math.inf if softcap is None else 2 * softcap
    )
    within = softcap is None or target <= 2 * softcap
    probability = max_probability(margin, vocab_size)
    return Capacity(
        vocab_size=vocab_size,
        hidden_norm=hidden_norm,
        radius=radius,
        margin=margin,
        max_probability=probability,
        # No entropy is less than minus the logarithm of the largest probability.
        min_entropy=max(min_entropy(radius, vocab_size), -math.log(probability)),
        smoothed_margin=target,
        loss_floor=smoothed_loss_floor(vocab_size, label_smoothing),
        required_norm=geometry.required_norm(target / logit_scale) if within else math.inf,
    )


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
    """Sums up the norms of hidden states.

    Args:
        norms: Of any shape (...), floating-point or integer, each at least 0.

    Returns:
        Count, mean, quantiles and maximum.

    Raises:
        TypeError: `norms` is no dense tensor that holds values.
        ValueError: There is none, or one is negative, NaN or infinite.

    Example:
        >>> import torch
        >>> hidden_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]).norm(dim=1)).max
        5.0
    """
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


def _check_smoothing(vocab_size: int, label_smoothing: float) -> float:
    size = as_number("vocab_size", vocab_size)
    if not size.is_integer() or size < 2:
        raise ValueError(f"vocab_size must be a whole number, 2 at least, got {vocab_size}")
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


def _norm(hidden_norm: float) -> float:
    number = as_number("hidden_norm", hidden_norm)
    if not number >= 0:
        raise ValueError(f"hidden_norm must be a number from 0 on, got {hidden_norm}")
    return number
