"""Products with the Jacobians of a block of samples, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, LipfastError
from lipfast.estimators.jacobian.function import Function, SampleFunction
from lipfast.norms import Norm
from lipfast.ops.fetched import sent
from lipfast.ops.modes import forward_mode
from lipfast.plan.kept_values import strided_parts

# Up to here all min(K, D) rows or columns are formed; beyond, Lanczos needs fewer products.
_SMALL_SIDE = 64
# On a device a product more in a batch of them costs little, and each look at Lanczos a wait.
_SMALL_SIDE_ON_DEVICE = 128
# Relative difference of two products that should agree: far above rounding, far below an error.
ADJOINT_TOLERANCE = 0.01
# Products shorter than so many of the shortest normal numbers may have lost most of their digits.
_UNDERFLOW = 1e4


def is_small(outputs: int, inputs: int) -> bool:
    """Whether all rows of a K x D Jacobian, or all columns, are worth forming."""
    return min(outputs, inputs) <= _SMALL_SIDE


class DerivativeError(LipfastError, NotImplementedError):
    """The function has no derivative of the kind that a method needs."""


class Linearization:
    """``J(x_b) v`` and ``J(x_b)^T u`` for all samples of a block at once.

    A vector-Jacobian product is one backward pass. It is linear in u, so a Jacobian-vector product
    is a backward pass through it: both cost the same, and the forward pass is done once. Where an
    op has no second derivative, Jacobian-vector products use forward mode, which evaluates the
    function again each time.

    To be used inside `function.differentiating`.

    Args:
        function: (B, D...) -> (B, K).
        x: the samples of the block.
        checks: see `SampleFunction`.

    Attributes:
        outputs: K.
        inputs: D.
    """

    def __init__(self, function: Function, x: Tensor, checks: list[Tensor] | None = None) -> None:
        self._function = function
        self._checks = checks
        self._x = x.detach().clone().requires_grad_()
        self._output = function(self._x)
        self._pulled: tuple[Tensor, Tensor] | None = None
        self._forward_mode = False
        self._adjoint = False
        self.samples = x.shape[0]
        self.inputs = x[0].numel()
        self.outputs = self._output.shape[1]

    def vjp(self, u: Tensor) -> Tensor:
        """``J^T u``: (B, K) -> (B, D).

        Raises:
            DerivativeError: the model's own backward pass fails.
        """
        if not self._output.requires_grad:  # a constant function
            return u.new_zeros(self.samples, self.inputs)
        return _pulled(self._output, self._x, u).reshape(self.samples, -1)

    def jvp(self, v: Tensor) -> Tensor:
        """``J v``: (B, D) -> (B, K).

        Raises:
            DerivativeError: neither a second derivative nor forward mode is there.
        """
        if not self._output.requires_grad:
            return v.new_zeros(self.samples, self.outputs)
        v = v.reshape(self._x.shape)
        if not self._forward_mode:
            try:
                gradient, dual = self._transposed()
                (product,) = torch.autograd.grad(gradient, dual, v, retain_graph=True)
                return product
            except (RuntimeError, NotImplementedError):
                self._forward_mode, self._pulled = True, None
        try:
            # Without vmap, dual numbers and autograd do not mix: the graph is not needed here.
            with forward_mode(), torch.no_grad():
                tangent: Tensor = torch.func.jvp(self._function, (self._x.detach(),), (v,))[1]
            return tangent
        except (RuntimeError, NotImplementedError) as error:
            raise DerivativeError(
                "the model has neither second derivatives nor forward-mode derivatives "
                f"({str(error).splitlines()[0]}): use method='rows'"
            ) from error

    def _transposed(self) -> tuple[Tensor, Tensor]:
        """``J^T u`` as a graph in u, and u."""
        if self._pulled is None:
            dual = torch.zeros_like(self._output, requires_grad=True)
            (gradient,) = torch.autograd.grad(self._output, self._x, dual, create_graph=True)
            self._pulled = gradient, dual
        return self._pulled

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of every Jacobian: (B, stop - start, D)."""
        if not self._output.requires_grad:
            return self._x.new_zeros(self.samples, stop - start, self.inputs)
        units = _units(self._output, start, stop)
        return self._many(self._output, self._x, units)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of every Jacobian, as rows: (B, stop - start, K).

        Raises:
            DerivativeError: the model has no second derivative, or a wrong one.
        """
        if not self._output.requires_grad:
            return self._x.new_zeros(self.samples, stop - start, self.outputs)
        try:
            gradient, dual = self._transposed()
            flat = gradient.reshape(self.samples, -1)
            self._require_adjoint()
            return self._many(flat, dual, _units(flat, start, stop))
        except (RuntimeError, NotImplementedError) as error:
            raise DerivativeError(
                f"the model has no second derivative ({str(error).splitlines()[0]})"
            ) from error

    def _require_adjoint(self) -> None:
        """<u, J v> = <J^T u, v>, unless a custom backward pass hides its gradient from autograd."""
        if self._adjoint:
            return
        generator = torch.Generator(device="cpu").manual_seed(0)

        def draw(size: int) -> Tensor:
            vector = torch.randn(1, size, generator=generator, dtype=torch.float64, device="cpu")
            return sent(vector.to(self._x.dtype), self._x.device).expand(self.samples, -1)

        u, v = draw(self.outputs), draw(self.inputs)
        least = torch.finfo(v.dtype).tiny
        u, pushed, v, pulled = (t.double() for t in (u, self.jvp(v), v, self.vjp(u)))
        pushed_length, pulled_length = pushed.norm(dim=1), pulled.norm(dim=1)
        size = torch.maximum(u.norm(dim=1) * pushed_length, v.norm(dim=1) * pulled_length)
        wrong = ((u * pushed).sum(1) - (v * pulled).sum(1)).abs() > ADJOINT_TOLERANCE * size
        # Of what is nearly as short as the dtype's numbers can be, digits are lost on the way.
        lost = _UNDERFLOW * least * (u.norm(dim=1) + v.norm(dim=1))
        wrong = (wrong & (size > lost)).any()
        if self._checks is not None:
            self._checks.append(~wrong)
        elif bool(wrong):
            raise DerivativeError(
                "a custom backward pass has a wrong second derivative, or rounding leaves no "
                "digits of it"
            )
        self._adjoint = True

    def _many(self, output: Tensor, wanted: Tensor, cotangents: Tensor) -> Tensor:
        """One product per cotangent, all at once where `torch.vmap` can batch the backward pass."""
        try:
            (products,) = torch.autograd.grad(
                output, wanted, cotangents, is_grads_batched=True, retain_graph=True
            )
        except RuntimeError:
            products = torch.stack([_pulled(output, wanted, u) for u in cotangents])
        return products.detach().reshape(len(cotangents), self.samples, -1).transpose(0, 1)


def _pulled(output: Tensor, wanted: Tensor, cotangent: Tensor) -> Tensor:
    """One backward pass; what fails there is the model's."""
    try:
        (product,) = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
    except RuntimeError as error:
        if "allocate" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DerivativeError(
            f"the model's backward pass fails: {reason}. Checkpointing of activations must be off "
            "in eval mode, and outputs must depend on the inputs through autograd"
        ) from error
    return product


def _units(like: Tensor, start: int, stop: int) -> Tensor:
    """Unit vectors for every sample: (stop - start, B, n), a view."""
    unit = torch.zeros(stop - start, like.shape[1], dtype=like.dtype, device=like.device)
    unit[:, start:stop].diagonal().fill_(1)
    return unit.unsqueeze(1).expand(-1, like.shape[0], -1)


@dataclass(frozen=True)
class Footprint:
    """What a function needs per sample.

    Attributes:
        inputs: D.
        outputs: K.
        item: bytes per number.
        saved: bytes that the forward pass keeps for the backward pass.
        largest: bytes of the largest tensor among them, inputs and outputs included.
    """

    inputs: int
    outputs: int
    item: int
    saved: int
    largest: int


def require_constant(function: Function, x: Tensor, output: Tensor) -> None:
    """Check that a function of which autograd sees no derivative has none.

    Raises:
        ArgumentError: it has other values elsewhere, or none (an index outside of a table).
    """
    try:
        constant = torch.equal(output, function(2 * x + 1))
    except Exception:  # user code runs here: anything may come out
        constant = False
    if not constant:
        raise ArgumentError(
            "the model's outputs depend on its inputs, but not through autograd: is a result "
            "detached, cast to integers (token ids: give the model from the embeddings on), or "
            "computed under torch.no_grad or by another library?"
        )


def prefers_lanczos(size: Footprint, norm: Norm, method: str, device: torch.device) -> bool:
    """Whether norms are found by products with the Jacobian instead of its rows."""
    most = _SMALL_SIDE if device.type == "cpu" else _SMALL_SIDE_ON_DEVICE
    large = min(size.outputs, size.inputs) > most
    return norm == 2 and (method == "lanczos" or (method == "auto" and large))


def footprint(problem: SampleFunction) -> Footprint:
    """Evaluate two samples and count what is kept for the backward pass.

    Raises:
        ArgumentError: autograd does not see how the outputs depend on the inputs.
    """
    x = problem.x[:2].detach()
    sizes = _Saved(problem.constants)
    try:
        with torch.autograd.graph.saved_tensors_hooks(sizes.keep, lambda tensor: tensor):
            output = problem.function(x.clone().requires_grad_())
    except RuntimeError:
        # Inside torch.func.grad and its kin there are no hooks. What else fails does so again.
        output = problem.function(x.clone().requires_grad_())
        sizes.keep_graph(output)
    if not output.requires_grad:
        require_constant(problem.function, x, output)
    samples, item = x.shape[0], x.element_size()
    inputs, outputs = x[0].numel(), problem.outputs
    edges = (inputs + outputs) * item
    saved = list(sizes.of.values())
    largest = max([*saved, samples * max(inputs, outputs) * item]) // samples
    return Footprint(inputs, outputs, item, sum(saved) // samples + edges, largest)


class _Saved:
    """Bytes of what a graph saves, by where it lies.

    Attributes:
        of: bytes of each storage.
    """

    def __init__(self, constants: Iterable[Tensor]) -> None:
        self.of: dict[int, int] = {}
        self._held: set[int] = set()
        for value in constants:
            self.keep(value)
        self._held, self.of = set(self.of), {}

    def keep(self, tensor: Tensor) -> Tensor:
        """See a tensor, and return it."""
        for part in strided_parts(tensor):
            try:
                storage = part.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
            except (RuntimeError, NotImplementedError):  # inside torch.func: a wrapper without one
                place, size = id(part), part.numel() * part.element_size()
            if place not in self._held:
                self.of[place] = size
        return tensor

    def keep_graph(self, output: Tensor) -> None:
        """See what the nodes of a graph have saved."""
        pending, seen = [output.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            names = [name for name in dir(node) if name.startswith("_saved_")]
            for value in (getattr(node, name) for name in names):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(tensor, Tensor):
                        self.keep(tensor)
