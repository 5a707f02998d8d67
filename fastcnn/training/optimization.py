"""What moves the weights: parameter groups, the learning rate of each step, and the average that follows them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastcnn.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or Adam whose weight decay spares biases and normalisations: every parameter of one axis."""
    recipe = config.recipe
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, fused=True)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=config.momentum, nesterov=config.nesterov)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """The learning rate of a step: linear up to `peak` at step `warmup`, then half a cosine down to zero.

    Args:
        step: from 0 to steps - 1.
        steps: in the whole run.
        warmup: steps of the warm-up.
        peak: the rate where the cosine begins.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def exponential_learning_rate(step: int, warmup: int, peak: float, decay: float, decay_steps: int) -> float:
    """The learning rate of a step: linear up to `peak` at step `warmup`, then times `decay` over every `decay_steps`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * decay ** ((step - warmup) / decay_steps)


def make_schedule(config: TrainConfig, epoch_steps: int) -> Callable[[int], float]:
    """The learning rate of each step of a run, from 0."""
    recipe, warmup, steps = config.recipe, round(config.warmup * epoch_steps), config.epochs * epoch_steps
    if recipe.schedule == "exponential":
        return lambda step: exponential_learning_rate(step, warmup, recipe.lr, config.decay, config.decay_steps)
    return lambda step: learning_rate(step, steps, warmup, recipe.lr)


def _state(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers: those of floating point, which can be averaged, and the counters."""
    tensors = [*module.parameters(), *module.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


class Ema:
    """An exponential moving average of a model's weights and BatchNorm statistics.

    Args:
        model: averaged from its present state on.
        decay: weight of the past in each step. The first steps use less, (1 + step) / (10 + step), so that the random
            initial weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the model; `step` counts the optimiser's steps from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        (averages, counters), (values, counts) = _state(self.module), _state(model)
        get_ema_multi_avg_fn(decay)(averages, values, None)
        for counter, count in zip(counters, counts):
            counter.copy_(count)
