"""Certified bounds of torchvision's families: the table in docs/architectures.md.

Run in an environment that holds torchvision (``make architectures`` makes one):

    python -m bench.architectures            # rewrites docs/architectures.md
    python -m bench.architectures resnet vit # prints the rows of some families

Weights are random, as the constructors leave them, except that an output layer of zeros gets
entries of standard deviation 0.02: with zeros every bound would be 0.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.domain import Domain
from lipfast.estimators.plan import Plan
from lipfast.estimators.results import UpperBound

SIZE = 224
RTOL = 1e-2
ARCHITECTURES_PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"


@dataclass(frozen=True)
class Family:
    """The smallest member of a family, and what is known of it.

    Attributes:
        model: name of the constructor in torchvision.models.
        finite: the bound is finite for all inputs.
        options: of the constructor.
    """

    model: str
    finite: bool = True
    options: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "resnet": Family("resnet18"),
    "vgg": Family("vgg11"),
    "densenet": Family("densenet121"),
    "mobilenet v2": Family("mobilenet_v2"),
    "mobilenet v3": Family("mobilenet_v3_small", finite=False),  # squeeze and excite
    "efficientnet": Family("efficientnet_b0", finite=False),
    "convnext": Family("convnext_tiny"),
    "vit": Family("vit_b_32"),
    "swin": Family("swin_t"),
    "googlenet": Family("googlenet", options=(("init_weights", False), ("aux_logits", False))),
    "squeezenet": Family("squeezenet1_1"),
    "shufflenet": Family("shufflenet_v2_x0_5"),
    "regnet": Family("regnet_y_400mf", finite=False),
    "mnasnet": Family("mnasnet0_5"),
}


def model_of(family: Family) -> nn.Module:
    """The model with seeded random weights, in eval mode."""
    import torchvision  # noqa: PLC0415 (optional: not among lipfast's dependencies)

    torch.manual_seed(0)
    make = getattr(torchvision.models, family.model)
    model: nn.Module = make(weights=None, **dict(family.options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and not bool(parameter.any()):
                parameter.normal_(std=0.02)
    return model


@dataclass(frozen=True)
class Result:
    """What is known of one family: its plan, bounds for all inputs and on [0, 1], and a quotient.

    Attributes:
        family: which.
        plan: the traced model.
        bound: for all inputs.
        boxed: for inputs with entries in [0, 1]; the same bound where that is finite.
        quotient: a difference quotient of two inputs in [0, 1], in float64.
        seconds: of tracing and of both bounds, without that quotient.
    """

    family: Family
    plan: Plan
    bound: UpperBound
    boxed: UpperBound
    quotient: float
    seconds: float


def bound_family(family: Family) -> Result:
    """Trace and bound one model."""
    model = model_of(family)
    state = model.state_dict()
    begin = time.perf_counter()
    plan = lipfast.compile(model, torch.zeros(2, 3, SIZE, SIZE))
    bound = plan.upper(state, rtol=RTOL)
    boxed = bound
    if math.isinf(bound.log_value):
        domain: Domain = lipfast.Box(0, 1)
        boxed = plan.upper(state, rtol=RTOL, domain=domain)
    seconds = time.perf_counter() - begin
    return Result(family, plan, bound, boxed, difference_quotient(model), seconds)


def difference_quotient(model: nn.Module) -> float:
    """``||f(a) - f(b)|| / ||a - b||`` for a random image and a step along a gradient, float64."""
    model = model.double()
    x = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()
    x = (0.25 + 0.5 * x).requires_grad_()
    output: Tensor = model(x)
    (gradient,) = torch.autograd.grad(output.flatten()[output.argmax()], x)
    with torch.no_grad():
        y = (x + 0.1 * gradient / gradient.abs().max()).clamp(0, 1)
        change = torch.linalg.vector_norm(model(y) - model(x))
        return float(change / torch.linalg.vector_norm(y - x))


def _power_of_ten(bound: UpperBound) -> str:
    return f"{bound.log_value / math.log(10):.1f}" if math.isfinite(bound.log_value) else "inf"


def row(name: str, result: Result) -> str:
    """One line of the table."""
    parameters = sum(math.prod(shape) for shape in result.plan.parameters.values())
    bound, boxed = result.bound, result.boxed
    reason = "" if math.isfinite(boxed.log_value) else (boxed.reason or "").split("; ")[0]
    if not reason and not math.isfinite(bound.log_value):
        reason = (bound.reason or "").split(": ")[0]
    known = "yes" if bound.certified and boxed.certified else "no"
    cells = [
        name,
        result.family.model,
        f"{parameters / 1e6:.1f}",
        str(len(result.plan.layers)),
        _power_of_ten(bound),
        _power_of_ten(boxed),
        known,
        f"{math.log10(result.quotient):.1f}",
        f"{result.seconds:.0f}",
        reason,
    ]
    return "| " + " | ".join(cells) + " |"


_HEAD = f"""# Bounds of architectures

Made by `make architectures` (`bench/architectures.py`): torchvision's families, their smallest
members, images of 3 x {SIZE} x {SIZE}, weights as the constructors draw them, every layer's bracket
at `rtol={RTOL:g}`. The bound is log10 of the certified Lipschitz constant in the norm 2, for all
inputs and for inputs with entries in [0, 1] (`domain=lipfast.Box(0, 1)`, asked for where the first
is infinite). The quotient is log10 of one difference quotient: the constant lies between. Seconds
are those of tracing and bounding, on two cores that other work shared.

"""
_COLUMNS = (
    "family",
    "model",
    "parameters (M)",
    "layers",
    "bound",
    "on [0, 1]",
    "certified",
    "quotient",
    "seconds",
    "why inf",
)

_TAIL = """
Products of many norms are large; what they are good for is to compare checkpoints of one
architecture. Squeeze-and-excite gates multiply two activations: without a bound on the inputs there
is no constant. LayerNorm bounds the rows that attention multiplies, so that ViT and Swin have one
for all inputs.
"""


def write_page(names: list[str]) -> None:
    """Print rows; without names, write the page."""
    chosen = {name: f for name, f in FAMILIES.items() if not names or name in names}
    rows = []
    for name, family in chosen.items():
        rows.append(row(name, bound_family(family)))
        print(rows[-1], flush=True)
    if not names:
        head = [f"| {' | '.join(_COLUMNS)} |", "| " + " | ".join(["---"] * len(_COLUMNS)) + " |"]
        ARCHITECTURES_PAGE.write_text(_HEAD + "\n".join([*head, *rows]) + "\n" + _TAIL)


if __name__ == "__main__":
    write_page(sys.argv[1:])
