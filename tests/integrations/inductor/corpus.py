"""Spellings of the loss of a language model as people write them, and what the pass makes of each.

A spelling takes hidden states (B, T, D), a head's weight (V, D), bias (V,) and labels (B, T), and returns a loss. It is
marked with the operator that it must become, or with the reason why it must be left alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
SPELLINGS: dict[str, tuple[Spelling, str]] = {}
LOSS, STATISTICS = "linear_cross_entropy", "linear_logit_stats"
IGNORE = -100


def becomes(what: str) -> Callable[[Spelling], Spelling]:
    def add(spelling: Spelling) -> Spelling:
        SPELLINGS[spelling.__name__.strip("_")] = spelling, what
        return spelling

    return add


def _shift(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=IGNORE)[..., 1:].contiguous()


# The loss itself.


@becomes(LOSS)
def hugging_face(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Transformers' ForCausalLMLoss: labels are shifted, not logits."""
    logits = F.linear(h, weight).float()
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)), _shift(y).view(-1), ignore_index=-100, reduction="mean"
    )


@becomes(LOSS)
def items_in_batch(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).float().view(-1, weight.shape[0])
    return F.cross_entropy(logits, y.view(-1), reduction="sum") / 7


@becomes(LOSS)
def shifted_logits(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Transformers until 4.45, and most scripts copied from it."""
    logits = F.linear(h, weight, bias)
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = y[..., 1:].contiguous()
    loss = nn.CrossEntropyLoss()
    return loss(shift_logits.view(-1, weight.shape[0]), shift_labels.view(-1))


@becomes(LOSS)
def flattened(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight, bias).flatten(0, 1), y.flatten())


@becomes(LOSS)
def flattened_states(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h.flatten(0, 1), weight), y.reshape(-1))


@becomes(LOSS)
def unpacked_shape(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """NanoGPT and minGPT, in their bigram form."""
    logits = F.linear(h, weight)
    b, t, c = logits.shape
    return F.cross_entropy(logits.view(b * t, c), y.view(b * t))


@becomes(LOSS)
def ignored(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """NanoGPT."""
    logits = F.linear(h, weight)
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)), y.where(y >= 0, 3).view(-1), ignore_index=3
    )


@becomes(LOSS)
def classes_second(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).transpose(1, 2), y)


@becomes(LOSS)
def permuted(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).permute(0, 2, 1), y, label_smoothing=0.1)


@becomes(LOSS)
def matrix_transposed(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).mT, y)


@becomes(LOSS)
def product_with_embedding(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = h @ weight.T
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


@becomes(LOSS)
def product_and_bias(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = torch.matmul(h, weight.t()) + bias
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


@becomes(LOSS)
def addmm(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.addmm(bias, h.flatten(0, 1), weight.t()), y.flatten())


@becomes(LOSS)
def einsum(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = torch.einsum("btd,vd->btv", h, weight)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@becomes(LOSS)
def softcap(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Gemma 2."""
    logits = F.linear(h, weight)
    logits = logits / 3.0
    logits = torch.tanh(logits)
    logits = logits * 3.0
    return F.cross_entropy(logits.float().view(-1, weight.shape[0]), y.view(-1))


@becomes(LOSS)
def scale_and_softcap(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = 5.0 * (F.linear(h, weight) * 0.7 / 5.0).tanh()
    return F.cross_entropy(logits.view(-1, weight.shape[0]), y.view(-1))


@becomes(LOSS)
def temperature(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Granite; training at a temperature."""
    return F.cross_entropy(F.linear(h, weight).div(1.7).flatten(0, 1), y.flatten())


@becomes(LOSS)
def masked_mean(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(h, weight).flatten(0, 1), y.flatten(), reduction="none")
    mask = (y != IGNORE).flatten()
    return (losses * mask).sum() / mask.sum()


@becomes(LOSS)
def per_sequence(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), y[:, 1:], reduction="none")
    return losses.sum(1).mean()


@becomes(LOSS)
def completion_only(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, -3:]
    return F.cross_entropy(logits.reshape(-1, weight.shape[0]), y[:, -3:].reshape(-1))


@becomes(LOSS)
def last_token(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight)[:, -1, :], y[:, -1].clamp(min=0))


@becomes(LOSS)
def labels_masked_late(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    y = y.clone()
    y[y == 3] = IGNORE
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@becomes(LOSS)
def torch_linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Torch 2.13, which makes all logits once there is smoothing."""
    return F.linear_cross_entropy(h.flatten(0, 1), weight, y.flatten(), label_smoothing=0.1)


@becomes(LOSS)
def nll_of_log_softmax(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """fairseq, and tutorials."""
    log_probs = F.log_softmax(F.linear(h, weight), dim=-1)
    return F.nll_loss(log_probs.view(-1, weight.shape[0]), y.view(-1), reduction="sum")


@becomes(LOSS)
def nll_module(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = nn.LogSoftmax(dim=2)(F.linear(h, weight))
    return nn.NLLLoss()(log_probs.transpose(1, 2), y)


@becomes(LOSS)
def autocast_ends_before(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(h.float(), weight.float())
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


@becomes(LOSS)
def axes_by_name(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).swapaxes(axis0=1, axis1=2), y)


@becomes(LOSS)
def of_no_gradient(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    with torch.no_grad():
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return loss * bias.sum()


@becomes(LOSS)
def of_constant_logits(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).detach().flatten(0, 1), y.flatten())
    loss += bias.sum()  # and now it has a gradient, but not through the logits
    return loss


@becomes(LOSS)
def of_constant_logits_by_token(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).detach()
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    losses[0] = bias[0]
    return losses.sum()


@becomes(LOSS)
def nothing_to_shift(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h[:, :0], weight)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), y[:, :0].flatten(), reduction="sum") + bias.sum()


# Written by hand.


@becomes(STATISTICS)
def label_smoother(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Transformers' LabelSmoother, which Trainer uses for label_smoothing_factor."""
    logits, labels = F.linear(h, weight)[..., :-1, :].contiguous(), y[..., 1:].contiguous()
    log_probs = -nn.functional.log_softmax(logits, dim=-1)
    if labels.dim() == log_probs.dim() - 1:
        labels = labels.unsqueeze(-1)
    padding_mask = labels.eq(IGNORE)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    num_active_elements = padding_mask.numel() - padding_mask.long().sum()
    nll_loss = nll_loss.sum() / num_active_elements
    smoothed_loss = smoothed_loss.sum() / (num_active_elements * log_probs.shape[-1])
    return 0.9 * nll_loss + 0.1 * smoothed_loss


@becomes(STATISTICS)
def timm(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Timm's LabelSmoothingCrossEntropy."""
    x, target = F.linear(h, weight).flatten(0, 1), y.flatten().clamp(min=0)
    logprobs = F.log_softmax(x, dim=-1)
    nll_loss = -logprobs.gather(dim=-1, index=target.unsqueeze(1))
    nll_loss = nll_loss.squeeze(1)
    smooth_loss = -logprobs.mean(dim=-1)
    return (0.9 * nll_loss + 0.1 * smooth_loss).mean()


@becomes(STATISTICS)
def gathered_log_probs(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Preference optimisation, reinforcement learning."""
    logps = F.linear(h, weight)[:, :-1].log_softmax(-1)
    index = y[:, 1:].clamp(min=0).unsqueeze(2)
    logps = torch.gather(logps, 2, index).squeeze(2)
    mask = y[:, 1:] != IGNORE
    return -(logps * mask).sum(-1).mean()


@becomes(STATISTICS)
def indexed(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = torch.log_softmax(F.linear(h, weight).flatten(0, 1), -1)
    target = y.flatten().clamp(min=0)
    return -log_probs[torch.arange(target.shape[0]), target].mean()


@becomes(STATISTICS)
def one_hot(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    target = F.one_hot(y.clamp(min=0), weight.shape[0]).float()
    return -(target * F.log_softmax(F.linear(h, weight), dim=-1)).sum(dim=-1).mean()


@becomes(STATISTICS)
def logsumexp_minus_target(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight, bias).float()
    target = logits.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return (torch.logsumexp(logits, dim=-1) - target).mean()


@becomes(STATISTICS)
def normalised_logits(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    return -log_probs.take_along_dim(y.clamp(min=0)[..., None], dim=-1).mean()


@becomes(STATISTICS)
def softmax_and_log(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    probs = F.linear(h, weight).softmax(-1)
    return -probs.gather(-1, y.clamp(min=0)[..., None]).log().mean()


@becomes(STATISTICS)
def z_loss(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """PaLM, OLMo."""
    logits = F.linear(h, weight).flatten(0, 1)
    loss = F.cross_entropy(logits, y.flatten(), label_smoothing=0.1)
    return loss + 1e-3 * logits.logsumexp(-1).pow(2).mean()


@becomes(STATISTICS)
def entropy_bonus(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    probs, log_probs = F.softmax(logits, -1), F.log_softmax(logits, -1)
    entropy = -(probs * log_probs).sum(-1).mean()
    nll = -log_probs.gather(-1, y.clamp(min=0).unsqueeze(-1)).mean()
    return nll - 0.1 * entropy


@becomes(STATISTICS)
def entropy_of_logits(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """TRL's entropy_from_logits, without its chunks."""
    logits = F.linear(h, weight).flatten(0, 1)
    entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    return F.cross_entropy(logits, y.flatten(), reduction="sum") - entropy.sum()


@becomes(STATISTICS)
def accuracy_beside(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, weight)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
    with torch.no_grad():
        accuracy = (logits.argmax(dim=-1) == y).float().mean()
        confidence = logits.softmax(-1).max(-1).values.mean()
    return loss, accuracy, confidence


@becomes(STATISTICS)
def two_targets(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).transpose(1, 2)
    return F.cross_entropy(logits, y) + F.cross_entropy(logits, y.flip(0), reduction="sum") / 50


@becomes(STATISTICS)
def metric_first(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, weight)
    with torch.no_grad():
        largest, predicted = logits.detach().max(-1)
        right = (predicted == y).sum()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), right, largest


@becomes(STATISTICS)
def metric_in_inference_mode(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, weight)
    with torch.inference_mode():
        predicted = logits.argmax(-1)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), predicted


@becomes(STATISTICS)
def ids_from_the_end(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = F.linear(h, weight).flatten(0, 1).log_softmax(-1)
    ids = y.flatten().clamp(min=0) - weight.shape[0]
    return -log_probs[torch.arange(ids.shape[0]), ids].mean()


@becomes(STATISTICS)
def constants_changed_in_place(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).detach()
    nll = -logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])
    nll += bias.sum()
    return nll.mean()


@becomes(STATISTICS)
def classes_second_by_hand(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = F.linear(h, weight).log_softmax(-1)
    target = F.one_hot(y.clamp(min=0), weight.shape[0]).float()
    nll = -(target * log_probs).transpose(1, 2).sum(1, keepdim=True)  # (B, 1, T)
    smooth = -log_probs.transpose(1, 2).sum(1, keepdim=True)
    return (nll + 0.1 * smooth).cumsum(-1).mean()


# Left alone.


@becomes("its logits are needed for matmul")
def fed_back(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    expected = logits.softmax(-1) @ weight
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + expected.square().mean()


@becomes("its logits are needed for argmax")
def written_out(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits, predicted = F.linear(h, weight), torch.empty_like(y)
    with torch.no_grad():
        torch.argmax(logits, -1, out=predicted)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), predicted


@becomes("its logits are needed for sum")
def whole_numbers(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, weight)
    total = logits.detach().sum(-1, dtype=torch.int64)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), total


@becomes("its logits are needed for reshape")
def bits(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, weight)
    largest = logits.detach().view(torch.int64).argmax(-1)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), largest


@becomes("its logits are scaled by 0.0")
def next_to_nothing(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight) * 1e-200 * 1e-200
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@becomes("the graph has no linear layer of its logits")
def one_bias_for_all(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.addmm(bias[:1], h.flatten(0, 1), weight.t()), y.flatten())


@becomes("the graph has no linear layer of its logits")
def broadcast_states(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.einsum("btd,vd->btv", h[..., :1], weight).mT, y)


@becomes("its targets are computed after its first use, not from ids alone")
def targets_by_another_head(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = F.linear(h, weight).log_softmax(-1)
    mean = log_probs.mean(-1).mean()
    with torch.no_grad():
        constant = h * 2
    nll = -log_probs.gather(-1, constant.argmax(-1, keepdim=True)).mean()
    return nll - mean + constant.mean()


@becomes("its targets are computed from its logits, in place or at random")
def targets_by_chance(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = F.linear(h, weight).log_softmax(-1)
    smooth = -log_probs.mean(-1).mean()
    ids = torch.randint(0, 1, (*y.shape, 1))  # the next random number comes after these
    return smooth - log_probs.gather(-1, ids).mean()


@becomes("it is inside a transform of torch.func")
def per_sequence_by_vmap(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    def loss(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight), y)

    return torch.vmap(loss)(h, y).sum()


@becomes("it is inside a transform of torch.func")
def gradient_by_func(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    def loss(bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight, bias).flatten(0, 1), y.flatten())

    return torch.func.grad(loss)(bias).square().sum()


@becomes("a tensor that it is computed from is changed in place")
def states_changed_after_the_loss(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    states = h * 2
    logits = F.linear(states, weight.detach())
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    states.zero_()
    return loss


@becomes("its logits are needed for topk")
def topk_beside(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits.topk(3).indices


@becomes("cross_entropy is given weight=")
def class_weights(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(
        F.linear(h, weight).flatten(0, 1), y.flatten(), weight=bias.detach().exp()
    )


@becomes("cross_entropy is given probabilities, not ids, as target")
def distillation(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).flatten(0, 1)
    return F.cross_entropy(logits, torch.softmax(bias, 0).detach().expand(y.numel(), -1))


@becomes("its logits are changed in place by itruediv")
def scaled_in_place(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits /= 2
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@becomes("its logits are needed for masked_fill")
def forbidden_tokens(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).masked_fill(torch.arange(weight.shape[0]) == 1, -1e9)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten().clamp(min=2))


@becomes("its logits are needed for div")
def learned_temperature(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((F.linear(h, weight) / bias[0].exp()).flatten(0, 1), y.flatten())


@becomes("its logits are needed for chunk")
def chunks(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    parts = zip(F.linear(h, weight).chunk(2, 1), y.chunk(2, 1), strict=True)
    return sum(F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum") for z, t in parts)


@becomes("its logits are needed for kl_div")
def kl_divergence(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    log_probs = F.log_softmax(F.linear(h, weight).flatten(0, 1), -1)
    teacher = torch.softmax(bias, 0).detach().expand(y.numel(), -1)
    return F.nll_loss(log_probs, y.flatten()) + F.kl_div(log_probs, teacher, reduction="batchmean")


@becomes("its logits are used scaled in several ways, or of several sets of tokens")
def two_temperatures(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).flatten(0, 1)
    return F.cross_entropy(logits, y.flatten()) + F.cross_entropy(logits / 2, y.flatten())


@becomes("its largest logit is differentiated")
def margin(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, weight).flatten(0, 1)
    return F.cross_entropy(logits, y.flatten()) + 0.1 * logits.amax(-1).mean()


@becomes("its logits are needed for stack")
def mixture(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = torch.stack([F.linear(h, weight), F.linear(h, weight, bias)]).mean(0)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@becomes("a tensor that it is computed from is changed in place")
def states_reused(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    states = h * 2
    logits = F.linear(states, weight.detach())
    states.mul_(0)  # which autograd allows: nothing of it is needed with a frozen head
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + states.sum()


@becomes("the graph has no linear layer of its logits")
def broadcast_product(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    logits = (h[..., None, :] * weight).sum(-1)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())
