"""What a training run minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Objective(nn.Module):
    """A model with its loss, as one module: DistributedDataParallel must see everything between inputs and loss.

    The loss is the model's own, where it has a method ``training_loss(images, labels)`` that returns a loss and scores,
    and cross-entropy on its outputs elsewhere. A model that also returns auxiliary classifiers' scores in training has an
    ``auxiliary_weight``, what their losses count.

    Args:
        model: returns scores [N, classes], or a tuple of them and the auxiliaries'.
        label_smoothing: of the cross-entropy, in training mode.

    Raises:
        ValueError: label smoothing for a model that has its own loss.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if label_smoothing and hasattr(model, "training_loss"):
            raise ValueError(
                f"label_smoothing: got {label_smoothing}, expected 0: {type(model).__name__} trains on a loss of its own"
            )
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, a scalar, and the scores [N, classes], of which the largest is the model's answer."""
        if hasattr(self.model, "training_loss"):
            return self.model.training_loss(images, labels)
        outputs = self.model(images)
        scores, *auxiliaries = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = self._cross_entropy(scores, labels)
        for auxiliary in auxiliaries:
            loss = loss + self.model.auxiliary_weight * self._cross_entropy(auxiliary, labels)
        return loss, scores

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.cross_entropy(exact, labels, label_smoothing=smoothing)
