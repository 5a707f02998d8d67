"""Training of the zoo's models: ``fastcnn train`` and, for programs, `train` and `compare` of a `TrainConfig`."""

from fastcnn.training.comparison import compare
from fastcnn.training.config import TrainConfig
from fastcnn.training.history import Epoch
from fastcnn.training.reporter import Reporter
from fastcnn.training.trainer import Interrupted, NonFiniteLoss, TrainResult, train

__all__ = ["Epoch", "Interrupted", "NonFiniteLoss", "Reporter", "TrainConfig", "TrainResult", "compare", "train"]
