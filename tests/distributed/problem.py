"""What the distributed tests train, and what one process with the whole batch makes of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from tests.integrations.tiny_models import LENGTH, VOCAB_SIZE, dense_loss, next_tokens, tiny
from torch import Tensor, nn

STEPS = 3
RANKS = 2
ROWS = 2  # a rank
Batch = dict[str, Tensor]
Run = dict[str, Any]  # {"losses": one a step, "parameters": {name: Tensor}}


def batches() -> list[Batch]:
    """A batch for all ranks together, (4, 9), for each step: never as many valid tokens on both.

    In the second step the last rank has no valid token at all.
    """
    generator = torch.Generator().manual_seed(2)
    whole = []
    for step in range(STEPS):
        input_ids = torch.randint(3, VOCAB_SIZE, (RANKS * ROWS, LENGTH), generator=generator)
        labels = input_ids.clone()
        labels[0, : 4 + step] = -100
        labels[3, 6] = -100
        if step == 1:
            labels[ROWS:] = -100
        whole.append({"input_ids": input_ids, "labels": labels})
    return whole


def valid_tokens(batch: Batch) -> Tensor:
    """How many tokens of `batch` have a label: Trainer's `num_items_in_batch`."""
    return (next_tokens(batch["labels"]) != -100).sum()


def part(batch: Batch, rank: int, parts: int = RANKS) -> Batch:
    """The rows of `batch` that belong to `rank`."""
    return {name: value.chunk(parts)[rank] for name, value in batch.items()}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # Momentum is a state that a checkpoint can lose; no sign or root hides the size of a gradient.
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def train(
    optimizer: torch.optim.Optimizer,
    whole: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
) -> list[Tensor]:
    """A step for every batch of `whole`; `loss_of(batch)` runs the model. Returns the losses."""
    losses = []
    for batch in whole:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def smoothed_from_logits(model: Any) -> Any:
    """`model` with the loss of a patched one, taken by torch from all its logits in float32."""

    def loss_function(
        logits: Tensor, labels: Tensor, num_items_in_batch: Tensor, **_others: Any
    ) -> Tensor:
        logits, target = logits.float().flatten(0, 1), next_tokens(labels).flatten()
        total = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
        return total / num_items_in_batch

    model.loss_function = loss_function
    return model


def without_shared_memory(deepspeed: Any) -> None:
    """Have DeepSpeed leave gloo its collectives; it would compile some of its own for a minute."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def largest_error(got: Run, truth: Run) -> float:
    """The largest difference of a parameter after the last step."""
    wrong = [got["parameters"][name] - value for name, value in truth["parameters"].items()]
    return max(float(difference.abs().max()) for difference in wrong)


def one_process(**options: Any) -> Run:
    """The same steps by one process with the whole batch, and torch's own label smoothing."""
    model = tiny(**options)
    losses = train(optimizer(model), batches(), lambda batch: dense_loss(model, **batch))
    return {"losses": losses, "parameters": parameters(model)}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_run(got: Run, want: Run, atol: float = 1e-12) -> None:
    """The same reported losses and the same parameters after the last step, to within `atol`.

    `got` may hold more than the parameters, as a state_dict of tied weights does.
    The default is what is left in float64 after sums of a few hundred terms of order one.
    """
    for step, (mine, truth) in enumerate(zip(got["losses"], want["losses"], strict=True)):
        torch.testing.assert_close(
            mine, truth, rtol=0, atol=atol, msg=lambda text, step=step: f"loss {step}: {text}"
        )
    for name, truth in want["parameters"].items():
        torch.testing.assert_close(
            got["parameters"][name],
            truth,
            rtol=0,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )
