"""The separable layers of both models: inference form, and forward and backward in training form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.shapes import SEPARABLE, Separable
from fastcnn.benchmark.suites.common import BATCH, NAMES, TORCH_EAGER, autocast, layout_of, normal, weight
from fastcnn.benchmark.targets import Target, mean_ratio

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "separable"
TITLE = f"Separable layers of MobileNet-v2 and Xception, batch {BATCH}"
NOTES = (
    "`fwd`: the inference form. BatchNorm is folded into torch's weights and biases, as into ours.",
    "`train`: forward and backward, BatchNorm in training mode; bf16 under autocast with float32 parameters.",
)
MOMENTUM, EPS = 0.1, 1e-5


def _is_mobilenet(layer: Separable) -> bool:
    """MobileNet-v2 normalises and activates between the convolutions; Xception only applies a ReLU first."""
    return layer.model == "mobilenet_v2"


class Parameters:
    """A layer's weights and affine parameters: the folded form's biases, BatchNorm's scales and shifts."""

    def __init__(self, layer: Separable, dtype: torch.dtype):
        self.layer = layer
        g = torch.Generator().manual_seed(3)
        self.dw = weight(3, (layer.channels, 1, 3, 3), dtype)
        self.pw = weight(4, (layer.out_channels, layer.channels, 1, 1), dtype)
        self.mid_scale, self.out_scale = (0.5 + torch.rand(c, generator=g) for c in self._channels())
        self.mid_shift, self.out_shift = (normal(g, (c,), dtype, 0.1) for c in self._channels())

    def _channels(self) -> tuple[int, int]:
        return self.layer.channels, self.layer.out_channels

    def convolutions(self, dtype: torch.dtype, device: str, layout: str) -> tuple[Tensor, Tensor]:
        """Both weights."""
        form = layout_of(layout)
        return tuple(w.to(device, dtype).contiguous(memory_format=form) for w in (self.dw, self.pw))

    def shifts(self, dtype: torch.dtype, device: str) -> tuple[Tensor | None, Tensor]:
        """Both biases of the folded form; Xception has none in between."""
        mid = self.mid_shift.to(device, dtype) if _is_mobilenet(self.layer) else None
        return mid, self.out_shift.to(device, dtype)

    def trainable(self, dtype: torch.dtype, device: str, layout: str) -> list[Tensor]:
        """Leaves: the weights, then scale and shift of each BatchNorm that there is."""
        norms = [self.out_scale, self.out_shift]
        if _is_mobilenet(self.layer):
            norms = [self.mid_scale, self.mid_shift, *norms]
        leaves = [*self.convolutions(dtype, device, layout), *(t.to(device, dtype) for t in norms)]
        return [t.clone().requires_grad_() for t in leaves]

    def running(self, dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
        """Running mean and variance of each BatchNorm that there is."""
        channels = self._channels() if _is_mobilenet(self.layer) else self._channels()[1:]
        return [
            (torch.zeros(c, dtype=dtype, device=device), torch.ones(c, dtype=dtype, device=device)) for c in channels
        ]


def _stock_forward(layer: Separable, x: Tensor, convs: tuple, shifts: tuple, residual: Tensor | None) -> Tensor:
    x = x if _is_mobilenet(layer) else F.relu(x)
    mid = F.conv2d(x, convs[0], shifts[0], layer.stride, 1, 1, layer.channels)
    mid = F.relu6(mid) if _is_mobilenet(layer) else mid
    y = F.conv2d(mid, convs[1], shifts[1])
    return y if residual is None else y + residual


def _stock_training(layer: Separable, x: Tensor, leaves: list, running: list, residual: Tensor | None) -> Tensor:
    dw, pw, *norms = leaves
    x = x if _is_mobilenet(layer) else F.relu(x)
    mid = F.conv2d(x, dw, None, layer.stride, 1, 1, layer.channels)
    if _is_mobilenet(layer):
        mid = F.relu6(F.batch_norm(mid, *running[0], *norms[:2], True, MOMENTUM, EPS))
    y = F.batch_norm(F.conv2d(mid, pw), *running[-1], *norms[-2:], True, MOMENTUM, EPS)
    return y if residual is None else y + residual


def _chain(layer: Separable, x: Tensor, weights: tuple, norms: list, residual: Tensor | None) -> Tensor:
    """Ours: `norms` are conv_chain's, of the depthwise (MobileNet-v2) and the pointwise convolution."""
    from fastcnn.ops.conv_chain import conv_chain
    from fastcnn.ops.stages import Conv

    where = {"stride": (layer.stride, layer.stride), "padding": (1, 1)}
    if not _is_mobilenet(layer):
        return conv_chain(x, [Conv("separable", weights, **where, norm=norms[-1])], in_act="relu")
    convs = [
        Conv("depthwise", weights[:1], **where, norm=norms[0], act="relu6"),
        Conv("pointwise", weights[1:], norm=norms[1]),
    ]
    return conv_chain(x, convs, residual=residual)


def _ours_forward(layer: Separable, x: Tensor, convs: tuple, shifts: tuple, residual: Tensor | None) -> Tensor:
    from fastcnn.ops.normalisation import Affine

    return _chain(layer, x, convs, [Affine(None, shift) for shift in shifts], residual)


def _ours_training(layer: Separable, x: Tensor, leaves: list, running: list, residual: Tensor | None) -> Tensor:
    from fastcnn.ops.normalisation import BatchNorm

    dw, pw, *affine = leaves
    norms = [BatchNorm(*affine[2 * i : 2 * i + 2], *running[i], True, MOMENTUM, EPS) for i in range(len(running))]
    return _chain(layer, x, (dw, pw), norms, residual)


def _forward_entry(
    forward: Callable, p: Parameters, dtype: torch.dtype, device: str, layout: str, shift_dtype: torch.dtype
) -> Entry:
    convs, shifts = p.convolutions(dtype, device, layout), p.shifts(shift_dtype, device)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return forward(p.layer, x, convs, shifts, residual)

    return Entry(run)


def _training_entry(training: Callable, p: Parameters, dtype: torch.dtype, device: str, layout: str) -> Entry:
    """Parameters are float32 (float64 for the reference) and autocast casts them, as in real training."""
    master = torch.promote_types(dtype, torch.float32)
    leaves, running = p.trainable(master, device, layout), p.running(master, device)

    def run(x: Tensor, grad: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with autocast(dtype, device):
            y = training(p.layer, x, leaves, running, residual)
        return y, *torch.autograd.grad(y, [x, *leaves], grad)

    return Entry(run)


def _work(layer: Separable, dtype: torch.dtype, training: bool) -> Work:
    """Training reads the input twice and moves output, its gradient and the input's gradient once."""
    pixels = BATCH * layer.out_size**2
    macs = pixels * layer.channels * (9.0 + layer.out_channels)
    x, y = BATCH * layer.channels * layer.size**2, pixels * layer.out_channels
    weights = layer.channels * (9 + layer.out_channels)
    if training:
        return Work(6.0 * macs, dtype.itemsize * (3.0 * x + (2 + layer.residual) * y) + 8.0 * weights, dtype)
    return Work(2.0 * macs, dtype.itemsize * (x + (1.0 + layer.residual) * y + weights), dtype)


def _case(layer: Separable, count: int, dtype: torch.dtype, training: bool, device: str) -> Case:
    p = Parameters(layer, dtype)
    x_shape = (BATCH, layer.channels, layer.size, layer.size)
    y_shape = (BATCH, layer.out_channels, layer.out_size, layer.out_size)
    shapes = [x_shape] + [y_shape] * (training + layer.residual)

    def ours() -> Entry:
        if training:
            return _training_entry(_ours_training, p, dtype, device, "nchw")
        return _forward_entry(_ours_forward, p, dtype, device, "nchw", torch.float32)

    def stock(layout: str) -> Entry:
        if training:
            return _training_entry(_stock_training, p, dtype, device, layout)
        return _forward_entry(_stock_forward, p, dtype, device, layout, dtype)

    def reference(*args: Tensor) -> tuple[Tensor, ...]:
        double, where = torch.float64, args[0].device.type
        if training:
            return _training_entry(_stock_training, p, double, where, "nchw").run(*args)
        return (_forward_entry(_stock_forward, p, double, where, "nchw", double).run(*args),)

    competitors = [Competitor(OURS, dtype, ours)]
    for name, layout in zip(TORCH_EAGER, ("nchw", "nhwc")):
        competitors.append(Competitor(name, dtype, lambda layout=layout: stock(layout), layout))
    form = "train" if training else "fwd"
    return Case(
        f"{layer.label} {NAMES[dtype]} {form}",
        _work(layer, dtype, training),
        lambda g: tuple(normal(g, shape, dtype) for shape in shapes),
        reference,
        tuple(competitors),
        count,
        # Gradients pass through the activation's kink: a rounding that crosses it changes a whole value.
        yardsticks={dtype: TORCH_EAGER[1]} if training or dtype.itemsize < 4 else {},
        tags={"dtype": NAMES[dtype], "form": form},
    )


def cases(options: Options) -> Iterator[Case]:
    """Every distinct layer in every dtype and form; one small layer of each model when quick."""
    layers = SEPARABLE.items()
    if options.quick:
        smallest = {layer.model: (layer, n) for layer, n in sorted(SEPARABLE.items(), key=lambda i: -i[0].size)}
        layers = smallest.values()
    for training in (False, True):
        for dtype in options.dtypes:
            for layer, count in layers:
                yield _case(layer, count, dtype, training, options.device)


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """The issue's ratios, weighted by how often each layer occurs."""
    gpu = options.device != "cpu"
    bounds = {("fwd", "fp32"): 1.15, ("fwd", "bf16"): 1.6, ("train", "fp32"): 1.5, ("train", "bf16"): 2.0}
    against = "cuDNN, channels_last" if gpu else "the better of torch NCHW and NHWC"
    return [
        Target(
            f"separable layers, {form}, {dtype}, geometric mean",
            against,
            2.0 if gpu else bound,
            mean_ratio(races, None, lambda t, form=form, dtype=dtype: (t["form"], t["dtype"]) == (form, dtype)),
        )
        for (form, dtype), bound in bounds.items()
        if dtype in {NAMES[d] for d in options.dtypes}
    ]
