"""The architectures by name, and a model from the metadata of its checkpoint."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from experiments.models.cnn import cnn
from experiments.models.fcn import fcn
from experiments.models.resnet import resnet
from experiments.models.vit import vit
from lipfast.errors import ArgumentError

MODELS: dict[str, Callable[..., nn.Module]] = {
    "fcn": fcn,
    "cnn": cnn,
    "resnet": resnet,
    "vit": vit,
}


def _value(value: object) -> object:
    """Read a number or truth value that a checkpoint stores as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def model_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of a model but for the width, with their defaults.

    Example:
        >>> model_arguments("resnet")["depth"]
        20
    """
    parameters = inspect.signature(MODELS[name]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "width"}


def build_model(metadata: Mapping[str, Any]) -> nn.Module:
    """Build the architecture that the metadata of a checkpoint describe, in eval mode.

    Args:
        metadata: with the key `model` ("fcn" where it lacks) and those arguments of that function
            which differ from its defaults; other keys are ignored. Values may be text.

    Raises:
        ArgumentError: the model or a value is unknown.

    Example:
        >>> build_model({"model": "fcn", "width": "16", "bias": "false", "lr": "0.1"})[0]
        Linear(in_features=40, out_features=16, bias=False)
    """
    name = metadata.get("model", "fcn")
    if name not in MODELS:
        raise ArgumentError(f"model is {name!r}; allowed are {', '.join(MODELS)}")
    accepted = ("width", *model_arguments(name))
    arguments = {key: _value(metadata[key]) for key in accepted if key in metadata}
    return MODELS[name](**arguments).eval()
