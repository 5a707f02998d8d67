"""Inverted dropout over 25.7 MB (56 x 56 x 256, batch 8), plain and behind a bias and ReLU, forward and with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import ops
from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.suites.common import BATCH, NAMES, normal
from fastcnn.benchmark.targets import Target

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "dropout"
TITLE = f"Dropout of [{BATCH}, 256, 56, 56]"
NOTES = (
    "`train`: forward and backward. Floors: copying what must be read and written.",
    "What is kept is compared with the reference, and how much is with the binomial distribution.",
)
P = 0.5
SHAPE = (BATCH, 256, 56, 56)
TORCH, COMPILED = "torch", "compile"

Dropout = Callable[[Tensor, Tensor], Tensor]


def _activated(x: Tensor, bias: Tensor) -> Tensor:
    return F.relu(x + bias.view(1, -1, 1, 1))


def _plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(x, P)


def _fused(x: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(_activated(x, bias), P)


def _ours_plain(x: Tensor, bias: Tensor) -> Tensor:
    return ops.dropout(x, P)


def _ours_fused(x: Tensor, bias: Tensor) -> Tensor:
    return ops.dropout(x, P, bias=bias, act="relu")


FORMS: dict[str, tuple[Dropout, Dropout]] = {"plain": (_ours_plain, _plain), "bias, ReLU": (_ours_fused, _fused)}


def _expected(fused: bool, train: bool, x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Where nothing is dropped."""
    y = (_activated(x, bias) if fused else x) / (1 - P)
    if not train:
        return (y,)
    return y, grad * (y > 0 if fused else torch.ones_like(y)) / (1 - P)


def _filled(output: Tensor, expected: Tensor) -> Tensor:
    """The output with what it dropped put back; raises where it dropped too much or too little."""
    candidates = expected != 0
    stays, n = (output != 0) & candidates, int(candidates.sum())
    if abs(int(stays.sum()) - n * (1 - P)) > 5 * (n * P * (1 - P)) ** 0.5:
        raise ValueError(f"kept {int(stays.sum())} of {n} values with p = {P}")
    return torch.where(stays, output, expected.to(output.dtype))


def _entry(function: Dropout, fused: bool, train: bool) -> Entry:
    last: list[tuple[Tensor, ...]] = []

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        last[:] = [inputs]
        x, bias, grad = inputs
        if not train:
            return (function(x, bias),)
        leaf = x.detach().requires_grad_()
        y = function(leaf, bias)
        y.backward(grad)
        return y.detach(), leaf.grad

    def collect(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(_filled, outputs, _expected(fused, train, *last[0])))

    return Entry(run, collect)


def _case(form: str, train: bool, dtype: torch.dtype, options: Options) -> Case:
    ours, stock = FORMS[form]
    fused = stock is _fused
    bias = normal(torch.Generator().manual_seed(3), (SHAPE[1],), dtype)

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        return normal(g, SHAPE, dtype), bias, normal(g, SHAPE, dtype)

    def competitor(name: str, function: Dropout) -> Competitor:
        return Competitor(name, dtype, lambda: _entry(function, fused, train))

    competitors = [competitor(OURS, ours), competitor(TORCH, stock)]
    if options.compiles():
        compiled = Competitor(COMPILED, dtype, lambda: _entry(torch.compile(stock, dynamic=False), fused, train))
        competitors.append(compiled)
    passes = 2 + (2 + fused if train else 0)  # a fused backward also reads what ReLU cut
    elements = float(torch.Size(SHAPE).numel())
    direction = "train" if train else "fwd"
    return Case(
        f"{form} {direction} {NAMES[dtype]}",
        Work(0.0, passes * elements * dtype.itemsize, dtype),
        inputs,
        lambda *exact: _expected(fused, train, *exact),
        tuple(competitors),
        tags={"form": form, "direction": direction, "dtype": NAMES[dtype]},
    )


def cases(options: Options) -> Iterator[Case]:
    """Every form, direction and dtype; the plain forward when quick."""
    for dtype in options.dtypes:
        for form in list(FORMS)[: 1 if options.quick else None]:
            for train in (False,) if options.quick else (False, True):
                yield _case(form, train, dtype, options)


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """Of the plain form the ratio to torch on a CPU and the share of the copy bandwidth; of the fused one, on a GPU."""
    found = []
    for race in races:
        fused, on_cpu = race.tags["form"] != "plain", options.device == "cpu"
        if not fused:
            share = 0.8 if on_cpu else 0.9
            found.append(Target(race.name, "the floor by the copy bandwidth", share, race.fraction_of_floor()))
        if on_cpu and not fused and race.tags["dtype"] == "fp32":
            found.append(Target(race.name, TORCH, 20.0, race.ratio(TORCH)))
        if fused and not on_cpu:
            found.append(Target(race.name, COMPILED, 1.5, race.ratio(COMPILED)))
    return found
