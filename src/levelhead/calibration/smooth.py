"""The smooth calibration error: no bins, no number of bins to choose."""

import math
from typing import Any

import torch
from torch import Tensor

from .predictions import as_predictions, chunks
from .root import increasing_root

GRID = 1 << 14  # steps across [0, 1]
_TOLERANCE = 1e-10


def smooth_calibration_error(confidence: Any, correct: Any) -> float:
    """Return the smooth ECE: the calibration error after a Gaussian kernel, at the bandwidth equal to it.

    With residuals correct_i - confidence_i and the Gaussian kernel K_s of bandwidth s, reflected at
    0 and 1, smECE_s = integral over t in [0, 1] of |(1 / N) sum_i K_s(t, confidence_i)
    (correct_i - confidence_i)|. It falls as s grows; the result is the one s with smECE_s = s. It
    changes continuously with the predictions, where a binned error jumps, and lies within constant
    factors of the distance to the nearest calibrated predictor (and of its square root).

    The residuals are spread over a grid of 16,384 steps h, each over its two neighbours, and
    smoothed by the fast Fourier transform. A result s is right to about h or h^2 / s, whichever is
    less: 6e-5 at worst, 4e-7 at an error of 0.01.

    Args:
        confidence: As in `reliability`.
        correct: As in `reliability`.

    Returns:
        The error, in [0, 1]. Computed on the CPU in float64.

    Raises:
        TypeError: As `reliability`.
        ValueError: As `reliability`.

    Example:
        >>> round(smooth_calibration_error([0.9, 0.9], [True, False]), 3)
        0.4

    References:
        Błasiok, Nakkiran. Smooth ECE: principled reliability diagrams via kernel smoothing. ICLR
        2024, arXiv 2309.12236.
    """
    return smooth_error(*as_predictions(confidence, correct))


def smooth_error(confidence: Tensor, correct: Tensor) -> float:
    """Return `smooth_calibration_error` of checked columns."""
    residual = _residual_grid(confidence, correct, GRID)
    spectrum = torch.fft.rfft(_reflected(residual))

    def excess(bandwidth: float) -> float:
        return bandwidth - _smoothed(spectrum, bandwidth)  # rises with slope 1 or steeper

    return increasing_root(excess, 0.0, excess(0.0), 1.0, excess(1.0), tolerance=_TOLERANCE)


def _residual_grid(confidence: Tensor, correct: Tensor, grid: int) -> Tensor:
    """Return the mean residual at i / grid, each prediction's shared by its neighbours, (grid + 1,)."""
    mass = torch.zeros(grid + 1, dtype=torch.float64)
    for c, y in chunks(confidence, correct):
        left = (c * grid).long().clamp(max=grid - 1)
        upper = c * grid - left  # the share of the right neighbour
        residual = y.double() - c
        mass[:-1] += torch.bincount(left, residual * (1 - upper), minlength=grid)
        mass[1:] += torch.bincount(left, residual * upper, minlength=grid)
    return mass / len(confidence)


def _reflected(mass: Tensor) -> Tensor:
    """Return one period of the mass mirrored at 0 and 1, where each end is its own image; (2 grid,)."""
    ends = mass.clone()
    ends[[0, -1]] *= 2
    return torch.cat([ends, ends[1:-1].flip(0)])


def _smoothed(spectrum: Tensor, bandwidth: float) -> float:
    grid = len(spectrum) - 1
    frequency = math.pi * torch.arange(grid + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (bandwidth * frequency).square())
    density = torch.fft.irfft(spectrum * kernel, n=2 * grid)[: grid + 1].abs()
    ends = density[0] + density[-1]  # by the trapezoidal rule
    return float(density.sum() - ends / 2)
