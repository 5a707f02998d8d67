"""Dynamic routing between capsules (Sabour, Frosst & Hinton 2017, arXiv 1710.09829): votes and all iterations at once.

    votes    w[b, i, o] = u[b, i] @ W[i, o]
    logits   l_t[b, i, o] = w[b, i, o] . (v_1 + ... + v_{t-1})[b, o]
    coupling c_t = softmax of l_t over o  (``leaky``: with one more logit, which is 0)
    output   s_t[b, o] = sum over i of c_t[b, i, o] w[b, i, o] + bias[o],  v_t = squash(s_t)

The paper adds w . v_t to the logits in each iteration; the sum over t is taken in v here, which needs no logits in memory.
Backward goes through all iterations, as the paper's; with ``detach`` the coupling coefficients are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.registry import register
from fastcnn.ops.squash import squash_gradient, squash_values
from fastcnn.ops.validation import DTYPES, HALVES, shape_of


def _votes(u: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bid,iode->bioe", u, weight)


def _coupling(votes: Tensor, total: Tensor, leaky: bool) -> Tensor:
    """Coefficients [batch, in_caps, out_caps] after the outputs whose sum is total."""
    logits = (votes * total[:, None]).sum(-1)
    if leaky:
        logits = torch.cat((torch.zeros_like(logits[..., :1]), logits), -1)
    return logits.softmax(-1)[..., -votes.shape[2] :]


def _forward_fake(u, weight, bias, iterations, leaky):
    shape = (u.shape[0], weight.shape[1], weight.shape[3])
    s = torch.empty((iterations, *shape), dtype=accumulation_dtype(u), device=u.device)
    return torch.empty(shape, dtype=u.dtype, device=u.device), s


def _backward_fake(grad, u, weight, s, leaky, detach, need_du, need_dw):
    acc = accumulation_dtype(u)
    du = torch.empty_like(u, memory_format=torch.contiguous_format) if need_du else u.new_empty(0)
    dw = torch.empty(weight.shape if need_dw else (0,), dtype=acc, device=u.device)
    return du, dw, torch.empty(weight.shape[1::2], dtype=acc, device=u.device)


@register(_forward_fake)
def capsule_routing_fwd(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    """v [batch, out_caps, out_dim] in u's dtype, and s of every iteration [iterations, batch, out_caps, out_dim]."""
    acc = accumulation_dtype(u)
    votes = _votes(u.to(acc), weight.to(acc))
    total, outputs = torch.zeros_like(votes[:, 0]), []
    for _ in range(iterations):
        s = (_coupling(votes, total, leaky)[..., None] * votes).sum(1)
        outputs.append(s if bias is None else s + bias)
        total = total + squash_values(outputs[-1])
    return squash_values(outputs[-1]).to(u.dtype), torch.stack(outputs)


@register(_backward_fake)
def capsule_routing_bwd(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    s: Tensor,
    leaky: bool,
    detach: bool,
    need_du: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du like u, dW and dbias [out_caps, out_dim] of a forward whose s this is; what was not asked for is empty.

    With v's gradient known: of the votes c ds, and of the logits c (a - sum of c a) where a = votes . ds, whose gradient
    goes on to the votes and to every earlier v.
    """
    acc = accumulation_dtype(u)
    own, votes = u.to(acc), _votes(u.to(acc), weight.to(acc))
    totals = torch.cat((torch.zeros_like(s[:1]), squash_values(s).cumsum(0)))
    dvotes, dbias = torch.zeros_like(votes), s.new_zeros(s.shape[2:])
    dv, earlier = grad.to(acc), torch.zeros_like(s[0])
    for t in reversed(range(s.shape[0])):
        ds, c = squash_gradient(dv, s[t]), _coupling(votes, totals[t], leaky)
        dvotes += c[..., None] * ds[:, None]
        dbias += ds.sum(0)
        if detach or t == 0:
            break
        a = (votes * ds[:, None]).sum(-1)
        dlogits = (c * (a - (c * a).sum(-1, keepdim=True)))[..., None]
        dvotes += dlogits * totals[t][:, None]
        dv = earlier = earlier + (dlogits * votes).sum(1)
    du = torch.einsum("bioe,iode->bid", dvotes, weight.to(acc)).to(u.dtype) if need_du else u.new_empty(0)
    dw = torch.einsum("bioe,bid->iode", dvotes, own) if need_dw else s.new_empty(0)
    return du.contiguous(), dw.contiguous(), dbias


class _CapsuleRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias, iterations, leaky, detach):
        v, s = torch.ops.fastcnn.capsule_routing_fwd(u, weight, bias, iterations, leaky)
        ctx.save_for_backward(u, weight, s)
        ctx.how = leaky, detach
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, weight, s = ctx.saved_tensors
        needs = ctx.needs_input_grad
        du, dw, dbias = torch.ops.fastcnn.capsule_routing_bwd(
            grad.contiguous(), u, weight, s, *ctx.how, needs[0], needs[1]
        )
        return (
            du if needs[0] else None,
            dw.to(weight.dtype) if needs[1] else None,
            dbias if needs[2] else None,
            *(None,) * 3,
        )


def _check(u: Tensor, weight: Tensor, iterations: int, bias: Tensor | None) -> None:
    for name, t, dims in (("u", u, "[batch, in_caps, in_dim]"), ("W", weight, "[in_caps, out_caps, in_dim, out_dim]")):
        if not isinstance(t, Tensor) or t.dtype not in DTYPES:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: got {kind}, expected a tensor of {', '.join(map(str, DTYPES))}")
        if t.dim() != dims.count(",") + 1:
            raise ValueError(f"{name}: got shape {shape_of(t)}, expected {dims}")
    if weight.shape[0] != u.shape[1] or weight.shape[2] != u.shape[2] or 0 in weight.shape:
        expected = f"[{u.shape[1]}, out_caps, {u.shape[2]}, out_dim]"
        raise ValueError(f"W: got shape {shape_of(weight)}, expected {expected} for u of shape {shape_of(u)}")
    if weight.dtype != u.dtype and not (weight.dtype == torch.float32 and u.dtype in HALVES):
        raise TypeError(f"W: got {weight.dtype}, expected u's {u.dtype} or, for a half-precision u, torch.float32")
    if bias is not None and bias.shape != weight.shape[1::2]:
        raise ValueError(f"bias: got shape {shape_of(bias)}, expected {shape_of(weight[0, :, 0])}")
    if type(iterations) is not int or iterations < 1:
        raise ValueError(f"iterations: got {iterations!r}, expected an integer of at least 1")


def capsule_votes_routing(
    u: Tensor,
    W: Tensor,
    iterations: int = 3,
    bias: Tensor | None = None,
    detach: bool = False,
    leaky: bool = False,
) -> Tensor:
    """Votes of all input capsules for all output capsules, and routing by agreement, differentiable.

    Args:
        u: input capsules [batch, in_caps, in_dim].
        W: transformations [in_caps, out_caps, in_dim, out_dim].
        iterations: of routing; one is the plain mean (sum over out_caps of the coupling is 1).
        bias: [out_caps, out_dim], added in every iteration before squash (the authors' code has one, the paper none).
        detach: whether the coupling coefficients are constants in backward, as in many ports.
        leaky: one more logit of 0 in the softmax, for input capsules that belong to none (the authors' CIFAR model).

    Shapes: the result v is [batch, out_caps, out_dim]. Dtypes: float32, bfloat16, float16, float64 (reference); a
    half-precision u takes a float32 W and bias too; votes, logits and sums are float32. Autocast is respected.
    Source: Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), procedure 1, with its own gradient.

    Raises:
        TypeError, ValueError: an argument of another type, dtype or shape.
    """
    device = u.device.type if isinstance(u, Tensor) else "cpu"
    if isinstance(u, Tensor) and torch.is_autocast_enabled(device) and u.dtype != torch.float64:
        u = u.to(torch.get_autocast_dtype(device))
    _check(u, W, iterations, bias)
    return _CapsuleRouting.apply(u.contiguous(), W.contiguous(), bias, iterations, leaky, detach)
