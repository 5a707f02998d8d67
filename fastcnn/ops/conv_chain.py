"""A chain of convolutions with deferred normalisation: the one autograd function behind every fused op.

Raw convolution outputs pass from convolution to convolution; each one's normalisation and activation are the next
one's prologue, forward and backward, and exist in registers only. Saved for backward are the raw outputs, and the input
where it cannot be made again (rematerialization.py); activations are recomputed. Only the last normalisation is written
to memory, with the activation and the residual.
A pre-activation chain (BatchNorm, activation, convolution) begins with an identity "convolution": its raw output is x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops import activations, inference
from fastcnn.ops.distributed import merge_statistics
from fastcnn.ops.known_statistics import known_statistics
from fastcnn.ops.layout import accumulation_dtype, autocast, to_nhwc
from fastcnn.ops.normalisation import (
    Applied,
    BatchNorm,
    applied,
    gradient_coefficients,
    unbiased,
    update_running_statistics,
)
from fastcnn.ops.rematerialization import input_of, is_remade, output_of, release, saved
from fastcnn.ops.stages import (
    SLOTS,
    Conv,
    Geometry,
    convolve,
    convolve_backward,
    convolve_into,
    flatten_stage,
    identity_backward,
    sizes_along,
)
from fastcnn.ops.validation import Labels, check_chain

ops = torch.ops.fastcnn


def _ends_in_epilogue(g: Geometry, stage: Sequence[Tensor | None], residual: Tensor | None) -> bool:
    """Whether the last stage can be stored finished: backward needs no raw output behind a bias alone.

    The mask of its activation is then seen from the output.
    """
    if g.op == "identity" or g.norm.name not in ("none", "affine") or stage[2] is not None:
        return False
    act = g.act & ~activations.AFTER_RESIDUAL
    last = act == activations.NONE or residual is None or g.act != act
    return last and act in activations.KNOWN_FROM_OUTPUT


def _store_finished(
    geometries: tuple, stage: Sequence[Tensor | None], x: Tensor, pre: Applied, act: int, residual, out: Tensor | None
):
    """The chain's output, and the geometries with an activation that backward sees from it."""
    g = geometries[-1]
    if g.act:
        g = g._replace(act=g.act | activations.AFTER_RESIDUAL)
    *weights, _, shift, _, _ = stage
    shift = applied(g.norm, None, shift, None, None, accumulation_dtype(x)).shift
    epilogue = (None, shift, g.act, residual)
    if out is None:
        out, *_ = convolve(g, x, weights, pre, act, False, epilogue)
    else:
        convolve_into(out, g, x, weights, pre, act, epilogue)
    return out, (*geometries[:-1], g)


def _store_normalised(y: Tensor, norm: Applied, act: int, residual: Tensor | None, out: Tensor | None) -> Tensor:
    """The chain's output, from the raw one of its last convolution."""
    if out is not None:
        ops.affine_act_into(out, y, norm.scale, norm.shift, act, residual)
        return out
    if norm.scale is None and norm.shift is None and not act and residual is None:
        return y
    return ops.affine_act_fwd(y, norm.scale, norm.shift, act, residual)


class _ConvChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometries, adds_input, remade, into, x, residual, *tensors):
        """into is None or (out,): in a tuple autograd does not take what is written for an argument."""
        destination = into[0] if into else None
        residual = x if adds_input else residual
        acc = accumulation_dtype(x)
        stages = [tensors[i : i + SLOTS] for i in range(0, len(tensors), SLOTS)]
        pre, act, n = Applied(), activations.NONE, len(stages)
        raw, norms, batch, totals = [x], [], [], {}
        finished = _ends_in_epilogue(geometries[-1], stages[-1], residual)
        raws = slice(n - finished)
        for g, (*weights, scale, shift, mean, var) in zip(geometries[raws], stages[raws], strict=True):
            known = mean is not None
            y, *own = convolve(g, raw[-1], weights, pre, act, g.norm.trains and not known)
            if g.norm.trains:
                mean, var = (mean.detach(), var.detach()) if known else own
                if g.norm.group is not None:
                    count = y.numel() // y.shape[1]
                    mean, var, totals[len(norms)] = merge_statistics(mean, var, count, g.norm.group)
                batch += [mean, var]
            pre, act = applied(g.norm, scale, shift, mean, var, acc), g.act
            raw.append(y)
            norms.append(pre)
        if finished:
            out, geometries = _store_finished(geometries, stages[-1], raw[-1], pre, act, residual, destination)
            pre, act = Applied(), geometries[-1].act
            raw.append(None)
            norms.append(pre)
        else:
            out = _store_normalised(raw[-1], pre, act, residual, destination)
        ctx.geometries, ctx.adds_input, ctx.totals = geometries, adds_input, totals
        ctx.input_remade, ctx.residual_remade = remade
        ctx.unpacked = ctx.output = None
        batch += totals.values()
        after = act & activations.AFTER_RESIDUAL
        if pre.scale is None and (after or not act):
            raw[-1] = None  # a bias needs no output to pass a gradient through
        if ctx.input_remade:
            raw = [None if y is x else y for y in raw]
        eager = not torch.compiler.is_compiling() and not out.is_inference()
        again = eager and raw[-1] is not None and (residual is None or adds_input or ctx.residual_remade)
        ctx.output_version = out._version if again else None
        ctx.keeps_output = bool(after and not again)
        flat = [t for norm in norms for t in norm]
        # What cannot be made again the next layer saves as its input: that it is saved here too costs nothing.
        ctx.save_for_backward(out if ctx.keeps_output else None, *raw, *flat, *tensors)
        ctx.mark_non_differentiable(*batch)
        return (out, *batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        geometries, n = ctx.geometries, len(ctx.geometries)
        out, raw, norms, tensors = saved(ctx)
        needs, first = ctx.needs_input_grad, 6
        raw[0] = input_of(ctx)
        if geometries[0].op == "identity":
            raw[1] = raw[0]
        grad = to_nhwc(grad)
        grads: list[Tensor | None] = [None] * len(tensors)

        def learns(i: int) -> bool:
            return geometries[i].norm.trains or any(needs[first + SLOTS * i + 2 : first + SLOTS * i + 4])

        act, sums = geometries[-1].act, None
        y = grad if raw[n] is None else raw[n]
        if act & activations.AFTER_RESIDUAL:
            out = output_of(ctx) if out is None else out
            act -= activations.AFTER_RESIDUAL
            grad, sums = ops.residual_act_bwd(grad, out, act, y, norms[-1].mean, learns(n - 1))
            act = activations.NONE
        elif learns(n - 1):
            sums = ops.affine_act_sums(grad, y, norms[-1].scale, norms[-1].shift, act, norms[-1].mean)
        sums = sums if learns(n - 1) else None
        release(ctx)
        dresidual = grad if needs[5] or ctx.adds_input else None
        for i in reversed(range(n)):
            g, y, slot = geometries[i], raw[i + 1], SLOTS * i
            count = ctx.totals.get(i, 0 if y is None else y.numel() // y.shape[1])
            coef, dscale, dshift = gradient_coefficients(g.norm, norms[i], sums, count)
            for k, d in ((2, dscale), (3, dshift)):
                if needs[first + slot + k]:
                    grads[slot + k] = d.to(tensors[slot + k].dtype)
            mask = (norms[i].scale, norms[i].shift, act) if act else (None, None, 0)
            upstream = (grad, y if act or coef is not None else None, *mask, coef)
            if g.op == "identity":
                grad = identity_backward(upstream, dresidual if ctx.adds_input else None) if needs[4] else None
                break  # the first of the chain
            pre, pre_act = (norms[i - 1], geometries[i - 1].act) if i else (Applied(), activations.NONE)
            weights = [w for w in tensors[slot : slot + 2] if w is not None]
            need_dw = needs[first + slot : first + slot + 2]
            need_sums = bool(i) and learns(i - 1)
            need_dx = bool(i) or needs[4]
            added = dresidual if ctx.adds_input and need_dx and not i else None
            grad, dws, sums = convolve_backward(
                g, upstream, raw[i], pre, pre_act, weights, added, need_dx, need_dw, need_sums
            )
            sums = sums if need_sums else None
            for k, dw in enumerate(dws):
                if need_dw[k]:
                    grads[slot + k] = dw.to(tensors[slot + k].dtype)
            act = 0  # from here on the gradients arrive masked
        return None, None, None, None, grad if needs[4] else None, None if ctx.adds_input else dresidual, *grads


def conv_chain(
    x: Tensor,
    convs: Sequence[Conv],
    in_act: str = "none",
    residual: Tensor | None = None,
    labels: Sequence[Labels] | None = None,
    act_after_residual: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Runs convolutions with their normalisations and activations as one fused, differentiable unit.

    y = act_n(norm_n(conv_n(... act_1(norm_1(conv_1(in_act(x)) + bias_1)) ...) + bias_n)) + residual

    With ``act_after_residual`` the last activation (none, relu or relu6) comes last: act_n(norm_n(conv_n(...)) + residual).
    A first Conv("identity", norm=..., act=...) is a pre-activation: the chain's input is normalised as it is loaded.

    Shapes: x [N, K, H, W] in any memory format, the result [N, C, P, Q] in channels_last; residual like the result.
    Dtypes: float32, bfloat16, float16, float64 (reference); autocast is respected, parameters may stay float32.
    With ``out``, one of `channel_slices`, the result is written there and is that tensor.
    ``labels`` are the names that error messages give to the parts of each convolution.
    Source: BN fission-n-fusion (arXiv 1807.01702) for the deferred normalisation.

    Raises:
        TypeError, ValueError: an argument that cannot be (validation.check_chain).
        ValueError: batch statistics of a single value per channel.
    """
    check_chain(x, convs, in_act, residual, labels, act_after_residual, out)
    given, x = x, to_nhwc(autocast(x))
    if residual is not None:
        residual = x if residual is given else to_nhwc(residual.to(x.dtype))
    if in_act not in ("none", None):
        convs = (Conv("identity", act=in_act), *convs)
    first = convs[0]
    if first.op == "identity" and first.statistics is None and isinstance(first.norm, BatchNorm):
        convs = (replace(first, statistics=known_statistics(x, first.norm)), *convs[1:])
    acc = accumulation_dtype(x)
    flattened = [flatten_stage(conv, acc) for conv in convs]
    geometries = [g for g, _ in flattened]
    if act_after_residual and residual is not None:
        geometries[-1] = geometries[-1]._replace(act=geometries[-1].act + activations.AFTER_RESIDUAL)
    geometries = tuple(geometries)
    stages = [slots for _, slots in flattened]
    tensors = [t for slots in stages for t in slots]
    trained = [i for i, g in enumerate(geometries) if g.norm.trains]
    # An exported program is for inference: it gets the wide primitives though its parameters require gradients.
    differentiable = (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, residual, *tensors))
        and not torch.compiler.is_exporting()
    )
    if not trained and not differentiable:
        epilogues = [applied(g.norm, *s[2:], acc) for g, s in zip(geometries, stages, strict=True)]
        weights, head = [s[:2] for s in stages], (None, None, activations.NONE)
        if geometries[0].op == "identity":
            head = (epilogues[0].scale, epilogues[0].shift, geometries[0].act)
            geometries, weights, epilogues = geometries[1:], weights[1:], epilogues[1:]
        return inference.run(x, inference.steps(geometries, weights, epilogues, head), residual, out)
    # How many values each stage's batch statistics average.
    counts = [x.shape[0] * p * q for p, q in sizes_along(x.shape, convs)]
    shared = [i for i in trained if geometries[i].norm.group is not None]
    for i in trained:
        if counts[i] <= 1 and i not in shared:
            raise ValueError(f"batch statistics: got {counts[i]} value per channel, expected more than 1")
    # torch.compile refuses one tensor in two arguments of an autograd function; and its gradients become one here.
    adds_input = residual is x
    remade = (is_remade(x), residual is not None and is_remade(residual))
    constants = (geometries, adds_input, remade, None if out is None else (out,))
    out, *batch = _ConvChain.apply(*constants, x, None if adds_input else residual, *tensors)
    counts = {**dict(enumerate(counts)), **dict(zip(shared, batch[2 * len(trained) :]))}
    biases = [None if convs[i].bias is None else convs[i].bias.detach() for i in trained]
    means = [mean if bias is None else mean + bias for mean, bias in zip(batch[::2], biases)]
    variances = [unbiased(var, counts[i]) for i, var in zip(trained, batch[1::2])]
    update_running_statistics([convs[i].norm for i in trained], means, variances)
    return out
