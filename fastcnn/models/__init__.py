"""The model zoo: classic convolutional networks with their reference implementation's state_dict keys."""

from fastcnn.models.capsnet import CapsNet, capsnet, capsnet_cifar
from fastcnn.models.densenet import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet264
from fastcnn.models.densenet_cifar import (
    CIFARDenseNet,
    densenet_bc40_12,
    densenet_bc100_12,
    densenet_bc190_40,
    densenet_bc250_24,
)
from fastcnn.models.googlenet import GoogLeNet, GoogLeNetOutputs, googlenet
from fastcnn.models.inception_resnet import (
    InceptionResNetV1,
    InceptionResNetV2,
    inception_resnet_v1,
    inception_resnet_v2,
)
from fastcnn.models.inception_v3 import InceptionOutputs, InceptionV3, inception_v3
from fastcnn.models.inception_v4 import InceptionV4, inception_v4
from fastcnn.models.lenet import LeNet5, lenet5
from fastcnn.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from fastcnn.models.registry import InputFormat, create_model, image_size, input_format, list_models
from fastcnn.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
)
from fastcnn.models.resnet_cifar import CIFARResNet, plain20, plain56, resnet20, resnet56
from fastcnn.models.vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from fastcnn.models.wrn_cifar import CIFARWideResNet, wrn28_10
from fastcnn.models.xception import Xception, xception

__all__ = [
    "VGG",
    "CIFARDenseNet",
    "CIFARResNet",
    "CIFARWideResNet",
    "CapsNet",
    "DenseNet",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "InceptionOutputs",
    "InceptionResNetV1",
    "InceptionResNetV2",
    "InceptionV3",
    "InceptionV4",
    "InputFormat",
    "LeNet5",
    "MobileNetV2",
    "ResNet",
    "Xception",
    "capsnet",
    "capsnet_cifar",
    "create_model",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc40_12",
    "densenet_bc100_12",
    "densenet_bc190_40",
    "densenet_bc250_24",
    "googlenet",
    "image_size",
    "inception_resnet_v1",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "input_format",
    "lenet5",
    "list_models",
    "mobilenet_v2",
    "plain20",
    "plain56",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
    "wrn28_10",
    "xception",
]
