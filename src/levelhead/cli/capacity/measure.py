"""What `levelhead capacity` finds out: bounds from the final norm, and bounds and facts from data."""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from levelhead.calibration.capacity import (
    Capacity,
    HeadGeometry,
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
from .view import show

_ROWS = 4096  # of the head at a time, or a copy in float32 would be as large as it


def report(arguments: argparse.Namespace) -> None:
    """Measures the model and prints what came of it.

    Raises:
        CliError: The model or the data cannot be used.
    """
    if arguments.smoothing in (0, 1):
        raise CliError(
            f"--smoothing {arguments.smoothing:g} gives no finite margin to judge by: without "
            "smoothing the loss always asks for more, and with 1 for none; a common choice is 0.1"
        )
    console = Console()
    status = Console(stderr=True)
    with status.status("Reading"):
        tokenizer = None if arguments.data is None else read_tokenizer(arguments)
        rows = None if arguments.data is None else read_rows(arguments, tokenizer)
        model = read_model(arguments)
        try:
            head, norm = single_head(model), final_norm(model)
            inputs = None
            if rows is not None:
                given = batches(rows, arguments, tokenizer)
                inputs = collect(model, given, max_tokens=arguments.max_tokens)
            summary = measure(head, norm, inputs, arguments)
        except ValueError as error:
            raise CliError(str(error)) from error
    if arguments.json:
        json.dump(_finite(summary), sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        show(console, summary)


def measure(
    head: Head,
    norm: FinalNorm | None,
    inputs: HeadInputs | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The summary that is printed as JSON; here with infinities.

    Raises:
        ValueError: The softcap would come on top of the model's, or there is nothing to judge by.
    """
    transform = _in_training(head.transform, arguments)
    if norm is None and inputs is None:
        raise ValueError(
            "no RMSNorm or LayerNorm feeds the head of this model as it is, so that without DATA "
            "nothing bounds its hidden states; name a text or rows to read"
        )
    geometry = head_geometry(head.weight, head.bias)

    def bounds(geometry: HeadGeometry, hidden_norm: float) -> dict[str, Any]:
        def within(transform: HeadTransform) -> Capacity:
            return geometry.capacity(
                hidden_norm,
                logit_scale=transform.logit_scale,
                softcap=transform.softcap,
                label_smoothing=arguments.smoothing,
            )

        found, own = within(transform), within(head.transform)
        capped_out = arguments.softcap is not None and 2 * arguments.softcap < own.smoothed_margin
        return asdict(found) | {
            "reachable": found.reachable,
            "max_temperature": None if capped_out else own.max_temperature,
        }

    vocab_size = geometry.vocab_size
    summary: dict[str, Any] = {
        "model": arguments.model,
        "data": arguments.data,
        "settings": {
            name: vars(arguments)[name] for name in ("smoothing", "temperature", "softcap")
        },
        "head": {
            "vocab_size": vocab_size,
            "hidden_size": head.weight.shape[1],
            "dtype": str(head.weight.dtype).removeprefix("torch."),
            "spectral_norm": geometry.spectral_norm,
            "centred_spectral_norm": geometry.centred_spectral_norm,
            "largest_centred_row_norm": float(geometry.row_norm.max()),
            "centred_bias_norm": float(geometry.row_bias.norm()),
            "logit_scale": head.transform.logit_scale,
            "softcap": head.transform.softcap,
        },
        "optimum": {
            "margin": smoothed_margin(vocab_size, arguments.smoothing),
            "confidence": 1 - arguments.smoothing + arguments.smoothing / vocab_size,
            "loss_floor": smoothed_loss_floor(vocab_size, arguments.smoothing),
        },
        "ceiling": None,
        "sample": None,
    }
    if norm is not None:
        gain, bias = norm.gain, _folded_bias(head, norm.shift)
        folded = head_geometry(head.weight, bias, gain=gain)
        ceiling = bounds(folded, math.sqrt(len(gain)))
        # Of the norm's output, as those of the sample are, not of what its gain is applied to.
        scale = ceiling.pop("required_norm"), ceiling.pop("hidden_norm")
        ceiling["share_of_norm_required"] = scale[0] / scale[1]
        summary["ceiling"] = {"hidden_norm": norm.norm_ceiling} | ceiling
    if inputs is not None:
        norms = hidden_norms(_norms(inputs.hidden))
        summary["sample"] = {
            "hidden_norms": asdict(norms),
            "bounds": bounds(geometry, norms.max),
            "observed": _observed(replace(head, transform=transform), inputs, summary["optimum"]),
        }
    return summary | {"verdict": _verdict(summary)}


def _verdict(summary: dict[str, Any]) -> str:
    """One of the verdicts that `view` has words for."""
    ceiling, sample = summary["ceiling"], summary["sample"]
    if sample is not None and sample["observed"]["share_at_optimum"] > 0:
        return "reached"
    if ceiling is not None and not ceiling["reachable"]:
        return "impossible"
    if sample is not None and not sample["bounds"]["reachable"]:
        return "out of reach"
    return "possible"


def _in_training(own: HeadTransform, arguments: argparse.Namespace) -> HeadTransform:
    """What patch_model makes of the transform of the model with these options."""
    transform = own.at_temperature(arguments.temperature)
    if arguments.softcap is None:
        return transform
    if own.softcap is not None:
        raise ValueError(
            f"the model caps its logits at {own.softcap:g} already, and --softcap would come on "
            "top; leave it out"
        )
    return replace(transform, softcap=arguments.softcap)


def _folded_bias(head: Head, shift: Tensor) -> Tensor | None:
    """The logits of the shift alone, (V,), which are the bias of a head that the norm is part of."""
    if not shift.any():
        return head.bias
    shift = shift.to(head.weight.device)
    rows = torch.split(head.weight.detach(), _ROWS)
    bias = torch.cat([chunk.float() @ shift for chunk in rows])
    return bias if head.bias is None else bias + head.bias.detach()


def _norms(hidden: Tensor) -> Tensor:
    return torch.cat([chunk.float().norm(dim=1) for chunk in torch.split(hidden, _ROWS)])


def _observed(head: Head, inputs: HeadInputs, optimum: dict[str, float]) -> dict[str, float]:
    """What the model is like on the sample: the most likely token's margin and probability."""
    with torch.no_grad():
        stats = head.logit_stats(inputs.hidden, inputs.target)
    vocab_size = len(head.weight)
    margin = -stats.relative_mean.double() * vocab_size / (vocab_size - 1)
    confidence = stats.confidence.double()
    # By confidence, not by margin, because others that are high with it take from what it gets.
    return {
        "max_margin": margin.max().item(),
        "mean_confidence": confidence.mean().item(),
        "max_confidence": confidence.max().item(),
        "mean_entropy": stats.entropy.double().mean().item(),
        "share_at_optimum": (confidence >= optimum["confidence"]).double().mean().item(),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
