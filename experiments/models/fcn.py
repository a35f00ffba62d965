"""Fully connected networks, built from the hyper-parameters that checkpoints record."""

from __future__ import annotations

from torch import nn

from experiments.models.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS, activation_modules
from experiments.models.dropout import SeededDropout
from lipfast.errors import ArgumentError


def fcn(  # noqa: PLR0917
    width: int,
    depth: int = 1,
    inputs: int = 40,
    classes: int = 10,
    bias: bool = True,
    activation: str = "relu",
    output_activation: str = "none",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build the network `W_L a(W_{L-1} ... a(W_1 x + b_1) ...) + b_L` with L = depth + 1.

    The defaults are the network of the double descent study on MNIST1D, except that Khromov and
    Singh (2024) use no biases and `output_activation="relu"` (`"leaky_relu"` with squared error).

    Args:
        width: units of each hidden layer.
        depth: number of hidden layers, at least 1.
        inputs: dimension of a sample.
        classes: dimension of the output.
        bias: whether the linear layers have biases.
        activation: after each hidden layer, one of `ACTIVATIONS`.
        output_activation: after the last layer, one of `OUTPUT_ACTIVATIONS`.
        dropout: probability, after each hidden activation.

    Returns:
        The network; maps (batch, inputs) to (batch, classes).

    Raises:
        ArgumentError: a size is below 1 or an activation is unknown.

    Example:
        >>> [name for name, _ in fcn(width=16).named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    sizes = {"width": width, "depth": depth, "inputs": inputs, "classes": classes}
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{name} is {size}; it must be at least 1")
    modules: list[nn.Module] = []
    features = inputs
    for _ in range(depth):
        modules += [
            nn.Linear(features, width, bias=bias),
            *activation_modules(ACTIVATIONS, activation, "activation"),
            *([SeededDropout(dropout)] if dropout else []),
        ]
        features = width
    modules += [
        nn.Linear(features, classes, bias=bias),
        *activation_modules(OUTPUT_ACTIVATIONS, output_activation, "output_activation"),
    ]
    return nn.Sequential(*modules)
