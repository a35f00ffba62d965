"""The architectures of the studies; each is a function of hyper-parameters, for `--arch`."""

from experiments.models.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from experiments.models.cnn import cnn
from experiments.models.fcn import fcn
from experiments.models.registry import MODELS, build_model, model_arguments
from experiments.models.resnet import resnet
from experiments.models.vit import vit

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "OUTPUT_ACTIVATIONS",
    "build_model",
    "cnn",
    "fcn",
    "model_arguments",
    "resnet",
    "vit",
]
