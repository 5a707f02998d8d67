"""The model zoo: classic convolutional networks with their reference implementation's state_dict keys."""

from fastcnn.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from fastcnn.models.registry import create_model, list_models
from fastcnn.models.xception import Xception, xception

__all__ = ["MobileNetV2", "Xception", "create_model", "list_models", "mobilenet_v2", "xception"]
