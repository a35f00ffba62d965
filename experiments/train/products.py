"""Gradients of stacked networks as products, written into memory that is used again.

Automatic differentiation allocates every activation and gradient of every update anew. Those of a
group are megabytes: the allocator maps them afresh each time, and to touch new pages takes longer
than to compute what is written there. Here all operations write where the last update wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.config import SweepConfig
from experiments.losses import LOSS_GRADIENTS
from experiments.train.stacked import StackedNetworks

_SLOPE = 0.01  # of nn.LeakyReLU


def _relu_backward(gradient: Tensor, output: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)


def _leaky_relu_backward(gradient: Tensor, output: Tensor) -> None:
    torch.ops.aten.leaky_relu_backward.grad_input(
        gradient, output, _SLOPE, self_is_result=True, grad_input=gradient
    )


# Name to `a`, in place, and to the product of a gradient, in place, with `a'` where `a` gave an
# output. All map 0 to 0, so that padded units and the gradients of their weights stay zero.
_Activation = tuple[Callable[[Tensor], object], Callable[[Tensor, Tensor], object]]
_ACTIVATIONS: dict[str, _Activation] = {
    "none": (lambda output: None, lambda gradient, output: None),
    "relu": (torch.relu_, _relu_backward),
    "leaky_relu": (
        lambda output: torch.nn.functional.leaky_relu_(output, _SLOPE),
        _leaky_relu_backward,
    ),
}


@dataclass(frozen=True)
class _Layer:
    """A linear layer of all networks; `weight`, `bias` and their gradients are those of training.

    Attributes:
        weight: (N, n_out, n_in).
        bias: (N, n_out, 1), or None.
        weight_gradient: as the weight.
        bias_gradient: as the bias.
        activation: forward and backward.
    """

    weight: Tensor
    bias: Tensor | None
    weight_gradient: Tensor
    bias_gradient: Tensor | None
    activation: _Activation

    def forward(self, x: Tensor, output: Tensor) -> None:
        """Evaluate for samples (n_in, batch) of all networks alike, or (N, n_in, batch)."""
        if x.dim() == 2:
            torch.mm(self.weight.flatten(0, 1), x, out=output.flatten(0, 1))
        else:
            torch.bmm(self.weight, x, out=output)
        if self.bias is not None:
            output.add_(self.bias)
        self.activation[0](output)

    def backward(self, x: Tensor, output: Tensor, gradient: Tensor) -> None:
        """Turn the gradient by the output, in place, into that by `W x + b`; write the layer's."""
        self.activation[1](gradient, output)
        if x.dim() == 2:
            torch.mm(gradient.flatten(0, 1), x.t(), out=self.weight_gradient.flatten(0, 1))
        else:
            torch.bmm(gradient, x.transpose(1, 2), out=self.weight_gradient)
        if self.bias_gradient is not None:
            torch.sum(gradient, 2, keepdim=True, out=self.bias_gradient)


class StackedGradients:
    """Writes the gradients of the losses of stacked networks into `grad` of their parameters.

    With `H_0 = x`, `H_l = a_l(Z_l)`, `Z_l = W_l H_{l-1} + b_l` (samples are columns) and G_l the
    gradient of a network's loss by Z_l:

        dW_l = G_l H_{l-1}^T,   db_l = G_l 1,   G_{l-1} = (W_l^T G_l) * a'_{l-1}(Z_{l-1}).

    Args:
        config: for which `supports` is true.
        group: the networks.
    """

    def __init__(self, config: SweepConfig, group: StackedNetworks) -> None:
        self._config, self._count = config, len(group.networks)
        for parameter in group.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        names = [name for name in group.parameters if name.endswith("weight")]
        kinds = [config.activation] * config.depth + [config.output_activation]
        self._layers = [
            self._layer(group, name, kind) for name, kind in zip(names, kinds, strict=True)
        ]
        # By the size of the batch: that of an epoch's last one may differ.
        self._memory: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    @staticmethod
    def supports(config: SweepConfig) -> bool:
        """Whether these are the gradients of a sweep: ReLU networks, without dropout or penalty."""
        return (
            config.model == "fcn"
            and {config.activation, config.output_activation} <= _ACTIVATIONS.keys()
            and config.loss in LOSS_GRADIENTS
            and not config.dropout
            and not config.lipschitz_penalty
        )

    @staticmethod
    def _layer(group: StackedNetworks, name: str, activation: str) -> _Layer:
        weight = group.parameters[name]
        bias = group.parameters.get(name.removesuffix("weight") + "bias")
        assert weight.grad is not None
        return _Layer(
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            weight_gradient=weight.grad,
            bias_gradient=None if bias is None else bias.grad,
            activation=_ACTIVATIONS[activation],
        )

    def _outputs_and_gradients(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        batch = x.shape[-1]
        if batch not in self._memory:
            shapes = [(self._count, layer.weight.shape[1], batch) for layer in self._layers]
            outputs, gradients = ([x.new_empty(shape) for shape in shapes] for _ in range(2))
            self._memory[batch] = (outputs, gradients)
        return self._memory[batch]

    @torch.no_grad()
    def write(self, x: Tensor, labels: Tensor) -> None:
        """Write the gradients of every network's loss on a batch.

        Args:
            x: (inputs, batch) for all networks alike, or (N, inputs, batch).
            labels: int64 (batch,) or (N, batch).
        """
        outputs, gradients = self._outputs_and_gradients(x)
        inputs = [x, *outputs[:-1]]
        for layer, own, output in zip(self._layers, inputs, outputs, strict=True):
            layer.forward(own, output)
        config = self._config
        LOSS_GRADIENTS[config.loss](outputs[-1], labels, config.target_scale, gradients[-1])
        for index in reversed(range(len(self._layers))):
            layer, gradient = self._layers[index], gradients[index]
            layer.backward(inputs[index], outputs[index], gradient)
            if index:
                torch.bmm(layer.weight.transpose(1, 2), gradient, out=gradients[index - 1])
