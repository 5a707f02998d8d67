"""The peers that a race is against must run: one that is refused by our own mistake is a crippled one."""

from __future__ import annotations

import torch
from torch import nn

from fastcnn.benchmark import peers
from fastcnn.training.objective import Objective


class _LikeCompiled(nn.Module):
    """As what torch.compile returns: it has __len__, which fails when the model that it wraps has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __len__(self) -> int:
        return len(self.model)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(x, labels)


def test_a_compiled_training_step_runs():
    objective = Objective(nn.Linear(4, 3))
    entry = peers.training_entry(objective, torch.float32, "cpu", _LikeCompiled(objective))
    loss, *gradients = entry.collect(entry.run(torch.randn(2, 4), torch.tensor([0, 2])))
    assert loss.isfinite()
    assert len(gradients) == 3
