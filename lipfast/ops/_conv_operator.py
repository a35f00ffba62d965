"""One convolution as a linear map: its options, the map and its adjoint, its symbol's taps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lipfast.errors import ArgumentError
from lipfast.ops.sides import is_wide, wide

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
LARGEST_SIZE = 2**31 - 1

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ConvOperator:
    """x (C_in, *input_size) to pad(x) to (C_out, *output_size).

    A transposed convolution is kept as the convolution that it is the adjoint of.

    Attributes:
        weight: (C_out, C_in / groups, *kernel size), float32 or float64.
        input_size, output_size, stride, dilation: one per axis.
        pads: (left, right) per axis; negative numbers crop (zeros only).
        groups: of channels.
        mode: what padding holds.
        transposed: whether the caller's map is the adjoint.
    """

    weight: Tensor
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, ...]
    pads: Pads
    dilation: tuple[int, ...]
    groups: int
    mode: str
    transposed: bool

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def axes(self) -> int:
        return self.weight.dim() - 2

    @property
    def channels(self) -> tuple[int, int]:
        """How many the output and the input have."""
        return self.weight.shape[0], self.weight.shape[1] * self.groups

    @property
    def padded_size(self) -> tuple[int, ...]:
        return tuple(
            size + left + right
            for size, (left, right) in zip(self.input_size, self.pads, strict=True)
        )

    def side_by_side(self, weights: Tensor) -> ConvOperator:
        """Convolutions (N, *kernel) like this one: groups of channels of one operator."""
        return replace(self, weight=weights.flatten(0, 1), groups=self.groups * len(weights))

    def pad(self, x: Tensor) -> Tensor:
        """(N, C, *input_size) to (N, C, *padded_size)."""
        if self.mode == "zeros":
            return functional.pad(x, _flat(self.pads))
        for axis in range(self.axes):
            if self.pads[axis] != (0, 0):
                x = x.index_select(2 + axis, self.sources(axis, x.device))
        return x

    def unpad(self, y: Tensor) -> Tensor:
        """The adjoint of `pad`."""
        if self.mode == "zeros":
            return functional.pad(y, [-side for side in _flat(self.pads)])
        for axis in range(self.axes):
            if self.pads[axis] != (0, 0):
                shape = list(y.shape)
                shape[2 + axis] = self.input_size[axis]
                y = y.new_zeros(shape).index_add_(2 + axis, self.sources(axis, y.device), y)
        return y

    def sources(self, axis: int, device: torch.device) -> Tensor:
        """For every padded position of an axis, the input position that it reads (not zeros)."""
        size, (left, right) = self.input_size[axis], self.pads[axis]
        position = torch.arange(-left, size + right, device=device)
        if self.mode == "circular":
            return position % size
        if self.mode == "replicate":
            return position.clamp(0, size - 1)
        return (size - 1) - ((size - 1) - position.abs()).abs()

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(1, C_in, *input_size) to (1, C_out, *output_size), by torch, in the type of both."""
        symmetric, none = self._symmetric_zeros(), (0,) * self.axes
        x = x if symmetric is not None else self.pad(x)
        options = (self.stride, symmetric or none, self.dilation, False, none, self.groups)
        return torch.convolution(x, weight, None, *options)

    def adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        """(1, C_out, *output_size) to (1, C_in, *input_size)."""
        symmetric, none = self._symmetric_zeros(), (0,) * self.axes
        padding = symmetric or none
        whole = self.input_size if symmetric is not None else self.padded_size
        # Positions at the right end that no window reaches.
        rest = tuple(
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                whole,
                self.output_size,
                self.stride,
                padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        )
        allowed = all(
            r < max(s, d) for r, s, d in zip(rest, self.stride, self.dilation, strict=True)
        )
        more = rest if allowed else none
        options = (self.stride, padding, self.dilation, True, more, self.groups)
        full = torch.convolution(y, weight, None, *options)
        if not allowed:
            full = functional.pad(full, _flat(tuple((0, r) for r in rest)))
        return full if symmetric is not None else self.unpad(full)

    def _symmetric_zeros(self) -> tuple[int, ...] | None:
        """What torch's own padding argument can express."""
        if self.mode != "zeros" or any(left != right or left < 0 for left, right in self.pads):
            return None
        return tuple(left for left, _ in self.pads)

    def windows(self, x: Tensor, rows: slice) -> Iterator[Tensor]:
        """What every tap reads: (groups, C_in / groups, positions of `rows` of the first axis)."""
        padded = self.pad(x[None])[0]
        for index in itertools.product(*(range(size) for size in self.kernel_size)):
            view = padded
            for axis, k in enumerate(index):
                step, start = self.stride[axis], k * self.dilation[axis]
                first, last = (rows.start, rows.stop) if axis == 0 else (0, self.output_size[axis])
                view = view.narrow(1 + axis, start + first * step, (last - first - 1) * step + 1)
                view = view[(slice(None),) * (1 + axis) + (slice(None, None, step),)]
            yield view.reshape(self.groups, self.weight.shape[1], -1)

    def exact_taps_image(self, x: Tensor, weight: Tensor, memory: int) -> Tensor:
        """The image of x (C_in, *input_size) as one matrix product per tap, flattened.

        Every entry is a sum of C_in / groups times taps products in some order, never a Winograd or
        Fourier transform, in which errors are bounded otherwise. On other devices than the CPU
        matrix products may emulate float64 with shorter numbers: there products are formed and
        added entry by entry.
        """
        out = weight.shape[0] // self.groups
        matrices = weight.reshape(self.groups, out, weight.shape[1], -1)
        per_row = 8 * math.prod(self.output_size[1:]) * max(self.channels)
        step = max(1, min(self.output_size[0], memory // (4 * per_row)))
        pieces = []
        for first in range(0, self.output_size[0], step):
            rows = slice(first, min(first + step, self.output_size[0]))
            image: Tensor | None = None
            for k, window in enumerate(self.windows(x, rows)):
                tap = matrices[..., k]
                if not x.is_cpu:
                    product = _sums_of_products(tap, window, memory)
                    image = product if image is None else image.add_(product)
                elif image is None:
                    image = torch.bmm(tap, window)
                else:
                    image = torch.baddbmm(image, tap, window)
            assert image is not None
            pieces.append(image)
        return torch.cat(pieces, 2).reshape(-1)

    def taps(self, *, strided: bool = True) -> Tensor:
        """Taps of the symbol: (groups, 3 axes, rows, cols), rows <= cols, axes with one tap last.

        With g = gcd(stride, dilation) a stride s is one of s/g on an infinite grid without
        dilation: tap k is tap k // (s/g) of the polyphase component k mod (s/g).
        """
        steps, counts = self._components(strided)
        weight = self.weight
        fill = [
            (0, n * step - k) for n, step, k in zip(counts, steps, self.kernel_size, strict=True)
        ]
        weight = functional.pad(weight, _flat(tuple(fill)))
        split = [number for pair in zip(counts, steps, strict=True) for number in pair]
        out, cols = weight.shape[0] // self.groups, weight.shape[1]
        weight = weight.reshape(self.groups, out, cols, *split)
        axes = _many_taps_first(counts)
        taps = [3 + 2 * axis for axis in axes]
        components = [4 + 2 * axis for axis in range(self.axes)]
        weight = weight.permute(0, *taps, 1, 2, *components)
        shape = [counts[axis] for axis in axes] + [1] * (3 - self.axes)
        weight = weight.reshape(self.groups, *shape, out, cols * math.prod(steps))
        return wide(weight).contiguous()

    def taps_shape(self) -> tuple[int, ...]:
        """Shape of `taps()`, without forming them."""
        _, counts = self._components(strided=True)
        ordered = [counts[axis] for axis in _many_taps_first(counts)] + [1] * (3 - self.axes)
        sides = self._symbol_shape()
        return (self.groups, *ordered, min(sides), max(sides))

    def transposes_taps(self) -> bool:
        """Whether `taps()` are those of the transposed symbol, whose rows are the smaller side."""
        return not is_wide(*self._symbol_shape())

    def tap_axes(self) -> list[int]:
        """The kernel's axes in the order of `taps()`."""
        return _many_taps_first(self._components(strided=True)[1])

    def _symbol_shape(self) -> tuple[int, int]:
        steps, _ = self._components(strided=True)
        return self.weight.shape[0] // self.groups, self.weight.shape[1] * math.prod(steps)

    def _components(self, strided: bool) -> tuple[list[int], list[int]]:
        """Per axis: polyphase components, and taps of each."""
        steps = [
            s // math.gcd(s, d) if strided else 1
            for s, d in zip(self.stride, self.dilation, strict=True)
        ]
        return steps, [-(-k // step) for k, step in zip(self.kernel_size, steps, strict=True)]

    def padding_factor(self) -> tuple[float, bool]:
        """By what padding may exceed the symbol's supremum, rounded up; and if stride 1 helps.

        The factor is the norm of padding: the square root of how often an element is read. Where
        circular padding makes a circulant (or rows of one) it is 1. The second value says whether
        the supremum at stride 1 is a bound without any factor.
        """
        square, covered = 1, self.mode == "circular"
        for axis in range(self.axes):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            total = sum(self.pads[axis])
            covered = covered and total <= reach
            if self.mode == "zeros" or total == 0:
                continue
            circulant = self.mode == "circular" and (
                (self.stride[axis] == 1 and total <= reach)
                or (total == reach and self.input_size[axis] % self.stride[axis] == 0)
            )
            if not circulant:
                sources = self.sources(axis, torch.device("cpu"))
                square *= int(torch.bincount(sources).max())
        root = math.sqrt(square)
        exact = math.isqrt(square) ** 2 == square
        return (root if exact else math.nextafter(root, math.inf)), covered and square > 1


def _sums_of_products(a: Tensor, b: Tensor, memory: int) -> Tensor:
    """A B (g, o, p) of A (g, o, c) and B (g, c, p), by elementwise operations; rows in parts."""
    step = max(1, memory // (16 * b.numel()))
    parts = [(part[..., None] * b[:, None]).sum(2) for part in torch.split(a, step, dim=1)]
    return torch.cat(parts, 1)


def _many_taps_first(counts: Sequence[int]) -> list[int]:
    """Axes by their numbers of taps, those with one tap last: the native op skips them."""
    return sorted(range(len(counts)), key=lambda axis: counts[axis] == 1)


def _flat(pads: Pads) -> list[int]:
    """In the order of torch's pad: the last axis first."""
    return [side for pair in reversed(pads) for side in pair]


def _per_axis(value: object, axes: int, name: str, smallest: int) -> tuple[int, ...]:
    values = value if isinstance(value, tuple | torch.Size) else (value,) * axes
    if len(values) != axes:
        raise ArgumentError(f"{name}: expected {axes} values, one per axis, got {tuple(values)!r}")
    numbers: list[int] = []
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ArgumentError(
                f"{name}: expected an integer or a tuple of {axes} (a list holds one value per "
                f"kernel), got {value!r}"
            )
        if not smallest <= number <= LARGEST_SIZE:
            raise ArgumentError(f"{name}: expected values of {smallest} to 2^31, got {number}")
        numbers.append(number)
    return tuple(numbers)


def _pads(padding: object, name: str, reach: Sequence[int], stride: Sequence[int]) -> Pads:
    axes = len(reach)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * axes
        if padding != "same":
            raise ArgumentError(
                f"{name}: padding must be numbers, 'same' or 'valid', got {padding!r}"
            )
        if any(step != 1 for step in stride):
            raise ArgumentError(f"{name}: padding='same' needs stride 1, got {tuple(stride)}")
        return tuple((total // 2, total - total // 2) for total in reach)
    if isinstance(padding, tuple) and any(isinstance(side, tuple) for side in padding):
        if len(padding) != axes or not all(
            isinstance(side, tuple) and len(side) == 2 for side in padding
        ):
            raise ArgumentError(
                f"{name}: uneven padding is one pair (left, right) per axis, {axes} of them, got "
                f"{padding!r}"
            )
        pairs = [_per_axis(side, 2, f"{name}: padding", 0) for side in padding]
        return tuple((left, right) for left, right in pairs)
    return tuple((side, side) for side in _per_axis(padding, axes, f"{name}: padding", 0))


def conv_operator(
    weight: Tensor,
    name: str,
    *,
    input_size: object,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
    padding_mode: object,
    transposed: object,
    output_padding: object,
) -> ConvOperator:
    """A `ConvOperator` from the options of torch's modules.

    Raises:
        ArgumentError: an option of wrong type or value; the message begins with `name`.
    """
    axes = weight.dim() - 2
    size = _per_axis(input_size, axes, f"{name}: input_sizes", 1)
    steps = _per_axis(stride, axes, f"{name}: stride", 1)
    spread = _per_axis(dilation, axes, f"{name}: dilation", 1)
    more = _per_axis(output_padding, axes, f"{name}: output_padding", 0)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ArgumentError(f"{name}: groups must be a positive integer, got {groups!r}")
    if weight.shape[0] % groups:
        raise ArgumentError(
            f"{name}: {weight.shape[0]} channels (first dimension of the kernel) are not divisible "
            f"by {groups} groups"
        )
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        raise ArgumentError(
            f"{name}: padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
        )
    if not isinstance(transposed, bool):
        raise ArgumentError(f"{name}: transposed must be True or False, got {transposed!r}")
    if any(more) and not transposed:
        raise ArgumentError(f"{name}: output_padding belongs to transposed convolutions")
    reach = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
    pads = _pads(padding, name, reach, steps)
    mode = str(padding_mode)
    if transposed:
        if mode != "zeros":
            raise ArgumentError(f"{name}: transposed convolutions have padding_mode 'zeros' only")
        image = tuple(
            (n - 1) * s - left - right + r + extra + 1
            for n, s, (left, right), r, extra in zip(size, steps, pads, reach, more, strict=True)
        )
        _check_not_empty(image, size, name)
        # As many positions on the right as make the adjoint's output exactly `size`.
        pads = tuple(
            (left, (n - 1) * s + r + 1 - out - left)
            for n, s, r, out, (left, _) in zip(size, steps, reach, image, pads, strict=True)
        )
        return ConvOperator(weight, image, size, steps, pads, spread, groups, mode, True)
    _check_padding(size, pads, mode, name)
    output = tuple(
        (n + left + right - r - 1) // s + 1
        for n, (left, right), r, s in zip(size, pads, reach, steps, strict=True)
    )
    _check_not_empty(output, size, name)
    return ConvOperator(weight, size, output, steps, pads, spread, groups, mode, False)


def _check_not_empty(output: tuple[int, ...], size: tuple[int, ...], name: str) -> None:
    if any(out < 1 for out in output):
        raise ArgumentError(f"{name}: the output would be empty: {output} for an input of {size}")


def _check_padding(size: tuple[int, ...], pads: Pads, mode: str, name: str) -> None:
    for n, sides in zip(size, pads, strict=True):
        limit = n if mode == "circular" else n - 1
        if mode in ("circular", "reflect") and max(sides) > limit:
            raise ArgumentError(
                f"{name}: {mode} padding of {max(sides)} is more than an input of {n} allows "
                f"({limit})"
            )
