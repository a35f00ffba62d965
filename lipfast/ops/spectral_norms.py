"""Brackets of the norms of any number of matrices in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor

from lipfast._clock import running
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.norms import AnyNorm, check_norm
from lipfast.ops._arguments import (
    FLOATING,
    check_floating,
    check_integer,
    check_rtol,
    check_same_device,
    named_entries,
    native_dtype,
)
from lipfast.ops._keyed import UPPER_METHODS, Values, entry_name, keyed, keys_of, listing
from lipfast.ops._sum_norms import sum_norms, sums_on_device
from lipfast.ops.denormals import denormals_flushed
from lipfast.ops.gram_certificate import Brackets, tighten
from lipfast.ops.threads import native_op
from lipfast.ops.vectors import Vectors

DEFAULT_MEMORY = 2 << 30
_METHODS = ("lanczos", "power")


@dataclass(frozen=True, repr=False)
class SpectralNorms(Generic[Values]):
    """Brackets of the norms of N matrices; each field is keyed like the input.

    For a list (or one tensor), `lower`, `upper`, `certified` and `passes` are tensors of N values
    and `right`, `left`, `method` lists of N entries; for a mapping, dictionaries with its keys.

    Attributes:
        lower: float64. Never above the truth (proved, rounding included).
        upper: float64. Never below the truth where `certified`; `inf` where no bound was asked for.
        certified: whether `upper` is a proved bound (norm 1 and inf: not while denormals are
            rounded to zero, see `lipfast.ops.denormals`).
        right: float64 vectors of unit norm (cols): where `lower` is attained; for norm 1 and inf
            the vector whose image is the largest.
        left: float64 vectors of unit norm (rows): its image's direction.
        passes: products with the matrix (or its Gram matrix) that the estimate took.
        method: how `upper` was proved: "cholesky", "holder" (nothing tighter could be, usually for
            want of memory for the Gram matrix: loose), "sums" (norm 1 and inf) or "none".
    """

    lower: Values
    upper: Values
    certified: Values
    _right: Any
    _left: Any
    passes: Values
    method: Any
    # The numbers of `lower`, `upper`, `certified` and `passes`, where the host has waited for them.
    _known: Any = None

    @property
    def right(self) -> Any:
        """Unit vectors (cols) where `lower` is attained."""
        return self._right.cut() if isinstance(self._right, Vectors) else self._right

    @property
    def left(self) -> Any:
        """Unit vectors (rows): the directions of their images."""
        return self._left.cut() if isinstance(self._left, Vectors) else self._left

    def __repr__(self) -> str:
        keys = keys_of(self.lower)

        def line(key: Any) -> str:
            lower, upper = self.lower[key].item(), self.upper[key].item()  # type: ignore[index]
            mark = "certified" if self.certified[key] else "estimate "  # type: ignore[index]
            return f"[{lower:.9g}, {upper:.9g}]  {mark}  {self.method[key]}"

        return listing(
            f"SpectralNorms of {len(keys)} {'matrix' if len(keys) == 1 else 'matrices'}", keys, line
        )


def spectral_norms(
    tensors: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
    *,
    norm: AnyNorm = 2,
    rtol: float = 1e-6,
    certify: bool = True,
    method: str = "lanczos",
    start: Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor | None = None,
    seed: int = 0,
    max_passes: int = 300,
    memory: int = DEFAULT_MEMORY,
) -> SpectralNorms[Any]:
    r"""Lower and upper bounds of the operator norms $\|W_i\|_p$ of matrices of any shapes.

    For p = 2, the largest singular value. Lower: $\|W v\|_2 / \|v\|_2$ at the last Lanczos vector
    (with full reorthogonalisation), in float64 and less its own rounding. Upper: $\sqrt{t +
    \epsilon}$ for a shift t at which $t I - W W^T$ has a Cholesky factor and $\epsilon$ covers
    every rounding (Demmel 1989; Rump, BIT 46, 2006). For p = 1 and inf, the largest column and row
    sum of magnitudes, rounded outward. Matrices on a CUDA device stay there: the same bounds, from
    a factorisation by torch whose residual is computed anew (`docs/bounds.md`).

    Where grad mode is on and a matrix requires gradients, `lower` and `upper` carry the gradient of
    the norm: $u v^T$ for p = 2 (its only gradient where the largest singular value is simple, one
    of its subgradients elsewhere), the signs of the largest column or row for p = 1 and inf, zero
    for a zero matrix. Both sides carry the same one: that of the estimate, at the vectors u =
    `left` and v = `right`, which are as accurate as the square root of `rtol`; the widening that
    makes the bounds proved is not differentiated. It can be differentiated once, for p = 2: a
    second time is an error.

    Args:
        tensors: matrices (float16, bfloat16, float32, float64), as a list, a mapping, one matrix,
            or a 3-D tensor: a batch. Of a mapping, such as a module's state dict, the 2-D entries
            are the matrices; biases, counters and other entries of fewer dimensions are left out.
            Non-contiguous ones are copied.
        norm: 1, 2, `float("inf")` or "inf".
        rtol: bound on `(upper - lower) / upper`; with `certify=False` on the estimated error of the
            Lanczos value. Rounding limits what can be certified: about 2e-13 for a side of 64, 1e-9
            for 4096.
        certify: prove an upper bound. Without it `upper` is infinite: an estimate from below is
            never called an upper bound.
        method: "lanczos", or "power": `max_passes` power iterations, the published method.
        start: start vectors (cols values each), for instance `right` of an earlier call; keyed like
            `tensors`, None entries and missing keys are seeded. They change the number of passes
            and the last digits, never whether a bound is proved.
        seed: of the start vectors. Results depend on the seed and the matrix, not on the other
            matrices of the call nor on the number of threads.
        max_passes: limit on passes over each matrix.
        memory: bytes that one Gram matrix may take, and on CUDA a batch of matrices; beyond it the
            upper bound is Hoelder's $\sqrt{\|W\|_1 \|W\|_\infty}$ or Frobenius', proved but loose.

    Returns:
        A `SpectralNorms`, keyed like the input.

    Raises:
        ArgumentError: wrong type, dtype, shape or option; the message names the entry.
        NonFiniteError: an entry holds NaN or Inf.

    Example:
        >>> import torch, lipfast
        >>> matrices = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 8)]
        >>> norms = lipfast.spectral_norms(matrices)
        >>> norms
        SpectralNorms of 2 matrices
          0  [5.4649857, 5.46498844]  certified  cholesky
          1  [4, 4.000002]  certified  cholesky
        >>> bool(((norms.upper - norms.lower) <= 1e-6 * norms.upper).all())
        True

        A training step with the product of the layers' norms as a regulariser:

        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def penalty():
        ...     norms = lipfast.spectral_norms(dict(model.named_parameters()), certify=False)
        ...     return torch.stack(list(norms.lower.values())).prod()
        >>> before = penalty()
        >>> loss = model(torch.ones(4, 8)).square().mean() + 0.1 * before
        >>> loss.backward()
        >>> optimizer.step()
        >>> bool(penalty() < before)
        True
    """
    norm = check_norm(norm)
    if method not in _METHODS:
        raise ArgumentError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    check_rtol(rtol)
    check_integer("max_passes", max_passes, 1, 32)
    check_integer("seed", seed, 0)
    check_integer("memory", memory, 0)
    keys, matrices = _matrices(tensors)
    starts = _start_vectors(start, tensors, keys, matrices)
    if norm == 2:
        options = (float(rtol), int(max_passes), method == "power", int(seed), int(memory))
        found = _native_brackets(matrices, starts, certify, options)
        if certify and matrices[0].is_cuda:
            found, codes = tighten(
                matrices,
                found,
                lambda some, near: _native_brackets(some, near, True, options),
                rtol=float(rtol),
                memory=int(memory),
            )
        else:
            codes = found.codes.tolist()
        if min(codes) < 0:
            name = entry_name("matrix", keys[next(i for i, code in enumerate(codes) if code < 0)])
            raise NonFiniteError(f"{name}: holds NaN or Inf; its norm is not defined")
        how = [UPPER_METHODS[code] for code in codes]
    else:
        names = [entry_name("matrix", key) for key in keys]
        known: list[list[float]] | None = None
        device = matrices[0].device
        if device.type == "cpu":
            lower, upper, right, left = sum_norms(matrices, names, norm)
        else:
            lower, upper, right, left, known = sums_on_device(matrices, names, norm)
        passes = torch.ones(len(matrices), dtype=torch.int64, device=device)
        how = ["sums"] * len(matrices)
        # The native op sets the mode of its threads itself; a GPU keeps denormals of float64.
        flushed = device.type == "cpu" and denormals_flushed()
        certified = torch.full((len(matrices),), 0 if flushed else 1, device=device)
        found = Brackets(lower, upper, passes, certified, right, left, known)
    sides = (found.lower, found.upper, found.codes != 0)
    result: SpectralNorms[Any] = SpectralNorms(
        *sides, found.right, found.left, found.passes, how, found.known
    )
    if not isinstance(tensors, Mapping):
        return result
    values: tuple[Any, ...] = (*sides, result.right, result.left, found.passes, how)
    return SpectralNorms(*(keyed(value, keys) for value in values))


def _native_brackets(
    matrices: list[Tensor],
    starts: list[Tensor],
    certify: bool,
    options: tuple[float, int, bool, int, int],
) -> Brackets:
    """Call the native op; on CUDA its upper bounds are Hoelder's."""
    with running("spectral_norms"), native_op():
        flat = torch.ops.lipfast.spectral_norms(matrices, starts, certify, *options)
    lower, upper, passes, codes, right, left = flat
    return Brackets(
        lower,
        upper,
        passes,
        codes,
        Vectors(right, [matrix.shape[1] for matrix in matrices]),
        Vectors(left, [matrix.shape[0] for matrix in matrices]),
    )


def right_vectors(matrices: Tensor) -> Tensor:
    """Unit vectors (N, D) that finite matrices (N, K, D) stretch most, without a certificate.

    In one call that does not wait for the device; of a zero matrix any.
    """
    options = (1e-6, 300, False, 0, DEFAULT_MEMORY)
    found = _native_brackets(list(matrices.contiguous().unbind()), [], False, options)
    assert isinstance(found.right, Vectors)
    return found.right.joined.reshape(matrices.shape[0], matrices.shape[2])


def _matrices(tensors: object) -> tuple[list[Any], list[Tensor]]:
    """Keys and contiguous float32 or float64 matrices."""
    if isinstance(tensors, Tensor):
        if tensors.dim() not in (2, 3):
            raise ArgumentError(
                f"expected a matrix or a batch of them, got shape {tuple(tensors.shape)}"
            )
        tensors = list(tensors) if tensors.dim() == 3 else [tensors]
    keys, values = named_entries(tensors, "matrices", _is_no_matrix, 2)
    matrices = []
    device: torch.device | None = None  # of the matrices, once one of them passed its checks
    on_cpu = isinstance(values[0], Tensor) and values[0].is_cpu
    for key, value in zip(keys, values, strict=True):
        if (on_cpu or device is not None) and _is_ready(value, device):
            matrices.append(value)
            continue
        name = entry_name("matrix", key)
        matrix = check_floating(value, name, 2)
        if matrix.numel() == 0:
            raise ArgumentError(f"{name}: is empty, shape {tuple(matrix.shape)}")
        check_same_device(matrix, values[0], name)
        matrices.append(native_dtype(matrix))
        device = None if on_cpu else matrix.device
    return keys, matrices


def _is_ready(value: object, device: torch.device | None) -> bool:
    """Whether a value passes every check as it is: the usual case, in a tenth of the time.

    Args:
        value: may be anything.
        device: of the others; None for the CPU.
    """
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.float32
        and value.layout is torch.strided
        and value.dim() == 2
        and (value.is_cpu if device is None else value.device == device)
        and value.is_contiguous()
        and value.numel() > 0
    )


def _is_no_matrix(key: object, value: object) -> bool:
    """Whether an entry of a mapping is no matrix: a bias, a running mean, a counter."""
    if not isinstance(value, Tensor) or value.dim() == 2:
        return False
    if value.dim() > 2 and value.dtype in FLOATING:
        raise ArgumentError(
            f"{entry_name('matrix', key)}: has shape {tuple(value.shape)}. The norm of a "
            "convolution is not that of its kernel reshaped to a matrix, and is not computed here. "
            "For the matrices only, pass {name: value for name, value in state_dict.items() if "
            "value.dim() == 2}; a stack of matrices is a batch when it is passed alone"
        )
    return True


def _start_vectors(
    start: object, tensors: object, keys: list[Any], matrices: list[Tensor]
) -> list[Tensor]:
    if start is None:
        return []
    given = _given_vectors(start, tensors, keys)
    if len(given) != len(matrices):
        raise ArgumentError(f"start: {len(given)} vectors for {len(matrices)} matrices")
    vectors = []
    for key, vector, matrix in zip(keys, given, matrices, strict=True):
        if vector is None:
            vectors.append(matrix.new_empty(0, dtype=torch.float64))
            continue
        name = f"start vector of {entry_name('matrix', key)}"
        checked = check_floating(vector, name, 1)
        check_same_device(checked, matrix, name)
        if checked.shape[0] != matrix.shape[1]:
            raise ArgumentError(
                f"{name}: expected {matrix.shape[1]} values, got {checked.shape[0]}"
            )
        vectors.append(checked.detach().double().contiguous())
    if not bool(torch.isfinite(torch.cat(vectors)).all()):  # one look at all of them
        wrong = next(i for i, own in enumerate(vectors) if not bool(torch.isfinite(own).all()))
        entry = entry_name("matrix", keys[wrong])
        raise NonFiniteError(f"start vector of {entry}: holds NaN or Inf")
    return vectors


def _given_vectors(start: object, tensors: object, keys: list[Any]) -> list[Any]:
    """Start vectors in the order of the matrices, None where there is none."""
    if isinstance(tensors, Mapping):
        if not isinstance(start, Mapping):
            raise ArgumentError(
                f"start: expected a mapping with the keys of the matrices, got "
                f"{type(start).__name__}"
            )
        unknown = [key for key in start if key not in tensors]
        if unknown:
            raise ArgumentError(f"start: there is no {entry_name('matrix', unknown[0])}")
        return [start.get(key) for key in keys]
    if isinstance(start, Tensor):
        alone = isinstance(tensors, Tensor) and tensors.dim() == 2 and start.dim() == 1
        return [start] if alone or start.dim() == 0 else list(start)
    if isinstance(start, Sequence) and not isinstance(start, str):
        return list(start)
    raise ArgumentError(
        f"start: expected a list with one vector (or None) per matrix, got {type(start).__name__}"
    )


@torch.library.register_fake("lipfast::spectral_norms")
def _spectral_norms_fake(matrices: list[Tensor], *_: object) -> tuple[Tensor, ...]:
    count = len(matrices)
    real = partial(matrices[0].new_empty, dtype=torch.float64)
    whole = partial(matrices[0].new_empty, dtype=torch.int64)
    right, left = (real(sum(matrix.shape[side] for matrix in matrices)) for side in (1, 0))
    return real(count), real(count), whole(count), whole(count), right, left


def _save_vectors(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    matrices, start, certify = inputs[:3]
    lower, upper, passes, upper_method, right, left = output
    # Without a certificate `upper` is infinite whatever the matrix.
    constant = [passes, upper_method, right, left] + ([] if certify else [upper])
    ctx.mark_non_differentiable(*constant)
    ctx.save_for_backward(lower, right, left)
    ctx.dtypes = [matrix.dtype for matrix in matrices]
    ctx.columns = [matrix.shape[1] for matrix in matrices]
    ctx.rows = [matrix.shape[0] for matrix in matrices]
    ctx.starts = len(start)


def _rank_one_gradients(ctx: Any, lower: Tensor, upper: Tensor, *_: Any) -> tuple[Any, ...]:
    """Gradient u v^T of each norm, times what comes from `lower` and `upper`; 0 for W = 0."""
    value, right, left = ctx.saved_tensors
    incoming = torch.where(value > 0, lower + upper, 0.0)
    if torch.is_grad_enabled() and incoming.requires_grad:
        # u and v are constants here, so a second derivative would be wrong without a word.
        incoming = _Once.apply(incoming)  # type: ignore[no-untyped-call]
    pieces = zip(
        incoming.unbind(), left.split(ctx.rows), right.split(ctx.columns), ctx.dtypes, strict=True
    )
    gradients = [
        torch.outer((factor * u).to(dtype), v.to(dtype)) if needed else None
        for needed, (factor, u, v, dtype) in zip(ctx.needs_input_grad[0], pieces, strict=True)
    ]
    return (gradients, [None] * ctx.starts, *[None] * 6)


class _Once(torch.autograd.Function):
    """The identity; differentiating it is an error."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("spectral_norms: the gradient of norm=2 cannot be differentiated again")


torch.library.register_autograd(
    "lipfast::spectral_norms", _rank_one_gradients, setup_context=_save_vectors
)
