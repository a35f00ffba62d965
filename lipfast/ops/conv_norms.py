"""Brackets of the spectral norms of any number of convolutions in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.ops._arguments import FLOATING, check_floating, named_entries, native_dtype
from lipfast.ops._conv_lower import lower_bound, plane_wave
from lipfast.ops._conv_operator import ConvOperator, conv_operator
from lipfast.ops.denormals import denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.ops.spectral_norms import DEFAULT_MEMORY, SpectralNorms, spectral_norms

_UPPER_METHODS = ("cholesky", "holder")
# Numbers in front of the vector of a start: group, frequency on three axes.
_HEADER = 4
# Circulants of up to so many frequencies are maximised exactly, not over all sizes.
_GRID_POINTS = 1024
# Relative gap of a bound that is loose by more for other reasons.
_LOOSE = 0.1

_Values = TypeVar("_Values")


class Supremum(NamedTuple, Generic[_Values]):
    r"""Bracket of $\sup_\theta \sigma_{\max}(\hat W(\theta))$, keyed like the kernels."""

    lower: _Values
    upper: _Values


class SymbolProof:
    """Taps whose symbol was bounded by branch and bound: true of them, wherever it is used.

    Made by `conv_norms` only. A bound of taps that were changed in place since is not used.
    """

    def __init__(self, taps: Tensor, bound: float) -> None:
        self._taps, self._bound, self._version = taps, bound, taps._version

    def bound_of(self, shape: Sequence[int]) -> tuple[Tensor, float] | None:
        """The taps and their bound; None if they have another shape, or were changed."""
        same = tuple(self._taps.shape) == tuple(shape) and self._taps._version == self._version
        return (self._taps, self._bound) if same else None


@dataclass(frozen=True, repr=False)
class ConvNorms(Generic[_Values]):
    """Brackets of the spectral norms of N convolutions; each field is keyed like the input.

    For a list (or one tensor), `lower`, `upper`, `certified`, `passes`, `cells` and the fields of
    `supremum` are tensors of N values and the others lists of N entries; for a mapping,
    dictionaries with its keys.

    Attributes:
        lower: float64. Of the convolution at the given input size; never above the truth where
            `certified`.
        upper: float64. Never below the truth at the given input size.
        certified: whether both bounds are proved. False where denormals are rounded to zero (see
            `lipfast.ops.denormals`), which the lower bound's proof excludes.
        supremum: lower and upper bound of the symbol's supremum: of the norm over all input sizes
            for zero and circular padding. `upper` may exceed it for other padding, and is below it
            where a finite grid of frequencies is exact.
        right: float64 tensors of unit norm, shaped like an input without the batch dimension:
            where `lower` is attained.
        left: the image's direction (zero if the image is), shaped like an output.
        passes: products with the convolution and its adjoint.
        cells: cells of frequencies whose Gram matrix was factored.
        frequency: where the supremum's lower value is attained, one angle per axis, in radians per
            step of the (polyphase) taps.
        method: how `upper` was proved: "cholesky", "holder" (nothing tighter fits into `memory`:
            loose), each for the symbol, "difference" (the bound of the kernel in `start` and that
            of the difference), or "matrix" for kernels of one tap.
        maximum: what `start` of a later call begins its search with.
        reference: for the same, a `SymbolProof`: the taps that were proved by branch and bound, and
            their bound; a `start` without it (None) begins with vectors only.
    """

    lower: _Values
    upper: _Values
    certified: _Values
    supremum: Supremum[_Values]
    right: Any
    left: Any
    passes: _Values
    cells: _Values
    frequency: Any
    method: Any
    maximum: Any
    reference: Any = None

    def __repr__(self) -> str:
        keys = (
            list(cast("dict[str, Tensor]", self.lower))
            if isinstance(self.lower, dict)
            else list(range(len(cast(Tensor, self.lower))))
        )
        lines = [f"ConvNorms of {len(keys)} {'kernel' if len(keys) == 1 else 'kernels'}"]
        shown = keys[:20]
        width = max((len(str(key)) for key in shown), default=0)
        for key in shown:
            numbers = [
                f"{values[key].item():.7g}"  # type: ignore[index]
                for values in (self.lower, self.upper, *self.supremum)
            ]
            mark = "certified" if self.certified[key] else "estimate "  # type: ignore[index]
            lines.append(
                f"  {key!s:<{width}}  [{numbers[0]}, {numbers[1]}]  "
                f"supremum [{numbers[2]}, {numbers[3]}]  {mark}  {self.method[key]}"
            )
        if len(keys) > len(shown):
            lines.append(f"  ... and {len(keys) - len(shown)} more")
        return "\n".join(lines)


def conv_norms(
    kernels: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
    *,
    input_sizes: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    padding_mode: Any = "zeros",
    transposed: Any = False,
    output_padding: Any = 0,
    rtol: float = 1e-3,
    start: ConvNorms[Any] | None = None,
    seed: int = 0,
    max_passes: int = 300,
    max_cells: int = 100_000,
    memory: int = DEFAULT_MEMORY,
) -> ConvNorms[Any]:
    r"""Lower and upper bounds of $\|x \mapsto W * x\|_2$, the operator as torch applies it.

    Lower: Lanczos with the convolution and its adjoint at the given input size, less rounding.
    Upper: on the infinite grid the norm is $S = \sup_\theta \sigma_{\max}(\hat W(\theta))$,
    $\hat W(\theta) = \sum_k W_k e^{i k \cdot \theta}$ (of the polyphase components for a stride),
    and zero padding is a compression of that. A branch and bound over half of the torus covers it
    by cells; a cell with centre c, angle D = $\sum_a d_a |c_a - \theta_a|$ at most, $d_a$ = (taps -
    1)/2, cannot hold a maximum above $\tau$ once $\sigma_{\max}(\hat W(c)) \le \tau \cos D$ (Duffin
    and Schaeffer, 1938), which a complex Cholesky factorisation proves. Other padding multiplies S
    by the norm of padding (1 for a circulant, the square root of how often an element is read
    otherwise); groups are the maximum over groups; a transposed convolution has the norm of its
    adjoint. On small inputs the norm is visibly below S.

    Every option is one value for all kernels, a tuple with one value per axis, a list with one of
    these per kernel, or, where the kernels are a mapping, a mapping with the same keys.

    Args:
        kernels: weights as torch's modules hold them, (C_out, C_in / groups, \*kernel size) with
            one to three axes, (C_in, C_out / groups, \*kernel size) where `transposed`; float16,
            bfloat16, float32 or float64; a list, a mapping or one tensor.
        input_sizes: of the axes, without batch and channels.
        stride: as torch's.
        padding: numbers, "same", "valid", or uneven: one pair (left, right) per axis.
        dilation: as torch's.
        groups: as torch's.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        transposed: whether a kernel is that of a transposed convolution.
        output_padding: as torch's, of transposed convolutions.
        rtol: bound on `(upper - lower) / upper` of `supremum`.
        start: what an earlier call with kernels of the same shapes and options returned: begins
            with its vectors and frequencies. Where a kernel has changed by much less than `rtol`,
            its bound is that of the earlier kernel plus one of the difference. Whether a bound is
            proved does not depend on it.
        seed: of start vectors.
        max_passes: limit on Lanczos passes per kernel.
        max_cells: work budget: after so many factored cells the bound is the best that can be
            proved at once.
        memory: bytes for the Gram matrices of one kernel's symbol (without room for them the upper
            bound is Hoelder's, loose), and for one Lanczos basis.

    Returns:
        A `ConvNorms`, keyed like `kernels`.

    Raises:
        ArgumentError: wrong type, dtype, shape or option; the message names the kernel.
        NonFiniteError: a kernel holds NaN or Inf.

    Example:
        >>> import torch, lipfast
        >>> blur = torch.tensor([0.25, 0.5, 0.25]).reshape(1, 1, 3)
        >>> norms = lipfast.conv_norms(blur, input_sizes=16, padding=1)
        >>> print(f"{norms.lower[0]:.3f} {norms.supremum.lower[0]:.3f} {norms.upper[0]:.2f}")
        0.991 1.000 1.00
        >>> strided = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> norms = lipfast.conv_norms(
        ...     {"0.weight": strided.weight}, input_sizes=(32, 32), stride=2, padding=1
        ... )
        >>> bool(norms.lower["0.weight"] <= norms.upper["0.weight"])
        True
    """
    if not isinstance(rtol, (int, float)) or not 0 < rtol < 1:
        raise ArgumentError(f"rtol must be a number between 0 and 1, got {rtol!r}")
    for name, value, smallest in (
        ("seed", seed, 0),
        ("memory", memory, 0),
        ("max_passes", max_passes, 1),
        ("max_cells", max_cells, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**63:
            raise ArgumentError(
                f"{name} must be a 64-bit integer of at least {smallest}, got {value!r}"
            )
    keys, weights = _weights(kernels)
    options = {
        "input_size": _spread(input_sizes, "input_sizes", kernels, keys),
        "stride": _spread(stride, "stride", kernels, keys),
        "padding": _spread(padding, "padding", kernels, keys),
        "dilation": _spread(dilation, "dilation", kernels, keys),
        "groups": _spread(groups, "groups", kernels, keys),
        "padding_mode": _spread(padding_mode, "padding_mode", kernels, keys),
        "transposed": _spread(transposed, "transposed", kernels, keys),
        "output_padding": _spread(output_padding, "output_padding", kernels, keys),
    }
    convolutions = [
        conv_operator(weight, _name(key), **{name: values[i] for name, values in options.items()})
        for i, (key, weight) in enumerate(zip(keys, weights, strict=True))
    ]
    begin = _starts(start, kernels, keys, convolutions)
    budget = Budget(float(rtol), int(seed), int(max_passes), int(max_cells), int(memory))
    with plain_arithmetic():
        uppers = upper_bounds(convolutions, begin, budget)
        flushed = denormals_flushed()
        rows = [
            _row(conv, upper, first, budget, not flushed)
            for conv, upper, first in zip(convolutions, uppers, begin, strict=True)
        ]
    return _collect(rows, keys, keyed=isinstance(kernels, Mapping))


class Budget(NamedTuple):
    """What one call may spend, and what for."""

    rtol: float
    seed: int
    max_passes: int
    max_cells: int
    memory: int


class Start(NamedTuple):
    """What is known from an earlier call: the symbol's maximum, the operator's right vector."""

    maximum: Tensor | None
    right: Tensor | None
    reference: SymbolProof | None = None


@dataclass
class _Upper:
    """The symbol's bracket, where it is attained, and the bound at the true size."""

    lower: float
    upper: float
    bound: float
    cells: int
    method: str
    maximum: Tensor
    group: int
    theta: Tensor  # per axis of the kernel
    vector: Tensor  # complex: the symbol's right singular vector
    reference: SymbolProof | None


def _name(key: object) -> str:
    return f"kernel {key!r}" if isinstance(key, str) else f"kernel {key}"


def _weights(kernels: object) -> tuple[list[Any], list[Tensor]]:
    # Of a state dict, the convolutions' kernels.
    keys, values = named_entries(kernels, "kernels", lambda _, value: _left_out(value), 3)
    weights = []
    for key, value in zip(keys, values, strict=True):
        weight = check_floating(value, _name(key))
        if weight.device.type != "cpu":
            raise ArgumentError(
                f"{_name(key)}: is on {weight.device}; conv_norms has CPU kernels only "
                "(tensor.cpu())"
            )
        if not 3 <= weight.dim() <= 5:
            raise ArgumentError(
                f"{_name(key)}: expected (out, in / groups, *kernel size) with one to three axes, "
                f"got shape {tuple(weight.shape)}"
            )
        if weight.numel() == 0:
            raise ArgumentError(f"{_name(key)}: is empty, shape {tuple(weight.shape)}")
        weight = native_dtype(weight)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{_name(key)}: holds NaN or Inf; its norm is not defined")
        weights.append(weight)
    return keys, weights


def _left_out(value: object) -> bool:
    return isinstance(value, Tensor) and (value.dim() < 3 or value.dtype not in FLOATING)


def _spread(value: object, name: str, kernels: object, keys: list[Any]) -> list[Any]:
    """One value of an option per kernel."""
    if isinstance(value, Mapping):
        if not isinstance(kernels, Mapping):
            raise ArgumentError(f"{name}: is a mapping, the kernels are not; give a list")
        missing = [key for key in keys if key not in value]
        if missing:
            raise ArgumentError(f"{name}: has no entry for {_name(missing[0])}")
        return [value[key] for key in keys]
    if isinstance(value, list):
        if len(value) != len(keys):
            raise ArgumentError(
                f"{name}: a list holds one value per kernel: expected {len(keys)}, got "
                f"{len(value)} (a tuple holds one per axis)"
            )
        return value
    return [value] * len(keys)


def _starts(
    start: object, kernels: object, keys: list[Any], convolutions: list[ConvOperator]
) -> list[Start]:
    """What an earlier result knows; nothing where a kernel was not part of it."""
    if start is None:
        return [Start(None, None)] * len(keys)
    if not isinstance(start, ConvNorms):
        raise ArgumentError(
            f"start: expected the ConvNorms of an earlier call, got {type(start).__name__}"
        )
    if isinstance(start.maximum, dict) != isinstance(kernels, Mapping):
        raise ArgumentError("start: keyed otherwise than the kernels (a list and a mapping)")
    if not isinstance(start.maximum, dict) and len(start.maximum) != len(keys):
        raise ArgumentError(f"start: holds {len(start.maximum)} kernels, {len(keys)} were given")
    found = []
    for key, conv in zip(keys, convolutions, strict=True):
        if isinstance(start.maximum, dict) and key not in start.maximum:
            found.append(Start(None, None))
            continue
        out, inputs = conv.channels
        shape = (out, *conv.output_size) if conv.transposed else (inputs, *conv.input_size)
        maximum, right = start.maximum[key], start.right[key]
        expected = conv.taps_shape()
        if tuple(right.shape) != shape or maximum.numel() != _HEADER + 2 * expected[-2]:
            raise ArgumentError(
                f"start: {_name(key)} had another shape: its right vector is "
                f"{tuple(right.shape)}, expected {shape}"
            )
        source = start.left[key] if conv.transposed else right
        known = source if bool(source.any()) else None
        reference = None if start.reference is None else start.reference[key]
        found.append(Start(maximum, known, reference))
    return found


def upper_bounds(
    convolutions: list[ConvOperator], begin: list[Start], budget: Budget
) -> list[_Upper]:
    """The symbols' brackets: kernels of several taps in one native call, the others as matrices."""
    taps = [conv.taps() for conv in convolutions]
    single = [tensor.shape[1:4].numel() == 1 for tensor in taps]
    found: list[_Upper | None] = _near_references(convolutions, taps, begin, budget)
    several = [i for i, alone in enumerate(single) if not alone and found[i] is None]
    for i, upper in zip(
        several,
        _symbol_bounds(
            [convolutions[i] for i in several],
            [taps[i] for i in several],
            [begin[i].maximum for i in several],
            budget,
        ),
        strict=True,
    ):
        upper.reference = SymbolProof(_copied(taps[i], convolutions[i].weight), upper.upper)
        found[i] = upper
    matrices = [i for i, alone in enumerate(single) if alone]
    for i, upper in zip(
        matrices,
        _matrix_bounds([taps[i] for i in matrices], [convolutions[i] for i in matrices], budget),
        strict=True,
    ):
        found[i] = upper
    uppers = cast("list[_Upper]", found)
    for upper, conv in zip(uppers, convolutions, strict=True):
        upper.bound = _at_true_size(upper, conv, budget)
    return uppers


def _native(
    taps: list[Tensor], starts: list[Tensor | None], grid: list[int], budget: Budget
) -> list[tuple[Any, ...]]:
    """Per kernel: lower, upper, frequency, group, cells, method, left, right."""
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    *values, left, right = torch.ops.lipfast.conv_norms(
        taps,
        [empty if start is None else start for start in starts],
        grid,
        budget.rtol,
        budget.max_cells,
        budget.seed,
        budget.memory,
    )
    lower, upper, frequency, group, cells, codes = values
    lefts = left.split([2 * tensor.shape[4] for tensor in taps])
    rights = right.split([2 * tensor.shape[5] for tensor in taps])
    return list(
        zip(
            lower.tolist(),
            upper.tolist(),
            frequency.unbind(),
            group.tolist(),
            cells.tolist(),
            [_UPPER_METHODS[code] for code in codes.tolist()],
            lefts,
            rights,
            strict=True,
        )
    )


def _symbol_bounds(
    convolutions: list[ConvOperator],
    taps: list[Tensor],
    starts: list[Tensor | None],
    budget: Budget,
) -> list[_Upper]:
    if not taps:
        return []
    results = []
    for conv, tensor, values in zip(
        convolutions, taps, _native(taps, starts, [0] * 3 * len(taps), budget), strict=True
    ):
        lower, upper, frequency, group, cells, method, left, right = values
        header = torch.cat(
            [torch.tensor([float(group)], dtype=torch.float64, device="cpu"), frequency]
        )
        vector = _input_side(conv, tensor, left, right)
        results.append(
            _Upper(
                lower,
                upper,
                upper,
                cells,
                method,
                torch.cat([header, left]),
                group,
                _kernel_axes(conv, 2 * math.pi * frequency),
                vector,
                None,
            )
        )
    return results


def _copied(taps: Tensor, weight: Tensor) -> Tensor:
    """Taps that do not share memory with a parameter, which an optimizer may change.

    Inference tensors do not count their changes, so they are copied as well.
    """
    shared = taps.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return taps.clone() if shared or taps.is_inference() else taps


def _near_references(
    convolutions: list[ConvOperator], taps: list[Tensor], begin: list[Start], budget: Budget
) -> list[_Upper | None]:
    r"""Bounds by earlier kernels: $S(W') \le S(W) + S(W' - W)$; None where that is too loose.

    The difference's own bound may be loose: that of a matrix first, then a coarse search. The lower
    value is that at the earlier kernel's frequency.
    """
    found: list[_Upper | None] = [None] * len(taps)
    differences: dict[int, Tensor] = {}
    bounds: dict[int, float] = {}
    for i, (tensor, known) in enumerate(zip(taps, begin, strict=True)):
        proved = None if known.reference is None else known.reference.bound_of(tensor.shape)
        if proved is None:
            continue
        difference = tensor.double() - proved[0].double()
        # The root mean square over the frequencies: the supremum is above it.
        mean = float(difference.norm()) / math.sqrt(tensor.shape[0] * tensor.shape[4])
        if mean <= budget.rtol * proved[1]:
            differences[i], bounds[i] = difference, proved[1]
    near = dict(
        zip(
            differences,
            _symbol_bounds(
                [convolutions[i] for i in differences],
                [taps[i] for i in differences],
                [begin[i].maximum for i in differences],
                budget._replace(max_cells=0),
            ),
            strict=True,
        )
    )
    for bound_changes in (_matrix_changes, _symbol_changes):
        chosen = [i for i in differences if found[i] is None]
        changes = bound_changes([differences[i] for i in chosen], budget)
        for i, (change, cells) in zip(chosen, changes, strict=True):
            # The first factor covers the rounding of the difference, the second that of the sum.
            upper = (bounds[i] + change * (1 + 2.0**-30)) * (1 + 2.0**-50)
            if math.isfinite(upper) and upper - near[i].lower <= budget.rtol * upper:
                near[i].upper = near[i].bound = upper
                near[i].cells, near[i].method = cells, "difference"
                near[i].reference = begin[i].reference
                found[i] = near[i]
    return found


def _matrix_changes(differences: list[Tensor], budget: Budget) -> list[tuple[float, int]]:
    r"""$S(D) \le \sqrt T \|(D_1 \dots D_T)\|$: phases beside each other have norm $\sqrt T$."""
    if not differences:
        return []
    wide = [tensor.permute(0, 4, 1, 2, 3, 5).flatten(2) for tensor in differences]
    norms: SpectralNorms[Any] = spectral_norms(
        [matrix for tensor in wide for matrix in tensor],
        rtol=max(_LOOSE, budget.rtol),
        seed=budget.seed,
        memory=budget.memory,
    )
    largest = [float(part.max()) for part in norms.upper.split([len(tensor) for tensor in wide])]
    counts = [tensor[0, ..., 0, 0].numel() for tensor in differences]
    return [
        (value * math.sqrt(count) * (1 + 2.0**-50), 0)
        for value, count in zip(largest, counts, strict=True)
    ]


def _symbol_changes(differences: list[Tensor], budget: Budget) -> list[tuple[float, int]]:
    """The bound of the differences' symbols, to a factor of two, and the cells it took."""
    if not differences:
        return []
    count = len(differences)
    found = _native(differences, [None] * count, [0] * 3 * count, budget._replace(rtol=0.5))
    return [(values[1], values[4]) for values in found]


def _input_side(conv: ConvOperator, taps: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The symbol's right singular vector; the op saw the symbol, or its transpose."""
    out = conv.weight.shape[0] // conv.groups
    real, imaginary = (left if taps.shape[4] != out else right).chunk(2)
    if taps.shape[4] != out:
        return torch.complex(real, -imaginary)
    return torch.complex(real, imaginary)


def _kernel_axes(conv: ConvOperator, theta: Tensor) -> Tensor:
    """Angles per axis of the kernel; the op has axes with one tap last."""
    steps = [s // math.gcd(s, d) for s, d in zip(conv.stride, conv.dilation, strict=True)]
    single = [k <= step for k, step in zip(conv.kernel_size, steps, strict=True)]
    order = sorted(range(conv.axes), key=lambda axis: single[axis])
    angles = torch.zeros(conv.axes, dtype=torch.float64, device="cpu")
    for position, axis in enumerate(order):
        angles[axis] = theta[position]
    return angles


def _matrix_bounds(
    taps: list[Tensor], convolutions: list[ConvOperator], budget: Budget
) -> list[_Upper]:
    """One tap: the norm of a matrix, the largest of the groups'."""
    if not taps:
        return []
    matrices = [matrix for tensor in taps for matrix in tensor[:, 0, 0, 0]]
    norms: SpectralNorms[Any] = spectral_norms(
        matrices, rtol=budget.rtol, seed=budget.seed, memory=budget.memory
    )
    results, first = [], 0
    for tensor, conv in zip(taps, convolutions, strict=True):
        groups = tensor.shape[0]
        part = slice(first, first + groups)
        group = int(norms.lower[part].argmax())
        left, right = norms.left[first + group], norms.right[first + group]
        zero = torch.zeros_like
        vector = _input_side(
            conv, tensor, torch.cat([left, zero(left)]), torch.cat([right, zero(right)])
        )
        methods = {norms.method[i] for i in range(first, first + groups)}
        upper = float(norms.upper[part].max())
        results.append(
            _Upper(
                float(norms.lower[part].max()),
                upper,
                upper,
                0,
                "holder" if "holder" in methods else "matrix",
                torch.cat(
                    [torch.tensor([group, 0.0, 0.0, 0.0], device="cpu").double(), left, zero(left)]
                ),
                group,
                torch.zeros(conv.axes, dtype=torch.float64, device="cpu"),
                vector,
                None,
            )
        )
        first += groups
    return results


def _at_true_size(upper: _Upper, conv: ConvOperator, budget: Budget) -> float:
    """The supremum's bound times what padding may add, or a circulant's own norm."""
    factor, covered = conv.padding_factor()
    bound = upper.upper
    if factor > 1:
        bound = math.nextafter(bound * factor, math.inf)
        if covered:
            taps = conv.taps(strided=False)
            bound = min(bound, _native([taps], [None], [0, 0, 0], budget)[0][1])
    elif conv.mode == "circular" and set(conv.stride) == {1}:
        points = [
            size
            for size, k in sorted(
                zip(conv.input_size, conv.kernel_size, strict=True), key=lambda pair: pair[1] == 1
            )
        ]
        grid = [n if k > 1 else 0 for n, k in zip(points, sorted_taps(conv), strict=True)]
        if any(grid) and math.prod(n for n in grid if n) <= _GRID_POINTS:
            grid = [max(n, 1) for n in grid] + [1] * (3 - len(grid))
            bound = min(bound, _native([conv.taps()], [None], grid, budget)[0][1])
    return bound


def sorted_taps(conv: ConvOperator) -> list[int]:
    """Kernel sizes, ones last: the op's order of the axes."""
    return sorted(conv.kernel_size, key=lambda k: k == 1)


def lower_bound_from(
    conv: ConvOperator, upper: _Upper, begin: Start, budget: Budget
) -> tuple[float, Tensor, Tensor, int]:
    """Proved lower bound at the true size, its vector, its image's direction, and the passes."""
    _, channels = conv.channels
    generator = torch.Generator(device="cpu").manual_seed(budget.seed)
    noise = torch.randn(
        (channels, *conv.input_size), generator=generator, dtype=torch.float64, device="cpu"
    )
    noise /= noise.norm()
    if begin.right is not None:
        first, share = begin.right.double(), 1e-2
    else:
        first, share = plane_wave(conv, upper.vector, upper.theta, upper.group), 0.1
    size = float(first.norm())
    vector = first / size + share * noise if size > 0 else noise
    return lower_bound(
        conv,
        vector,
        tolerance=0.2 * budget.rtol,
        max_passes=budget.max_passes,
        memory=budget.memory,
    )


def _row(
    conv: ConvOperator, upper: _Upper, begin: Start, budget: Budget, certified: bool
) -> dict[str, Any]:
    """Every field of the result for one kernel."""
    lower, vector, image, passes = lower_bound_from(conv, upper, begin, budget)
    return {
        "lower": lower,
        "upper": upper.bound,
        "certified": certified,
        "supremum_lower": upper.lower,
        "supremum_upper": upper.upper,
        "right": image if conv.transposed else vector,
        "left": vector if conv.transposed else image,
        "passes": passes,
        "cells": upper.cells,
        "frequency": upper.theta,
        "method": upper.method,
        "maximum": upper.maximum,
        "reference": upper.reference,
    }


def _collect(rows: list[dict[str, Any]], keys: list[Any], *, keyed: bool) -> ConvNorms[Any]:
    types = {"certified": torch.bool, "passes": torch.int64, "cells": torch.int64}

    def column(name: str) -> Any:
        values: Any = [row[name] for row in rows]
        if isinstance(values[0], int | float):
            values = torch.tensor(values, dtype=types.get(name, torch.float64), device="cpu")
        return dict(zip(keys, values, strict=True)) if keyed else values

    names = [field.name for field in fields(ConvNorms) if field.name != "supremum"]
    supremum = Supremum(column("supremum_lower"), column("supremum_upper"))
    return ConvNorms(supremum=supremum, **{name: column(name) for name in names})


@torch.library.register_fake("lipfast::conv_norms")
def _conv_norms_fake(  # noqa: PLR0917 (the schema's order)
    taps: list[Tensor],
    start: list[Tensor],
    grid: list[int],
    rtol: float,
    max_cells: int,
    seed: int,
    memory: int,
) -> tuple[Tensor, ...]:
    count = len(taps)

    def vector(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return taps[0].new_empty(shape, dtype=dtype)

    return (
        vector((count,), torch.float64),
        vector((count,), torch.float64),
        vector((count, 3), torch.float64),
        vector((count,), torch.int64),
        vector((count,), torch.int64),
        vector((count,), torch.int64),
        vector((sum(2 * tensor.shape[4] for tensor in taps),), torch.float64),
        vector((sum(2 * tensor.shape[5] for tensor in taps),), torch.float64),
    )
