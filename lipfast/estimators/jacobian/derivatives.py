"""Whether autograd's derivatives are those of the function, by difference quotients.

A ``torch.no_grad`` block, ``.detach()``, a straight-through estimator, gradient reversal or a hook
change what autograd says and leave the function as it is. Along random directions, where nothing is
orthogonal to what was blocked, a difference quotient tells the two apart; see docs/bounds.md.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import Function, SampleFunction
from lipfast.estimators.jacobian.precision import values_of
from lipfast.ops.restoring import Restoring
from lipfast.plan.gaps import Roundings

# Relative difference of a derivative and a quotient: some backward passes, of solvers for instance,
# are approximate on purpose.
_TOLERANCE = 2.0**-9
# Exponents of eps: how far from the sample derivatives are taken, so that no activation lies on its
# kink as those of a black image do; and the steps of quotients, each far below the one before.
MIDDLE = 0.38
_SHIFT, _STEPS = 0.19, (0.29, MIDDLE, 0.48)
# Units in the last place that a difference of outputs may be wrong by: of the outputs, and of the
# largest number on the way to them, which they may be small differences of.
_NOISE, _INNER_NOISE = 64, 4
# Quotients agree if they differ by less than this part of what the derivative differs from them.
_AGREE = 0.125
# Steps that look for another value of a function that is constant nearby, relative to the sample.
_ELSEWHERE = tuple(sign * 2.0**power for power in range(-6, 4) for sign in (1, -1))
_BISECTIONS = 50
# A jump is shown between points closer than this power of eps.
_RESOLVED = 0.58
# What is left of a change when the step is 2^-50 of what it was: nothing if there is no jump.
_JUMP = 1e-3


def derivative_fault(problem: SampleFunction, module: nn.Module) -> str | None:
    """What is wrong with autograd's derivatives of a model, None where nothing is known to be.

    Takes a backward pass and two evaluations; more only if something is wrong, or
    if the derivatives are 0.

    Args:
        problem: the model and some samples, which it treats apart; best in float64.
        module: the model itself.

    Raises:
        ArgumentError: the model is constant around the samples and jumps further away, or has
            other values without gradients.
    """
    name = type(module).__name__
    try:
        found = probe(problem.function, problem.x)
        agrees = found.agrees(found.quotients(MIDDLE))
        other = not agrees and found.differs_without_gradients()
        wrong = None if agrees or other else found.disagreement()
        jumps = wrong is None and not other and found.jumps()
        culprits = "" if wrong is None else _culprits(problem.function, module, found.x)
    except MemoryError:
        raise
    except Exception:  # user code, on points that nobody gave: nothing follows from an error
        return None
    if other:
        raise ArgumentError(
            f"{name} gives other outputs where no gradients are recorded (torch.no_grad): it asks "
            "torch.is_grad_enabled() or requires_grad, so it is two functions. Give one of them"
        )
    if jumps:
        raise ArgumentError(
            f"{name} jumps (rounding, a cast to integers, sign, argmax or a comparison?): it is "
            "constant around the samples and takes other values further away without any between, "
            "so that its derivative is 0 where it has one and its Lipschitz constant is infinite. "
            "Give the part of the model before the jump."
        )
    if wrong is None:
        return None
    return (
        f"autograd's derivative of {name} is not that of the function: along a random direction "
        f"it is {wrong[0]:.4g} where difference quotients are {wrong[1]:.4g}{culprits}. Something "
        "in forward is under torch.no_grad, detached (.detach(), .data, .item(), numpy), a "
        "straight-through estimator or gradient reversal (an autograd.Function whose backward is "
        "not its derivative), or changed by a hook"
    )


class Quotients(NamedTuple):
    """Difference quotients (B,) to both sides with one step, and what rounding may do to them."""

    forward: Tensor
    backward: Tensor
    noise: Tensor

    @property
    def central(self) -> Tensor:
        """With a step to both sides."""
        return (self.forward + self.backward) / 2


@dataclass(frozen=True)
class Probe:
    """A weighted sum of a function's outputs along a line, for each of some samples.

    Attributes:
        function: (B, D...) -> (B, K).
        x: points (B, D...) near the samples.
        directions: (B, D...), about as long as the samples.
        weights: (B, K).
        eps: of the shortest numbers that the function computes with.
        derivative: autograd's, of ``weights . function(x + t directions)`` at t = 0: (B,).
        values: of the function at x, (B, K).
    """

    function: Function
    x: Tensor
    directions: Tensor
    weights: Tensor
    eps: float
    derivative: Tensor
    values: Tensor

    def at(self, step: float, *, plain: bool = False) -> Tensor:
        """The function's values (B, K) on the line; `plain` without gradients, where it can."""
        points = self.x + step * self.directions
        if plain:
            # Inside a mode torch takes none of its short cuts, which differ where masks hide.
            # User code, which may need autograd: what else fails does so again.
            with suppress(Exception), torch.no_grad(), Roundings(points.dtype):
                return self.function(points)
        return values_of(self.function, points)

    def differs_without_gradients(self) -> bool:
        """Whether the function has other values where no gradients are recorded."""
        recorded, plain = self.at(0.0), self.at(0.0, plain=True)
        room = self.eps**0.5 * recorded.abs().amax(1, keepdim=True)
        return bool(((recorded - plain).abs() > room + self.inner_noise()).any())

    def quotients(self, exponent: float) -> Quotients:
        """Difference quotients of the weighted sums, with the step eps^exponent."""
        step = self.eps**exponent
        here, after, before = self.values, self.at(step), self.at(-step, plain=True)
        size = (self.weights * here).abs().double().sum(1)
        return Quotients(
            (self.weights * (after - here)).double().sum(1) / step,
            (self.weights * (here - before)).double().sum(1) / step,
            _NOISE * self.eps * size / step,
        )

    def room(self, quotients: Quotients) -> Tensor:
        """How far they may be from the derivative (B,), which may be inexact on purpose."""
        sizes = torch.maximum(self.derivative.abs(), quotients.central.abs())
        return _TOLERANCE * sizes[torch.isfinite(sizes)].max() + quotients.noise

    def agrees(self, quotients: Quotients) -> bool:
        """Whether nothing speaks against the derivative; what is not finite does not."""
        errors = (quotients.central - self.derivative).abs()
        finite = torch.isfinite(errors)
        return not bool(finite.any()) or bool((errors <= self.room(quotients))[finite].all())

    def disagreement(self) -> tuple[float, float] | None:
        """A derivative and the quotient that it differs from, if that is beyond doubt."""
        if self.agrees(self.quotients(MIDDLE)):
            return None
        inner = self.inner_noise() * self.weights.double().norm(dim=1)
        steps = [self.quotients(exponent) for exponent in _STEPS]
        found, errors = [], torch.stack([(q.central - self.derivative).abs() for q in steps])
        for exponent, rough, fine in zip(_STEPS[1:], steps, steps[1:], strict=False):
            wrong = (fine.central - self.derivative).abs()
            spread = torch.maximum(
                (rough.central - fine.central).abs(), (fine.forward - fine.central).abs()
            )
            beyond = self.room(fine) + inner / self.eps**exponent
            agree = spread <= _AGREE * torch.minimum(wrong, fine.central.abs() + fine.noise)
            found.append(agree & (wrong > beyond))
        sure = found[0] | found[1]
        if self.eps > torch.finfo(torch.float64).eps:  # a small step may be lost in rounding
            sure = found[0] & found[1] & (errors.amin(0) > _AGREE * errors[-1])
        if not bool(sure.any()):
            return None
        worst = int(torch.where(sure, errors[-1], -1.0).argmax())
        return float(self.derivative[worst]), float(steps[-1].central[worst])

    def inner_noise(self) -> float:
        """What rounding on the way to the outputs may do to one of them."""
        with Roundings(self.x.dtype, sizes=True) as inside:
            self.at(0.0)
        return float(_INNER_NOISE * self.eps * inside.largest)

    def jumps(self) -> bool:
        """Whether the function is constant here, and further away suddenly something else."""
        if self.eps > torch.finfo(torch.float32).eps or bool((self.derivative != 0).any()):
            return False
        if not torch.equal(self.at(self.eps ** _STEPS[-1]), self.values):
            return False
        far = next(
            (step for step in _ELSEWHERE if not torch.equal(self.at(step), self.values)), None
        )
        if far is None:
            return False
        # Between points, not steps: near 0 the numbers of a huge sample lie as close as any.
        near, beyond = self.x, self.x + far * self.directions
        changes = [float((self.at(far) - self.values).abs().max())]
        for _ in range(_BISECTIONS):
            middle = near + (beyond - near) / 2
            found = (values_of(self.function, middle) - self.values).abs().max()
            if bool(found != 0):
                beyond = middle
                changes.append(float(found))
            else:
                near = middle
        # Where numbers lie far apart a steep slope looks like a jump: nothing can be said of it.
        shown = float((beyond - near).abs().max()) < self.eps**_RESOLVED
        return shown and changes[-1] > _JUMP * changes[0] + self.inner_noise()


def probe(function: Function, samples: Tensor, eps: float | None = None) -> Probe:
    """Random points near the samples, directions and weights; the same ones every time."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    eps = eps or torch.finfo(samples.dtype).eps
    shift = eps**_SHIFT * random_directions(samples, generator).abs()
    points = samples + torch.where(samples < 0, -shift, shift)  # roots of numbers >= 0 stay roots
    leaf = points.clone().requires_grad_()
    with Roundings(samples.dtype) as roundings:
        values = function(leaf)
    if roundings.eps > eps:  # the model rounds to shorter numbers inside
        return probe(function, samples, roundings.eps)
    weights, directions = _drawn(values, generator), random_directions(samples, generator)
    gradient = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad((weights * values).sum(), leaf, allow_unused=True)
    gradient = torch.zeros_like(samples) if gradient is None else gradient
    derivative = (gradient * directions).reshape(len(gradient), -1).double().sum(1)
    return Probe(function, points, directions, weights, eps, derivative, values.detach())


def random_directions(samples: Tensor, generator: torch.Generator) -> Tensor:
    """Directions (B, D...) about as long as the samples, and in each entry about as large."""
    flat = samples.reshape(len(samples), -1)
    size = flat.norm(dim=1, keepdim=True) / flat.shape[1] ** 0.5
    size = torch.where(size > 0, size, 1)
    # Entry by entry: the inputs of a model may be of very different sizes.
    sizes = torch.maximum(flat.abs(), size / 64).reshape(samples.shape)
    return sizes * _drawn(samples, generator)


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(like)


def _culprits(function: Function, module: nn.Module, x: Tensor) -> str:
    """Submodules without gradients, and autograd functions of the user's: they are likely it."""
    names = {id(child): name for name, child in module.named_modules() if name}
    silent: dict[str, None] = {}

    def look(child: nn.Module, _: Any, output: Any) -> None:
        values = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]
        if id(child) in names and values and not any(value.requires_grad for value in values):
            silent[f"module '{names[id(child)]}' gives no gradient"] = None

    handles: list[RemovableHandle] = []

    def put_back() -> None:
        for handle in handles:
            handle.remove()

    undo = Restoring(put_back)
    with undo, undo, undo:
        handles.append(nn.modules.module.register_module_forward_hook(look))
        output = function(x.clone().requires_grad_())
    found, seen = list(silent), set()
    ahead: list[Any] = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.append(f"{type(node).__name__.removesuffix('Backward')} has its own backward")
    found = list(dict.fromkeys(found))
    return f" ({', '.join(found[:4])})" if found else ""
