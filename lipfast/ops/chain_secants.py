"""What certified secants need of chains of linear maps and piecewise-linear activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, native_dtype
from lipfast.ops.chain_activations import ACTIVATIONS
from lipfast.ops.chain_stages import (
    Activation,
    Flatten,
    Linear,
    Shape,
    Stage,
    encode_activation,
    output_shape,
)

PIECEWISE_LINEAR = tuple(
    name for name, function in ACTIVATIONS.items() if function.pieces is not None
)
"""Names of the activations that the op takes."""

_LINEAR = -1


def has_secant_kernel(stages: Sequence[Stage]) -> bool:
    """Whether `PiecewiseLinearChains` takes these stages.

    Example:
        >>> from lipfast.ops.chain_stages import Activation, Linear
        >>> has_secant_kernel([Linear(), Activation("relu"), Linear()])
        True
        >>> has_secant_kernel([Linear(), Activation("tanh")])
        False
    """
    return any(isinstance(stage, Linear) for stage in stages) and all(
        isinstance(stage, Linear | Flatten)
        or (isinstance(stage, Activation) and stage.name in PIECEWISE_LINEAR)
        for stage in stages
    )


class PiecewiseLinearChains:
    r"""N networks $f_n$ of linear maps and piecewise-linear activations, evaluated in float64.

    The weights are read as they are, one network after the other on one thread each; float32
    becomes float64 exactly. Samples and points may have any shape; they are read row by row.

    Args:
        weights: per network, one (n_out, n_in) for each `Linear`, first stage first; on the CPU;
            all networks alike. Unless all are float64 or none is, they are copied to float64.
        biases: alike: (n_out,) or None.
        stages: `Linear`, `Flatten` (which changes nothing here) and the activations of
            `PIECEWISE_LINEAR`, with at least one `Linear`.

    Raises:
        ArgumentError: wrong types, dtypes or shapes (the message names network and stage).

    Example:
        >>> import torch
        >>> from lipfast.ops.chain_stages import Activation, Linear
        >>> weights = [[torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])]]
        >>> stages = [Linear(), Activation("relu"), Linear()]
        >>> networks = PiecewiseLinearChains(weights, [[None, None]], stages)
        >>> x, direction = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> networks.jacobians(x)
        tensor([[[3., 6.]]], dtype=torch.float64)
        >>> networks.kink_distances(x, direction)
        (tensor([1.5000], dtype=torch.float64), tensor([inf], dtype=torch.float64))
        >>> values, errors = networks.enclosures(torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]))
        >>> values
        tensor([[[9.],
                 [0.]]], dtype=torch.float64)
        >>> bool((errors < 1e-14).all())
        True
    """

    def __init__(
        self,
        weights: Sequence[Sequence[Tensor]],
        biases: Sequence[Sequence[Tensor | None]],
        stages: Sequence[Stage],
    ) -> None:
        if not has_secant_kernel(stages):
            raise ArgumentError(
                "expected at least one Linear, Flatten and the activations "
                f"{', '.join(PIECEWISE_LINEAR)}, got {list(stages)}"
            )
        if len(weights) == 0 or len(weights) != len(biases):
            raise ArgumentError(
                f"{len(weights)} networks' weights and {len(biases)} networks' biases"
            )
        stages = [stage for stage in stages if not isinstance(stage, Flatten)]
        maps = sum(isinstance(stage, Linear) for stage in stages)
        for network, (own, shifts) in enumerate(zip(weights, biases, strict=True)):
            if len(own) != maps or len(shifts) != maps:
                raise ArgumentError(
                    f"network {network}: {len(own)} weights, {len(shifts)} biases, {maps} Linear "
                    "stages"
                )
        shapes = _map_shapes(stages, weights[0])
        self._networks, self._inputs = len(weights), shapes[0][1][1]
        flat_weights: list[Tensor] = []
        flat_biases: list[Tensor] = []
        for network, entries in enumerate(zip(weights, biases, strict=True)):
            for (stage, shape), weight, bias in zip(shapes, *entries, strict=True):
                name = f"network {network}, stage {stage}"
                flat_weights.append(_as_kernels_read(weight, shape, name, "weight"))
                flat_biases.append(
                    flat_weights[-1].new_empty(0)
                    if bias is None
                    else _as_kernels_read(bias, shape[:1], name, "bias")
                )
        if len({tensor.dtype for tensor in (*flat_weights, *flat_biases)}) > 1:
            flat_weights = [weight.double() for weight in flat_weights]
            flat_biases = [bias.double() for bias in flat_biases]
        # What the native ops are given beside the points.
        self._chains = (flat_weights, flat_biases, *encode_secant_chain(stages))

    def _rows(self, x: Tensor, name: str, *middle: int) -> Tensor:
        """Dense (networks, *middle, inputs) in float64."""
        x = _on_cpu(check_floating(x, name), name).detach().double()
        leading = (self._networks, *middle)
        sizes = math.prod(x.shape[len(leading) :])
        if tuple(x.shape[: len(leading)]) != leading or sizes != self._inputs:
            raise ArgumentError(
                f"{name}: expected {self._networks} networks' samples of {self._inputs} entries, "
                f"got shape {tuple(x.shape)}"
            )
        return x.reshape(*leading, self._inputs).contiguous()

    def jacobians(self, x: Tensor) -> Tensor:
        """$J_n(x_n)$ with autograd's derivatives at kinks, not certified: (N, K, D), float64.

        Args:
            x: (N, *shape), one sample per network.
        """
        jacobians: Tensor = torch.ops.lipfast.chain_secants_jacobians(
            self._rows(x, "x"), *self._chains
        )
        return jacobians

    def kink_distances(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """How far $x_n + t d_n$ stays in its linear region, backward and forward: (N,) each.

        The smallest $t > 0$ at which the linear pieces of some activation meet, in float64, not
        certified; inf where there is none.

        Args:
            x: (N, *shape), one sample per network.
            direction: alike.
        """
        reach = torch.ops.lipfast.chain_secants_kinks(
            self._rows(x, "x"), self._rows(direction, "direction"), *self._chains
        )
        return reach[:, 0], reach[:, 1]

    def enclosures(self, points: Tensor) -> tuple[Tensor, Tensor]:
        r"""Values with certified errors: $|f_n(p) - \mathrm{value}| \le \mathrm{error}$.

        Elementwise, by running error analysis (Higham, 2002, sec. 3.3); see docs/bounds.md. Holds
        in real arithmetic for every stored point; an overflow on the way gives the error inf.

        Args:
            points: (N, C, *shape), float64 or what becomes float64 exactly.

        Returns:
            Values and errors, (N, C, K) each, float64.
        """
        count = points.shape[1] if points.dim() > 1 else 0
        values, errors = torch.ops.lipfast.chain_secants_enclosures(
            self._rows(points, "points", count), *self._chains
        )
        return values, errors


def encode_secant_chain(stages: Sequence[Stage]) -> tuple[list[int], list[float]]:
    """The stages but for `Flatten` as the native op takes them: a number and two parameters each.

    Example:
        >>> from lipfast.ops.chain_stages import Activation, Linear
        >>> encode_secant_chain([Linear(), Activation("leaky_relu", (0.5,))])
        ([-1, 1], [0.0, 0.0, 0.5, 0.0])
    """
    numbers: list[int] = []
    parameters: list[float] = []
    for stage in stages:
        if isinstance(stage, Flatten):
            continue
        code, values = encode_activation(stage, _LINEAR)
        numbers.append(code)
        parameters += values
    return numbers, parameters


def _map_shapes(stages: Sequence[Stage], weights: Sequence[Tensor]) -> list[tuple[int, Shape]]:
    """Stages and shapes of the maps, from the first network's weights."""
    start = next(index for index, stage in enumerate(stages) if isinstance(stage, Linear))
    first = check_floating(weights[0], f"network 0, stage {start}", 2)
    shape: Shape = (first.shape[1],)
    shapes = []
    remaining = iter(weights)
    for index, stage in enumerate(stages):
        weight = next(remaining) if isinstance(stage, Linear) else None
        name = f"network 0, stage {index}"
        size = None if weight is None else tuple(check_floating(weight, name).shape)
        try:
            shape = output_shape(stage, shape, size)
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None
        if size is not None:
            shapes.append((index, size))
    return shapes


def _as_kernels_read(tensor: Tensor, shape: tuple[int, ...], name: str, kind: str) -> Tensor:
    """A tensor in the layout that the op takes. Most are so already, which is quick to see."""
    plain = (
        isinstance(tensor, Tensor)
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
    )
    if not plain:
        _on_cpu(check_floating(tensor, name), name)
    if tensor.shape != shape:
        raise ArgumentError(f"{name}: expected a {kind} {shape}, got {tuple(tensor.shape)}")
    if plain and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    return native_dtype(tensor.detach())


def _on_cpu(tensor: Tensor, name: str) -> Tensor:
    if tensor.device.type != "cpu":
        raise ArgumentError(f"{name}: is on {tensor.device}; this op is for the CPU (tensor.cpu())")
    return tensor


def _outputs_of(weights: Sequence[Tensor], stages: Sequence[int]) -> int:
    affine = sum(number == _LINEAR for number in stages)
    return weights[affine - 1].shape[0]


@torch.library.register_fake("lipfast::chain_secants_jacobians")
def _jacobians_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], stages: list[int], *_: object
) -> Tensor:
    return x.new_empty((x.shape[0], _outputs_of(weights, stages), x.shape[1]))


@torch.library.register_fake("lipfast::chain_secants_kinks")
def _kinks_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], 2))


@torch.library.register_fake("lipfast::chain_secants_enclosures")
def _enclosures_fake(
    points: Tensor, weights: list[Tensor], biases: list[Tensor], stages: list[int], *_: object
) -> tuple[Tensor, Tensor]:
    shape = (*points.shape[:2], _outputs_of(weights, stages))
    return points.new_empty(shape), points.new_empty(shape)
