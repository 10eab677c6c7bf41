"""A pass for torch.compile that finds the losses in a graph and swaps in the operators; nothing is patched."""

from __future__ import annotations

from typing import Any

from ...ops.checks import _check_number


def inductor_options(
    smoothing: float | None = None, *, drop_logits: bool = False
) -> dict[str, Any]:
    """Options for `torch.compile` that replace linear layer and cross-entropy by the fused operators.

    Use as ``torch.compile(model, options=levelhead.inductor_options(smoothing=0.1))``. Wherever a compiled
    graph holds a linear layer whose logits serve only a loss, however that is spelled (`F.cross_entropy` of
    shifted, scaled or capped logits, `F.nll_loss`, a `log_softmax` and a `gather`, label smoothing and z-loss
    written by hand), the loss is computed without them: same value, same gradients, to the precision of
    `levelhead.linear_cross_entropy`. Where that is not possible the graph stays what it was, and for each
    `F.cross_entropy`, `F.nll_loss` and gathered log-probability a warning, once, says why.

    `torch.compile` takes either a ``mode`` or ``options``. A mode is a name for some options, so add them::

        options = torch._inductor.list_mode_options("max-autotune") | levelhead.inductor_options(smoothing=0.1)
        model = torch.compile(model, options=options)

    What was done is counted in ``torch._dynamo.utils.counters["levelhead"]`` and logged, at level INFO,
    by the logger of this module.

    Args:
        smoothing: label smoothing, in [0, 1], of each `F.cross_entropy` and `F.nll_loss` that is differentiated,
            in place of what it was given; losses of evaluation under `torch.no_grad` stay as they are, and so
            do those written by hand, with a warning. None: as written.
        drop_logits: return NaN that takes no memory in place of logits that a graph returns beside a
            differentiated loss, as Hugging Face models do; what uses them later, after a graph break for
            example, finds NaN. Otherwise they are computed beside the loss.

    Returns:
        The ``options`` of `torch.compile` with the Inductor backend; other options may be added to them.

    Raises:
        TypeError: smoothing is no number.
        ValueError: smoothing lies outside [0, 1].

    References:
        Huang et al. 2025, https://arxiv.org/abs/2508.00264, for smoothing in fine-tuning.
    """
    from .fusion import FuseLinearCrossEntropy

    if smoothing is not None:
        _check_number("smoothing", smoothing, "None")
        if not 0 <= smoothing <= 1:
            raise ValueError(
                f"smoothing must lie in [0, 1], got {smoothing}; a common choice is 0.1"
            )
    return {
        "use_pre_grad_passes": True,  # which mode "lite" leaves out
        "pre_grad_custom_pass": FuseLinearCrossEntropy(smoothing, drop_logits),
    }
