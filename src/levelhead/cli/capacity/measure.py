"""Whether a model's head can become over-confident: bounds from its final norm, bounds and facts from data."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from levelhead.calibration.capacity import (
    Capacity,
    HeadGeometry,
    HiddenNorms,
    head_geometry,
    hidden_norms,
    smoothed_loss_floor,
    smoothed_margin,
)
from levelhead.heads.final_norm import FinalNorm, final_norm
from levelhead.heads.head import Head, HeadInputs, collect, single_head
from levelhead.integrations.patch.probe import HeadTransform

from ..errors import CliError
from ..reading import batches, read_model, read_rows, read_tokenizer
from .options import Options

_ROWS = 4096  # of the head at a time, or a copy in float32 would be as large as it
Verdict = Literal["reached", "impossible", "out of reach", "possible"]


@dataclass(frozen=True)
class HeadSummary:
    """A head as it is, before the options of a training."""

    vocab_size: int
    hidden_size: int
    dtype: str
    spectral_norm: float
    centred_spectral_norm: float
    largest_centred_row_norm: float
    centred_bias_norm: float
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class Optimum:
    """The target where the smoothed loss is least: margin and loss in nats, probability."""

    margin: float
    confidence: float
    loss_floor: float


@dataclass(frozen=True)
class Bounds:
    """What a norm of hidden states allows.

    Attributes:
        capacity: The bounds, under the options of training.
        max_temperature: Of training, with the optimum still within reach; None: the softcap rules it out.
    """

    capacity: Capacity
    max_temperature: float | None


@dataclass(frozen=True)
class Observed:
    """The most likely tokens of a sample; margin and entropy in nats."""

    max_margin: float
    mean_confidence: float
    max_confidence: float
    mean_entropy: float
    share_at_optimum: float


@dataclass(frozen=True)
class Sample:
    """What was found on DATA."""

    hidden_norms: HiddenNorms
    bounds: Bounds
    observed: Observed


@dataclass(frozen=True)
class Report:
    """What `levelhead capacity` found.

    Attributes:
        options: What was asked.
        head: The head as it is.
        optimum: What smoothing asks of it.
        ceiling: The bounds of the norm in front of the head, for all inputs; None: there is no such norm.
            Its norms are those of the norm's output before the gain.
        ceiling_norm: The largest norm of that norm's output.
        sample: None: no DATA.
    """

    options: Options
    head: HeadSummary
    optimum: Optimum
    ceiling: Bounds | None
    ceiling_norm: float | None
    sample: Sample | None

    @property
    def verdict(self) -> Verdict:
        """The strongest thing that can be said."""
        if self.sample is not None and self.sample.observed.share_at_optimum > 0:
            return "reached"
        if self.ceiling is not None and not self.ceiling.capacity.reachable:
            return "impossible"
        if self.sample is not None and not self.sample.bounds.capacity.reachable:
            return "out of reach"
        return "possible"

    def as_json(self) -> str:
        """Return the report as JSON, with null for infinity, which JSON has not."""
        options, ceiling, sample = self.options, None, None
        if self.ceiling is not None:
            found = _content(self.ceiling)
            del found["hidden_norm"], found["required_norm"]
            share = self.ceiling.capacity.required_norm / self.ceiling.capacity.hidden_norm
            ceiling = {"hidden_norm": self.ceiling_norm, **found, "share_of_norm_required": share}
        if self.sample is not None:
            sample = asdict(self.sample) | {"bounds": _content(self.sample.bounds)}
        content = {
            "model": options.model,
            "data": options.data,
            "settings": {
                "smoothing": options.smoothing,
                "temperature": options.temperature,
                "softcap": options.softcap,
            },
            "head": asdict(self.head),
            "optimum": asdict(self.optimum),
            "ceiling": ceiling,
            "sample": sample,
            "verdict": self.verdict,
        }
        return json.dumps(_finite(content), indent=2, allow_nan=False)


def capacity(options: Options) -> Report:
    """Measure a model, and what it does on DATA if there is any.

    Args:
        options: Those of `levelhead capacity`.

    Returns:
        What the weights allow, and what was seen.

    Raises:
        CliError: The model or the data cannot be used.
    """
    if options.smoothing in (0, 1):
        raise CliError(
            f"--smoothing {options.smoothing:g} gives no finite margin to judge by: without "
            "smoothing the loss always asks for more, and with 1 for none; a common choice is 0.1"
        )
    with Console(stderr=True).status("Reading"):
        tokenizer = None if options.data is None else read_tokenizer(options)
        rows = None if options.data is None else read_rows(options, tokenizer)
        model = read_model(options)
        try:
            head, norm = single_head(model), final_norm(model)
            inputs = None
            if rows is not None:
                given = batches(rows, options, tokenizer)
                inputs = collect(model, given, max_tokens=options.max_tokens)
            return _report(head, norm, inputs, options)
        except ValueError as error:
            raise CliError(str(error)) from error


def _report(
    head: Head, norm: FinalNorm | None, inputs: HeadInputs | None, options: Options
) -> Report:
    in_training = _in_training(head.transform, options)
    if norm is None and inputs is None:
        raise ValueError(
            "no RMSNorm or LayerNorm feeds the head of this model as it is, so that without DATA "
            "nothing bounds its hidden states; name a text or rows to read"
        )

    def bounds(geometry: HeadGeometry, hidden_norm: float) -> Bounds:
        found, own = (
            geometry.capacity(
                hidden_norm,
                logit_scale=transform.logit_scale,
                softcap=transform.softcap,
                label_smoothing=options.smoothing,
            )
            for transform in (in_training, head.transform)
        )
        capped_out = options.softcap is not None and 2 * options.softcap < own.smoothed_margin
        return Bounds(found, None if capped_out else own.max_temperature)

    geometry = head_geometry(head.weight, head.bias)
    vocab_size = geometry.vocab_size
    optimum = Optimum(
        margin=smoothed_margin(vocab_size, options.smoothing),
        confidence=1 - options.smoothing + options.smoothing / vocab_size,
        loss_floor=smoothed_loss_floor(vocab_size, options.smoothing),
    )
    ceiling = sample = None
    if norm is not None:
        folded = head_geometry(head.weight, _folded_bias(head, norm.shift), gain=norm.gain)
        ceiling = bounds(folded, math.sqrt(len(norm.gain)))
    if inputs is not None:
        norms = [chunk.float().norm(dim=1) for chunk in torch.split(inputs.hidden, _ROWS)]
        summed = hidden_norms(torch.cat(norms))
        observed = _observed(replace(head, transform=in_training), inputs, optimum)
        sample = Sample(summed, bounds(geometry, summed.max), observed)
    return Report(
        options=options,
        head=HeadSummary(
            vocab_size=vocab_size,
            hidden_size=head.weight.shape[1],
            dtype=str(head.weight.dtype).removeprefix("torch."),
            spectral_norm=geometry.spectral_norm,
            centred_spectral_norm=geometry.centred_spectral_norm,
            largest_centred_row_norm=float(geometry.row_norm.max()),
            centred_bias_norm=float(geometry.row_bias.norm()),
            logit_scale=head.transform.logit_scale,
            softcap=head.transform.softcap,
        ),
        optimum=optimum,
        ceiling=ceiling,
        ceiling_norm=None if norm is None else norm.norm_ceiling,
        sample=sample,
    )


def _in_training(own: HeadTransform, options: Options) -> HeadTransform:
    """Return what patch_model makes of the transform of the model with these options."""
    transform = own.at_temperature(options.temperature)
    if options.softcap is None:
        return transform
    if own.softcap is not None:
        raise ValueError(
            f"the model caps its logits at {own.softcap:g} already, and --softcap would come on "
            "top; leave it out"
        )
    return replace(transform, softcap=options.softcap)


def _folded_bias(head: Head, shift: Tensor) -> Tensor | None:
    """Return the logits of the shift alone, (V,): the bias of a head that the norm is part of."""
    if not shift.any():
        return head.bias
    shift = shift.to(head.weight.device)
    rows = torch.split(head.weight.detach(), _ROWS)
    bias = torch.cat([chunk.float() @ shift for chunk in rows])
    return bias if head.bias is None else bias + head.bias.detach()


def _observed(head: Head, inputs: HeadInputs, optimum: Optimum) -> Observed:
    with torch.no_grad():
        stats = head.logit_stats(inputs.hidden, inputs.target)
    vocab_size = len(head.weight)
    margin = -stats.relative_mean.double() * vocab_size / (vocab_size - 1)
    confidence = stats.confidence.double()
    return Observed(
        max_margin=margin.max().item(),
        mean_confidence=confidence.mean().item(),
        max_confidence=confidence.max().item(),
        mean_entropy=stats.entropy.double().mean().item(),
        # By confidence, not by margin: other high logits take from what the largest gets.
        share_at_optimum=(confidence >= optimum.confidence).double().mean().item(),
    )


def _content(bounds: Bounds) -> dict[str, object]:
    return asdict(bounds.capacity) | {
        "reachable": bounds.capacity.reachable,
        "max_temperature": bounds.max_temperature,
    }


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
