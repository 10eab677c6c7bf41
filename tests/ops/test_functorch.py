"""Under torch.func: grad, vjp and vmap in any order equal the dense loss; forward mode is refused in words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from tests.problems import assert_equal
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as over

import levelhead

B, N, D, V, K = 3, 7, 5, 11, 2
REDUCTIONS = ["mean", "sum", "none"]
Loss = Callable[..., Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


X, W, BIAS = normal(B, N, D), 1.5 * normal(B, V, D), normal(B, V)
T = torch.randint(0, V, (B, N), generator=torch.Generator().manual_seed(0))
T[0, :3] = T[2, 1] = -100
PICKS = torch.randint(-1, V + 1, (B, N, K), generator=torch.Generator().manual_seed(1))
x, w, bias, t = X[0], W[0], BIAS[0], T[0]


def ours(reduction: Any) -> Loss:
    def loss(x: Tensor, w: Tensor, bias: Tensor, t: Tensor) -> Tensor:
        return levelhead.linear_cross_entropy(
            x, w, t, linear_bias=bias, label_smoothing=0.1, softcap=3.0, z_loss=0.01,
            reduction=reduction,
        )  # fmt: skip

    return loss


def dense(reduction: str) -> Loss:
    """F.cross_entropy, spelled out: it cannot be vmapped over target alone when it smooths."""

    def loss(x: Tensor, w: Tensor, bias: Tensor, t: Tensor) -> Tensor:
        z = 3 * torch.tanh((x @ w.T + bias) / 3)
        log_p, counts = z.log_softmax(-1), t != -100
        picked = log_p.gather(-1, t.where(counts, 0)[..., None])[..., 0]
        losses = -0.9 * picked - 0.1 * log_p.mean(-1) + 0.01 * z.logsumexp(-1).square()
        losses = losses * counts
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()

    return loss


def total(loss: Loss) -> Loss:
    """Every token's loss by a factor of its own, a scalar loss as it is."""

    def scalar(*args: Tensor) -> Tensor:
        value = loss(*args)
        return (value * torch.linspace(0.5, 2, N).double()).sum() if value.dim() else value

    return scalar


HEAD = (0, 1, 2)  # of the arguments of a loss: what has gradients
TRANSFORMED: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda f: grad(total(f), HEAD)(x, w, bias, t),
    "grad of the input": lambda f: grad(total(f))(x, w, bias, t),
    "grad of the weight": lambda f: grad(total(f), 1)(x, w, bias, t),
    "grad_and_value": lambda f: grad_and_value(total(f), HEAD)(x, w, bias, t),
    "vjp": lambda f: vjp(lambda *a: total(f)(*a, t), x, w, bias)[1](torch.tensor(0.7).double()),
    "jacrev": lambda f: jacrev(f, HEAD)(x, w, bias, t),
    "grad of a part of a batch": lambda f: grad(
        lambda x: total(f)(x.flatten(0, 1)[:N], w, bias, t)
    )(X),
    "vmap": lambda f: over(f)(X, W, BIAS, T),
    "vmap over input": lambda f: over(f, (0, None, None, None))(X, w, bias, t),
    "vmap over target": lambda f: over(f, (None, None, None, 0))(x, w, bias, T),
    "vmap over input and target": lambda f: over(f, (0, None, None, 0))(X, w, bias, T),
    "vmap over weight": lambda f: over(f, (None, 0, None, None))(x, W, bias, t),
    "vmap over bias": lambda f: over(f, (None, None, 0, None))(x, w, BIAS, t),
    "vmap over other dimensions": lambda f: over(f, (1, 2, None, 1))(
        X.movedim(0, 1), W.movedim(0, 2), bias, T.T
    ),
    "vmap of vmap": lambda f: over(over(f, (0, None, None, 0)), (None, 0, None, None))(
        X, W, bias, T
    ),
    "gradients per sample": lambda f: over(grad(total(f), HEAD), (0, None, None, 0))(X, w, bias, T),
    "gradients of the input per sample": lambda f: over(grad(total(f)), (0, None, None, 0))(
        X, w, bias, T
    ),
    "gradients per head": lambda f: over(grad(total(f), HEAD), (None, 0, 0, None))(x, W, BIAS, t),
    "grad of vmap": lambda f: grad(
        lambda *a: over(total(f), (0, None, None, 0))(*a, T).square().sum(), HEAD
    )(X, w, bias),
    "grad of vmap over heads": lambda f: grad(
        lambda *a: over(total(f), (None, 0, 0, None))(*a, t).square().sum(), HEAD
    )(x, W, BIAS),
    "grad of vmap, of the weight alone": lambda f: grad(
        lambda w: over(total(f), (0, None, None, 0))(X, w, bias, T).sum()
    )(w),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transformed_loss_is_the_dense_one(name: str, reduction: str) -> None:
    transform = TRANSFORMED[name]
    assert_equal(transform(ours(reduction)), transform(dense(reduction)))


def test_ignored_tokens_may_hold_nan() -> None:
    holed = x.masked_fill(t[:, None] == -100, torch.nan)
    found = grad(ours("mean"), HEAD)(holed, w, bias, t)
    assert_equal(found, grad(dense("mean"), HEAD)(x, w, bias, t))


def entropy(x: Tensor, w: Tensor, bias: Tensor, picks: Tensor) -> Tensor:
    stats = levelhead.linear_logit_stats(x, w, picks, linear_bias=bias, logit_scale=0.5)
    return (stats.logsumexp - stats.expected - stats.mean + stats.picked.square().sum(1)).sum()


def dense_entropy(x: Tensor, w: Tensor, bias: Tensor, picks: Tensor) -> Tensor:
    z = 0.5 * (x @ w.T + bias)
    inside = (picks >= 0) & (picks < V)
    picked = z.gather(1, picks.where(inside, 0)) * inside
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    return (entropy - z.mean(1) + picked.square().sum(1)).sum()


@pytest.mark.parametrize("per_sample", [HEAD, 0])
def test_statistics(per_sample: Any) -> None:
    for transform in (
        lambda f: grad(f, per_sample)(x, w, bias, PICKS[0]),
        lambda f: over(grad(f, per_sample), (0, None, None, 0))(X, w, bias, PICKS),
        lambda f: grad(lambda *a: over(f)(*a, PICKS).prod(), per_sample)(X, W, BIAS),
    ):
        assert_equal(transform(entropy), transform(dense_entropy))


def test_statistics_of_a_batch_hold_the_largest_logit_too() -> None:
    batch = over(levelhead.linear_logit_stats, (0, None, 0))(X, w, PICKS)
    assert_equal(batch, levelhead.linear_logit_stats(X, w, PICKS))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_module_called_functionally_with_parameters_per_head(reduction: Any) -> None:
    module = levelhead.LinearCrossEntropyLoss(
        D, V, bias=True, dtype=torch.float64, reduction=reduction
    )
    heads = {"linear.weight": W, "linear.bias": BIAS}
    called = over(lambda head: functional_call(module, head, (x, t)))
    each = [
        levelhead.linear_cross_entropy(x, W[i], t, linear_bias=BIAS[i], reduction=reduction)
        for i in range(B)
    ]
    assert_equal(called(heads), torch.stack(each))
    found = grad(lambda heads: called(heads).square().sum())(heads)
    leaves = [W.clone().requires_grad_(), BIAS.clone().requires_grad_()]
    called(dict(zip(heads, leaves, strict=True))).square().sum().backward()
    assert_equal(list(found.values()), [leaf.grad for leaf in leaves])


def test_weights_and_smoothing_of_tokens_are_transformed_too() -> None:
    def loss(weight: Tensor, eps: Tensor) -> Tensor:
        return levelhead.linear_cross_entropy(x, w, t, label_smoothing=eps, token_weight=weight)

    args = torch.linspace(0.1, 1, N).double(), torch.full((N,), 0.2).double()
    leaves = [arg.clone().requires_grad_() for arg in args]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert_equal(grad(loss, (0, 1))(*args), expected)
    assert_equal(jacfwd(loss, (0, 1))(*args), expected)  # which is linear in them, without a kernel
    head = w.clone().requires_grad_()  # a mean with a gradient of its own
    with fw.dual_level():
        weight = fw.make_dual(args[0], torch.ones(N).double())
        value = levelhead.linear_cross_entropy(
            x, head, t, label_smoothing=args[1], token_weight=weight
        )
        assert_equal(fw.unpack_dual(value).tangent, expected[0].sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_upstream_gradients(reduction: Any) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, bias)]
    shape = (N,) if reduction == "none" else ()
    upstream = torch.linspace(-1, 2, B * max(N * len(shape), 1)).double().view(B, *shape)

    def gradients(g: Tensor, **options: Any) -> Any:
        return torch.autograd.grad(ours(reduction)(*leaves, t), leaves, g, **options)

    each = [gradients(g) for g in upstream]
    expected = tuple(torch.stack(field) for field in zip(*each, strict=True))
    assert_equal(gradients(upstream, is_grads_batched=True), expected)
    loss = ours(reduction)(*leaves, t)
    assert_equal(over(lambda g: torch.autograd.grad(loss, leaves, g))(upstream), expected)


def test_a_target_outside_the_vocabulary_is_found_in_a_batch() -> None:
    wrong = T.clone()
    wrong[1, 2] = V
    with pytest.raises(IndexError, match=rf"target\[1, 2\] is {V}, outside \[0, {V}\)"):
        over(ours("mean"), (0, None, None, 0))(X, w, bias, wrong)


def test_without_gradient_a_batch_has_no_graph() -> None:
    with torch.no_grad():
        head = w.clone().requires_grad_()
        assert not over(ours("sum"), (0, None, None, 0))(X, head, bias, T).requires_grad


def test_the_operators_themselves_under_vmap() -> None:
    ops, token = torch.ops.levelhead, torch.ones(B, N).double()
    args = (None, 3.0, 1.0, "chunked")
    stats = over(lambda x, t: ops.linear_logit_stats(x, w, t[:, None], *args))(X, T)
    each = [ops.linear_logit_stats(X[i], w, T[i, :, None], *args) for i in range(B)]
    assert_equal(list(stats), [torch.stack(field) for field in zip(*each, strict=True)])

    def backward(x: Tensor, t: Tensor, g: Tensor, lse: Tensor, largest: Tensor) -> Any:
        options = (3.0, 1.0, [True, False, False], "chunked")
        return ops.linear_logit_stats_backward(
            g, None, None, None, x, w, t[:, None], None, lse, lse, largest, *options
        )[0]

    arguments = (X, T, token, stats[0], stats[4])
    each = [backward(*call) for call in zip(*arguments, strict=True)]
    assert_equal(over(backward)(*arguments), torch.stack(each))

    def loss(x: Tensor, w: Tensor, t: Tensor, token: Tensor) -> Any:
        options = (0.0, 3.0, 1.0, [True, True, False], "chunked")
        return ops.linear_cross_entropy(x, w, t, None, token, None, *options)[:3]

    token = (T != -100).double()
    each = [loss(X[i], w, T[i], token[i]) for i in range(B)]
    batch = over(loss, (0, None, 0, 0))(X, w, T, token)
    assert_equal(list(batch), [torch.stack(field) for field in zip(*each, strict=True)])


FORWARD: dict[str, Callable[[Loss], Any]] = {
    "jvp": lambda f: jvp(lambda x: f(x, w, bias, t), (x,), (x,)),
    "jvp of the weight": lambda f: jvp(lambda w: f(x, w, bias, t), (w,), (w,)),
    "jvp of vmap": lambda f: jvp(lambda x: over(f, (0, None, None, 0))(x, w, bias, T), (X,), (X,)),
    "jacfwd": lambda f: jacfwd(lambda bias: f(x, w, bias, t))(bias),
    "hessian": lambda f: hessian(lambda x: total(f)(x, w, bias, t))(x),
    "grad of jvp": lambda f: grad(lambda x: jvp(lambda w: total(f)(x, w, bias, t), (w,), (w,))[1])(
        x
    ),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_refused(name: str, reduction: str) -> None:
    FORWARD[name](dense(reduction))
    with pytest.raises(RuntimeError, match="does not implement forward-mode differentiation"):
        FORWARD[name](ours(reduction))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("index", HEAD)
def test_a_dual_tensor_is_refused(index: int, reduction: str, requires_grad: bool) -> None:
    tensors = [tensor.clone().requires_grad_(requires_grad) for tensor in (x, w, bias)]
    with fw.dual_level():
        value = ours(reduction)(*tensors, t)  # without a tangent nothing is to be refused
        assert_equal(value, dense(reduction)(*tensors, t))
        tensors[index] = fw.make_dual(tensors[index], torch.ones_like(tensors[index]))
        with pytest.raises(RuntimeError, match=r"Use reverse mode \(torch\.func\.grad"):
            ours(reduction)(*tensors, t)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_dual_upstream_gradient_is_not_lost(reduction: str) -> None:
    leaf = x.clone().requires_grad_()
    loss = ours(reduction)(leaf, w, bias, t)
    with fw.dual_level():
        upstream = fw.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(RuntimeError, match="does not implement forward-mode"):
            torch.autograd.grad(loss, leaf, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(reduction: str) -> None:
    def norm(x: Tensor) -> Tensor:
        return grad(total(ours(reduction)))(x, w, bias, t).square().sum()

    with pytest.raises(RuntimeError, match="does not implement double backward"):
        grad(norm)(x)


@pytest.fixture
def fresh_compiler():
    """What it gave up on would run uncompiled in later tests, too."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo makes an instance of the autograd.Function before it gives up on it.
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_around_or_inside_it_is_the_same() -> None:
    """The compiler leaves a transformed loss to run as it is: a break in the graph."""

    def outside(x: Tensor) -> Any:
        return over(grad(ours("mean"), HEAD), (0, None, None, 0))(x, w, bias, T)

    def inside(x: Tensor) -> Any:
        return grad(torch.compile(ours("mean"), backend="aot_eager"))(x, w, bias, t)

    assert_equal(torch.compile(outside, backend="aot_eager")(X), outside(X))
    assert_equal(inside(x), grad(ours("mean"))(x, w, bias, t))
    with pytest.raises(RuntimeError, match="does not implement forward-mode"):
        torch.compile(FORWARD["jvp"], backend="aot_eager")(ours("mean"))
