"""Whole training steps of a small Llama with a large vocabulary, patched and not.

Tokens a second, and how long a sequence fits a memory limit.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import levelhead
from levelhead.measure import memory

from .measure import CpuClock, Row, reason, take_turns
from .step import quantiles

DENSE, OURS = "transformers, label_smoothing_factor", "levelhead, patch_model"
SMOOTHING = 0.1


@dataclass(frozen=True)
class Training:
    """A model and a batch of it; the body is small beside the head, as in a small model of today."""

    v: int = 128256
    d: int = 256
    layers: int = 4
    n: int = 512  # tokens of a step, one sequence
    limit_bytes: int = 384 * 2**20  # that a step may take beyond model and optimiser
    longest: int = 2048  # that is tried


class TrainingStep:
    """Forward, backward and AdamW on one sequence, with the loss of a method."""

    def __init__(self, training: Training, method: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.trainer_pt_utils import LabelSmoother

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=training.v, hidden_size=training.d, intermediate_size=3 * training.d,
            num_hidden_layers=training.layers, num_attention_heads=4,
            max_position_embeddings=training.longest, use_cache=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.ids = torch.randint(training.v, (1, training.n))
        self.smoother = LabelSmoother(SMOOTHING)
        if method == OURS:
            levelhead.patch_model(self.model, smoothing=SMOOTHING)
        self.patched = method == OURS

    def loss(self, ids: Tensor) -> Tensor:
        """The loss as Trainer computes it: unpatched, the labels stay out of the model, and the smoother is called."""
        if self.patched:
            return self.model(input_ids=ids, labels=ids).loss
        return self.smoother(self.model(input_ids=ids), ids, shift_labels=True)

    def backward(self, ids: Tensor) -> Tensor:
        """Forward and backward."""
        self.model.zero_grad()
        loss = self.loss(ids)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        """One step."""
        self.backward(self.ids)
        self.optimizer.step()

    def peak_bytes(self, n: int) -> int:
        """Return the peak of forward and backward on n tokens, beyond the model and the optimiser.

        Gradients count: the largest of them are made when the logits are gone, so to leave them out would hide logits.
        """
        ids = self.ids.new_zeros(1, n)
        self.model.zero_grad()
        before = memory.reset_peak(ids.device)
        self.backward(ids)
        return memory.peak(ids.device) - before


def peaks(training: Training, method: str) -> dict[int, int]:
    """Return peak_bytes by number of tokens, doubled until they are beyond the limit. In a prepared process."""
    step = TrainingStep(training, method)
    step.backward(step.ids[:, :32])  # libraries allocate for good on their first call
    found: dict[int, int] = {}
    n = 64
    while n <= training.longest:
        found[n] = step.peak_bytes(n)
        if found[n] > training.limit_bytes:
            break
        n *= 2
    return found


def measure(training: Training, clock: CpuClock) -> list[Row]:
    """Return a row a method; of one whose loss or gradients are off, with the reason and without figures."""
    steps = {method: TrainingStep(training, method) for method in (DENSE, OURS)}
    rows: list[Row] = [
        {"op": "training step", "method": method, "mode": "forward+backward+AdamW"}
        | {"dtype": "float32", "eps": SMOOTHING, "device": "cpu", **asdict(training)}
        for method in steps
    ]
    failure = _difference(*steps.values())
    if failure is not None:
        rows[1]["failure"] = failure
    everywhere = clock.elsewhere(peaks, [(training, method) for method in steps])
    for row, found in zip(rows, everywhere, strict=True):
        if isinstance(found, str):
            row["failure"] = found
        elif "failure" not in row:
            fits = [n for n, peak in found.items() if peak <= training.limit_bytes]
            row |= {
                "peak_bytes_by_n": {str(n): peak for n, peak in found.items()},
                "longest_that_fits": max(fits, default=0),
            }
    for step in steps.values():
        step()  # makes the optimiser's state
    for row, seconds in zip(rows, take_turns(rows, list(steps.values()), clock), strict=True):
        if seconds:
            row |= quantiles(seconds)
            row["tokens_per_second"] = 1e3 * training.n / row["ms_p50"]
    return rows


def _difference(dense: TrainingStep, ours: TrainingStep) -> str | None:
    """Return how the patched model differs from the other, None if it does not beyond rounding."""
    try:
        torch.testing.assert_close(
            ours.backward(ours.ids), dense.backward(dense.ids), rtol=1e-5, atol=0
        )
        for name, parameter in dense.model.named_parameters():
            got, want = ours.model.get_parameter(name).grad, parameter.grad
            # Float32 sums over the vocabulary and the tokens, in another order: some hundred roundings.
            tolerance = 1e-4 * want.abs().max().item()
            torch.testing.assert_close(
                got, want, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    except Exception as error:
        return reason(error)
    return None
