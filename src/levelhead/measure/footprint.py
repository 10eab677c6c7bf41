"""What head and loss take of a GPU's memory, and how many operations: every formula, in one place.

N tokens, D hidden units, V vocabulary entries, b bytes a number (2 for bfloat16). A method goes through moments; a
moment is the tensors that stand then, beyond the weight and the hidden states. The peak is that of the worst moment,
its own gradients included. Vectors of N numbers, and what allocators round up, are left out.

Each formula was read off the code it describes, and the tests hold each that a CPU can run to its measured peak.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from levelhead.ops import chunked
from levelhead.ops.sizes import sizes
from levelhead.ops.statistics import statistics_dtype

Moments = dict[str, dict[str, int]]  # moment -> tensor -> bytes


@dataclass(frozen=True)
class Problem:
    """A head and its loss as one device has them.

    Attributes:
        tokens: Tokens of a micro-batch, ignored ones included.
        hidden: Width of the head's input.
        vocabulary: Rows of the whole head.
        dtype: Of weight, hidden states and gradients.
        frozen: The head is not trained, as under LoRA.
        softcap: The model caps its logits (Gemma 2).
        ranks: Tensor-parallel ranks that share the rows of the head.
        device: "cuda" or "cpu"; on a CPU narrow weights are multiplied as float32 copies, a tile at a time.
    """

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    frozen: bool = False
    softcap: bool = False
    ranks: int = 1
    device: str = "cuda"

    @property
    def rows(self) -> int:
        """Rows of the head that this device holds."""
        return -(-self.vocabulary // self.ranks)

    @property
    def narrow(self) -> bool:
        """Whether sums need a wider dtype than the operands."""
        return self.dtype.itemsize < 4

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number in which sums accumulate: float32, or float64 for float64."""
        return max(4, self.dtype.itemsize)

    @property
    def logits(self) -> int:
        """Numbers in the whole matrix of logits."""
        return self.tokens * self.vocabulary

    def gradients(self) -> dict[str, int]:
        """The gradients that any method leaves."""
        b = self.dtype.itemsize
        left = {"gradient of the hidden states": b * self.tokens * self.hidden}
        return left if self.frozen else left | {"gradient of the weight": b * self.weight_numbers}

    @property
    def weight_numbers(self) -> int:
        """Numbers in this device's rows of the head."""
        return self.rows * self.hidden


class Peak(NamedTuple):
    """The worst moment of a method: when, the bytes of each tensor that stands then, and their sum."""

    moment: str
    tensors: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes beyond the weight and the hidden states, gradients included."""
        return sum(self.tensors.values())


def dense(problem: Problem) -> Moments:
    """`F.cross_entropy(F.linear(x, w).float(), y)`: 8 NV forward, 12 NV backward, whatever the dtype."""
    wide = problem.wide_bytes * problem.logits
    return {
        "forward": {"logits, float32": wide, "log-softmax": wide},
        **_dense_backward(problem, {}),
    }


def _dense_backward(problem: Problem, saved: dict[str, int]) -> Moments:
    """From the log-softmax, which autograd saved, back to the head; `saved` stands beside it."""
    wide, logits = problem.wide_bytes * problem.logits, problem.dtype.itemsize * problem.logits
    return {
        "backward of the log-softmax": {
            **saved,
            "log-softmax": wide,
            "gradient of the log-softmax": wide,
            "gradient of the logits": wide,
        },
        "backward of the head": {"gradient of the logits": logits, **problem.gradients()},
    }


def transformers_loss(problem: Problem) -> Moments:
    """The loss of a Hugging Face model (`ForCausalLMLoss`), as `Trainer` calls it: (4 + 4 + b) NV, then 12 NV.

    `logits.float()` is a copy of narrow logits, beside the originals that the model returns; those go when
    `Trainer.compute_loss` returns. Labels are shifted, not logits: no copy of these. A softcap saves its tanh, b NV,
    from forward to backward. The model's own tensor-parallel plan gathers the logits of all ranks before the loss.
    """
    wide, b = problem.wide_bytes * problem.logits, problem.dtype.itemsize
    saved = {"tanh of the softcap": b * problem.logits} if problem.softcap else {}
    returned = {"logits": b * problem.logits} if problem.narrow else {}
    return {
        **_gathered_logits(problem),
        "forward": {**saved, **returned, "logits, float32": wide, "log-softmax": wide},
        **_dense_backward(problem, saved),
    }


def label_smoother(problem: Problem) -> Moments:
    """Hugging Face's label smoothing (`TrainingArguments.label_smoothing_factor`): 4 b NV, in the dtype of the model.

    The logits, their shifted copy (none for a batch of one sequence), the log-softmax and its negative, all narrow:
    the loss is less exact than `ForCausalLMLoss`. A CPU sums them through a float32 copy.
    """
    logits = problem.dtype.itemsize * problem.logits
    saved = {"tanh of the softcap": logits} if problem.softcap else {}
    widened = 4 * problem.logits if problem.narrow and problem.device == "cpu" else 0
    gradients = problem.gradients()
    return {
        **_gathered_logits(problem),
        "forward": {
            **saved,
            "logits": logits,
            "shifted copy": logits,
            "log-softmax": logits,
            "negative log-softmax": logits,
            "float32 copy, to sum": widened,
        },
        "backward of the head": {"gradient of the logits": logits, **gradients},
    }


def _gathered_logits(problem: Problem) -> Moments:
    if problem.ranks == 1:
        return {}
    b, own = problem.dtype.itemsize, problem.tokens * problem.rows
    return {"gather": {"logits of this rank": b * own, "gathered logits": b * problem.logits}}


def compiled(problem: Problem) -> Moments:
    """The dense loss by torch.compile: the logits, b NV, and their gradient in their place; on a CPU up to V = 300 N.

    Beyond that Inductor does not fuse their loops.
    """
    logits = problem.dtype.itemsize * problem.logits
    unfused = problem.device == "cpu" and problem.vocabulary > 300 * problem.tokens
    return {
        "loss": {"logits": logits, "gradient of the logits": logits if unfused else 0},
        "backward of the head": {"gradient of the logits": logits, **problem.gradients()},
    }


def torch_chunked(problem: Problem) -> Moments:
    """`F.linear_cross_entropy` of torch >= 2.13, its chunking asked for, without smoothing; on CUDA or in float32.

    Chunks of C = nextpow2(N / ceil(V / D)) / 2 tokens; 4 CV for the logits, b CV for their narrow gradient. The weight
    gradient accumulates in the dtype of the weight. Backward copies the gradients, since the graph still holds them.
    """
    b, d, v = problem.dtype.itemsize, problem.hidden, problem.vocabulary
    tokens = _torch_chunk(problem)
    buffers = {"logits of a chunk": problem.wide_bytes * tokens * v}
    if problem.narrow:
        buffers["gradient of a chunk's logits"] = b * tokens * v
        buffers["float32 copy of a chunk's hidden states"] = 0 if problem.frozen else 4 * tokens * d
    gradients = problem.gradients()
    return {
        "a chunk": {**buffers, **gradients},
        "backward": {**gradients, **{f"{name}, copied": n for name, n in gradients.items()}},
    }


def _torch_chunk(problem: Problem) -> int:
    most = -(-problem.tokens // -(-problem.vocabulary // problem.hidden))
    return max(1, min((1 << (most - 1).bit_length()) // 2, problem.tokens))


def levelhead_chunked(problem: Problem) -> Moments:
    """`levelhead.linear_cross_entropy` by PyTorch's products: chunks of logits, 1/8 of the weight or 31.5 MiB.

    The gradients of narrow operands accumulate in float32: 4 VD and 4 ND beside their rounded form.
    """
    if problem.ranks > 1:
        return _parallel(problem, _chunked_buffers(problem, problem.tokens))
    buffers = 2 if problem.softcap else 1
    weight, dtype = _weight(problem), statistics_dtype(problem.dtype)
    tokens = chunked.chunk_tokens(problem.tokens, weight, dtype, buffers=buffers)
    logits = {"buffer of logits": buffers * dtype.itemsize * tokens * len(weight)}
    kept = logits | _masked_input(problem)
    tile, last = _cpu_tile(problem)
    return {
        # The next tile is cast while the last one is held still.
        "a chunk": kept
        | _sums(problem)
        | {"tiles of the weight, float32": min(2 * tile, tile + last)},
        "rounding the gradients": _rounding(problem) | kept | {"tile of the weight, float32": last},
        "backward": _kept_until_backward(problem),
    }


def levelhead_triton(problem: Problem) -> Moments:
    """`levelhead.linear_cross_entropy` through its kernels: float32 logits of 512 tokens, narrow gradients of 2048.

    4 * 512 V + b * 2048 V; of a frozen head (4 + b) * 512 V. With more than one chunk of 2048 tokens the gradient of a
    narrow weight accumulates in float32, 4 VD. Needs triton installed, for the sizes.
    """
    b, wide, d = problem.dtype.itemsize, problem.wide_bytes, problem.hidden
    if problem.ranks > 1:
        slab = int(sizes().gradient_share * problem.rows * d) // problem.tokens
        slab = max(sizes().gradient_entries, slab)
        whole = -(-problem.rows // -(-problem.rows // slab))
        slab = min(-(-whole // sizes().entry_alignment) * sizes().entry_alignment, problem.rows)
        return _parallel(problem, {"gradient of a slab of logits": b * problem.tokens * slab})
    few = sizes().logits_tokens
    many = sizes().gradient_tokens if problem.narrow and not problem.frozen else few
    chunks = -(-problem.tokens // many)
    tokens = -(-problem.tokens // chunks)
    aligned = -(-problem.vocabulary // sizes().row_alignment) * sizes().row_alignment
    buffers = {"gradient of a chunk's logits": b * tokens * aligned}
    if problem.narrow:
        buffers["logits of 512 tokens, float32"] = wide * min(few, problem.tokens) * aligned
    kept = buffers | _masked_input(problem)
    if problem.dtype != torch.bfloat16:  # sums in place, or kept in float32 until backward
        return {"a chunk": kept | _sums(problem), "backward": _kept_until_backward(problem)}
    # Products are narrow at once, but for the sum over chunks; each is rounded from some rows in float32.
    gradients = problem.gradients()
    rows = tokens if chunks > 1 or problem.frozen else max(tokens, problem.vocabulary)
    rounded = {"rows of a gradient, float32": wide * d * min(sizes().sum_rows, rows)}
    if problem.frozen or chunks == 1:
        return {"a chunk": kept | gradients | rounded}
    total = {"gradient of the weight, float32": wide * problem.weight_numbers}
    of_input = "gradient of the hidden states"
    return {
        "a chunk": kept | total | {of_input: gradients[of_input]} | rounded,
        "rounding the gradients": kept | total | gradients,
    }


def _chunked_buffers(problem: Problem, tokens: int) -> dict[str, int]:
    """Two buffers of tiles for the rows of this rank, and the float32 sum of a narrow weight's tile."""
    wide, budget = problem.wide_bytes, chunked.buffer_budget(_weight(problem))
    tokens = min(sizes().tile_tokens, tokens)
    entries = min(max(budget // (2 * wide * tokens), 1), problem.rows)
    buffers = {"buffers of logits": 2 * wide * tokens * entries}
    if problem.narrow and not problem.frozen:
        buffers["gradient of a tile of the weight, float32"] = wide * entries * problem.hidden
    return buffers


def _parallel(problem: Problem, buffers: dict[str, int]) -> Moments:
    """A head shared by ranks: statistics forward, merged over the ranks, and a backward that recomputes the logits."""
    wide = {
        "sum for the hidden states, float32": problem.wide_bytes * problem.tokens * problem.hidden
    }
    held = {**buffers, **(wide if problem.narrow else {}), **_masked_input(problem)}
    return {"backward": {**held, **problem.gradients()}}


def _sums(problem: Problem) -> dict[str, int]:
    """The gradients as they accumulate."""
    ratio = problem.wide_bytes // problem.dtype.itemsize
    return {f"{name}, float32": ratio * n for name, n in problem.gradients().items()}


def _rounding(problem: Problem) -> dict[str, int]:
    """The sums, and what they are rounded to; float16 waits for the backward, wide ones are done."""
    if problem.dtype == torch.bfloat16:
        return _sums(problem) | problem.gradients()
    return _sums(problem)


def _kept_until_backward(problem: Problem) -> dict[str, int]:
    return _sums(problem) | problem.gradients() if problem.dtype == torch.float16 else {}


def _masked_input(problem: Problem) -> dict[str, int]:
    """On an accelerator ignored tokens are overwritten in a copy: their number is not known there."""
    if problem.device == "cpu":
        return {}
    return {
        "hidden states, ignored ones masked": problem.dtype.itemsize
        * problem.tokens
        * problem.hidden
    }


def _cpu_tile(problem: Problem) -> tuple[int, int]:
    """Bytes of the first and the last float32 copy of a tile of a narrow weight, which only a CPU makes."""
    if problem.device != "cpu" or not problem.narrow:
        return 0, 0
    row = 4 * problem.hidden
    most = min(max(1, sizes().cast_bytes // row), problem.rows)
    tiles = -(-problem.rows // most)
    entries = -(-problem.rows // tiles)
    return row * entries, row * (problem.rows - (tiles - 1) * entries)


def _weight(problem: Problem) -> torch.Tensor:
    return torch.empty(problem.rows, problem.hidden, dtype=problem.dtype, device="meta")


class Method(NamedTuple):
    """A way to the loss: its formula, and what it can do.

    Attributes:
        name: What people call it.
        moments: Its formula.
        smoothing: It smooths labels.
        parallel: Tensor-parallel ranks can share its head's rows.
        softcap: It can cap logits, and the formula was measured with a cap.
    """

    name: str
    moments: Callable[[Problem], Moments]
    smoothing: bool = True
    parallel: bool = True
    softcap: bool = True

    def why_not(self, problem: Problem) -> str:
        """Why there are no numbers for a problem; empty if there are."""
        if problem.ranks > 1 and not self.parallel:
            return "has no form for a head that tensor-parallel ranks share"
        if problem.softcap and not self.softcap:
            return "does not cap logits, or was not measured with a cap"
        return ""


TRANSFORMERS = Method("transformers loss", transformers_loss, smoothing=False)
CHUNKED = Method("levelhead, chunked", levelhead_chunked)
TRITON = Method("levelhead, triton", levelhead_triton)
METHODS = (
    TRANSFORMERS,
    Method("transformers LabelSmoother", label_smoother),
    Method("dense, torch.compile", compiled, parallel=False, softcap=False),
    Method("F.linear_cross_entropy, chunked", torch_chunked, False, False, False),
    CHUNKED,
    TRITON,
)


def peak(method: Method, problem: Problem) -> Peak:
    """The worst moment of a method."""
    moments = {moment: tensors for moment, tensors in method.moments(problem).items() if tensors}
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Peak(worst, {name: size for name, size in moments[worst].items() if size})


def extra_bytes(method: Method, problem: Problem) -> int:
    """The peak beyond weight, hidden states and the gradients that are left: what `levelhead bench` measures."""
    return peak(method, problem).total - sum(problem.gradients().values())


def products(method: Method, problem: Problem) -> int:
    """How many products of 2 NVD operations: logits, gradient of the hidden states, gradient of the weight.

    So 6 NVD, or 4 with a frozen head. Levelhead's shared head recomputes the logits in its backward: 8, or 6.
    """
    again = problem.ranks > 1 and method in (CHUNKED, TRITON)
    return 2 + again + (not problem.frozen)


def operations(method: Method, problem: Problem) -> int:
    """Floating-point operations of one device, forward and backward; a multiply-add is two."""
    return products(method, problem) * 2 * problem.tokens * problem.weight_numbers


def longest(fits: Callable[[Problem], bool], problem: Problem) -> int:
    """The most tokens for which a problem fits, found by bisection; 0 if not one does."""
    low, high = 0, 1
    while fits(replace(problem, tokens=high)):
        low, high = high, 2 * high
        if high > 2**40:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(problem, tokens=middle)) else (low, middle)
    return low
