"""What certified secants need of chains of linear maps and piecewise-linear activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.norms import Norm
from lipfast.ops._arguments import check_floating, check_same_device, native_dtype
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
_MOST_ON_CUDA = 48  # linear stages, and activations, of a chain
_MOST_SIDE_ON_CUDA = 64  # of the smaller side of a Jacobian


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


def has_secant_kernels_on(
    stages: Sequence[Stage], jacobian_shape: tuple[int, int], device: torch.device
) -> bool:
    """Whether `PiecewiseLinearChains.points` and `best_quotients` take these stages on a device.

    CUDA takes up to 48 linear stages and 48 activations whose Jacobians have a side of up to 64.

    Example:
        >>> from lipfast.ops.chain_stages import Activation, Linear
        >>> stages = [Linear(), Activation("relu"), Linear()]
        >>> has_secant_kernels_on(stages, (10, 784), torch.device("cuda"))
        True
        >>> has_secant_kernels_on(stages, (10, 784), torch.device("cpu"))
        False
    """
    kinds = [sum(isinstance(stage, kind) for stage in stages) for kind in (Linear, Activation)]
    return (
        device.type == "cuda"
        and has_secant_kernel(stages)
        and max(kinds) <= _MOST_ON_CUDA
        and min(jacobian_shape) <= _MOST_SIDE_ON_CUDA
    )


class PiecewiseLinearChains:
    r"""N networks $f_n$ of linear maps and piecewise-linear activations, evaluated in float64.

    The weights are read as they are, one network after the other on one thread each; float32
    becomes float64 exactly. Samples and points may have any shape; they are read row by row.
    `jacobians`, `kink_distances` and `enclosures` are for the CPU, `points` and `best_quotients`,
    which do all that those are for in two kernels, for CUDA (see `has_secant_kernels_on`).

    Args:
        weights: per network, one (n_out, n_in) for each `Linear`, first stage first; on one device;
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
        self._like = weights[0][0]
        self._networks, self._inputs = len(weights), shapes[0][1][1]
        flat_weights: list[Tensor] = []
        flat_biases: list[Tensor] = []
        for network, entries in enumerate(zip(weights, biases, strict=True)):
            for (stage, shape), weight, bias in zip(shapes, *entries, strict=True):
                name = f"network {network}, stage {stage}"
                flat_weights.append(self._as_kernels_read(weight, shape, name, "weight"))
                flat_biases.append(
                    flat_weights[-1].new_empty(0)
                    if bias is None
                    else self._as_kernels_read(bias, shape[:1], name, "bias")
                )
        if len({tensor.dtype for tensor in (*flat_weights, *flat_biases)}) > 1:
            flat_weights = [weight.double() for weight in flat_weights]
            flat_biases = [bias.double() for bias in flat_biases]
        # What the native ops are given beside the points.
        self._chains = (flat_weights, flat_biases, *encode_secant_chain(stages))

    def _as_kernels_read(
        self, tensor: Tensor, shape: tuple[int, ...], name: str, kind: str
    ) -> Tensor:
        """A tensor in the layout that the op takes. Most are so already, which is quick to see."""
        plain = (
            isinstance(tensor, Tensor)
            and tensor.dtype in (torch.float32, torch.float64)
            and tensor.layout == torch.strided
            and tensor.device == self._like.device
        )
        if not plain:
            check_same_device(check_floating(tensor, name), self._like, name)
        if tensor.shape != shape:
            raise ArgumentError(f"{name}: expected a {kind} {shape}, got {tuple(tensor.shape)}")
        if plain and tensor.is_contiguous() and not tensor.requires_grad:
            return tensor
        return native_dtype(tensor.detach())

    def _require(self, device: str, method: str) -> None:
        if self._like.device.type != device:
            advice = " (tensor.cpu())" if device == "cpu" else ""
            raise ArgumentError(
                f"{method}: the networks are on {self._like.device}; this is for {device}{advice}"
            )

    def _rows(self, x: Tensor, name: str, *middle: int) -> Tensor:
        """Dense (networks, *middle, inputs) in float64."""
        check_same_device(check_floating(x, name), self._like, name)
        x = x.detach().double()
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
        self._require("cpu", "jacobians")
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
        self._require("cpu", "kink_distances")
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
        self._require("cpu", "enclosures")
        count = points.shape[1] if points.dim() > 1 else 0
        values, errors = torch.ops.lipfast.chain_secants_enclosures(
            self._rows(points, "points", count), *self._chains
        )
        return values, errors

    def points(
        self,
        x: Tensor,
        norm: Norm,
        fractions: Sequence[float],
        ladder: Sequence[float],
        longest: float,
    ) -> Tensor:
        """Points (N, C, D) on a line through each sample along which its Jacobian stretches most.

        The sample, and for each step a point down and one up. Nothing is certified of them. On
        CUDA, one launch.

        Args:
            x: (N, *shape), one sample per network.
            norm: 1, 2 or inf.
            fractions: shares of the way to the nearest kinks.
            ladder: steps relative to the largest entry of the sample.
            longest: of a way to the kinks, likewise.
        """
        self._require("cuda", "points")
        rows = self._rows(x, "x")
        found: Tensor = torch.ops.lipfast.chain_secants_points(
            rows, *self._chains, _code_of(norm), list(fractions), list(ladder), longest
        )
        return found

    def best_quotients(
        self, points: Tensor, norm: Norm, tight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""The best certified quotient $\|f_n(a) - f_n(b)\| / \|a - b\|$, rounded down.

        Of the pairs of each step: down and up, the sample and up, down and the sample. Holds in
        real arithmetic for the stored points, whatever they are; see docs/bounds.md. On CUDA, one
        launch.

        Args:
            points: (N, C, *shape): a sample, then points in pairs, as of `points`.
            norm: 1, 2 or inf.
            tight: quotients below this share of those without errors are loose.

        Returns:
            Quotients (N,), 0 where nothing is proved; 1.0 where they are loose and 0.0 elsewhere,
            (N,); and the points of the best (N, 2, D).
        """
        self._require("cuda", "best_quotients")
        count = points.shape[1] if points.dim() > 1 else 0
        found, ends = torch.ops.lipfast.chain_secants_quotients(
            self._rows(points, "points", count), *self._chains, _code_of(norm), tight
        )
        return found[:, 0], found[:, 1], ends


def _code_of(norm: Norm) -> int:
    """The native op's number of a norm."""
    return 0 if math.isinf(norm) else int(norm)


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


@torch.library.register_fake("lipfast::chain_secants_points")
def _points_fake(x: Tensor, *arguments: Any) -> Tensor:
    *_, fractions, ladder, _longest = arguments
    return x.new_empty((x.shape[0], 1 + 2 * (len(fractions) + len(ladder)), x.shape[1]))


@torch.library.register_fake("lipfast::chain_secants_quotients")
def _quotients_fake(points: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    networks, _count, inputs = points.shape
    return points.new_empty((networks, 2)), points.new_empty((networks, 2, inputs))
