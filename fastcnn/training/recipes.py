"""Which optimiser trains a model, and what goes with it where nothing else is asked for."""

from __future__ import annotations

from typing import NamedTuple

SCHEDULES = ("cosine", "exponential")


class Recipe(NamedTuple):
    """An optimiser, the learning rate at the end of the warm-up, the L2 penalty, and how the rate falls."""

    optimizer: str
    lr: float
    weight_decay: float
    schedule: str


OPTIMIZERS = {"sgd": Recipe("sgd", 0.1, 5e-4, "cosine"), "adam": Recipe("adam", 1e-3, 0.0, "exponential")}

# Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), section 4: Adam with an exponentially decaying rate.
ADAM_MODELS = ("capsnet", "capsnet_cifar")


def recipe_of(
    model: str, optimizer: str | None, lr: float | None, weight_decay: float | None, schedule: str | None
) -> Recipe:
    """What is asked for; None stands for the optimiser's usual value, or for the model's optimiser."""
    usual = OPTIMIZERS[optimizer or ("adam" if model in ADAM_MODELS else "sgd")]
    given = {"lr": lr, "weight_decay": weight_decay, "schedule": schedule}
    return usual._replace(**{name: value for name, value in given.items() if value is not None})
