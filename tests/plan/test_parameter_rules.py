"""Every rule of computed weights, with each of its options, against torch's own evaluation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lipfast.errors import NonFiniteError, TraceError
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Constant, Node, Reference, error_name
from lipfast.plan.computed import evaluate_computed, exact_value, refusal
from lipfast.plan.parameter_rules import PARAMETER_RULES

_GENERATOR = torch.Generator().manual_seed(5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR, dtype=torch.float64)


A, B, C = normal(3, 3), normal(3, 3), normal(4, 3)
V, W = normal(3), normal(3)
P = A.abs() + 0.5
BATCH = normal(2, 3, 3)
M = A + 4 * torch.eye(3, dtype=torch.float64)
K, L = normal(2, 3, 2), normal(3, 1, 3)
HALF, BATCHED_HALF = normal(3, 2), normal(4, 2, 1)

# op -> calls: positional arguments, then keywords.
CASES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "add": [((A, B), {}), ((A, B), {"alpha": 2.5}), ((A, 3.7), {}), ((V, A), {"alpha": -1})],
    "sub": [((A, B), {}), ((A, B), {"alpha": 2.5}), ((A, 3.7), {})],
    "rsub": [((A, B), {}), ((A, B), {"alpha": 2.5}), ((A, 1), {}), ((A, 1.5, 3), {})],
    "mul": [((A, B), {}), ((A, 0.3), {}), ((A, V), {})],
    "div": [((A, P), {}), ((A, 0.3), {}), ((A, 4.0), {})],
    "remainder": [((A, 0.3), {}), ((A, -0.3), {}), ((A, P), {}), ((-1e-3 * P, 0.3), {})],
    "reciprocal": [((P,), {})],
    "neg": [((A,), {})],
    "abs": [((A,), {})],
    "relu": [((A,), {})],
    "maximum": [((A, B), {})],
    "minimum": [((A, B), {})],
    "clamp": [
        ((A, 0.1, 0.5), {}),
        ((A, None, 0.2), {}),
        ((A, 0.2), {}),
        ((A, 0.5, 0.1), {}),
        ((A, B), {}),
        ((A, None, B), {}),
        ((A,), {"max": 0.2}),
        ((A,), {"min": B, "max": V}),
    ],
    "clamp_min": [((A, 0.1), {}), ((A, B), {})],
    "clamp_max": [((A, 0.1), {}), ((A, B), {})],
    "amax": [((A,), {}), ((A, (0,)), {}), ((BATCH, (0, -1), True), {})],
    "amin": [((A,), {}), ((A, (0,)), {}), ((BATCH, (0, -1), True), {})],
    "square": [((A,), {})],
    "sqrt": [((P,), {})],
    "rsqrt": [((P,), {})],
    "exp": [((A,), {})],
    "log": [((P,), {})],
    "log1p": [((P,), {})],
    "expm1": [((A,), {}), ((1e-3 * A,), {})],
    "erf": [((A,), {})],
    "atan": [((A,), {})],
    "softmax": [((A, 1), {}), ((30 * BATCH, -1), {})],
    "max": [((A,), {}), ((A, B), {}), ((A, 0), {}), ((A, 1, True), {})],
    "min": [((A,), {}), ((A, B), {}), ((A, 0), {}), ((A, 1, True), {})],
    "var": [
        ((A, (0,)), {}),
        ((A, False), {}),
        ((A, (0,), False), {}),
        ((BATCH, (0, -1), True, True), {}),
        ((A, (1,)), {"correction": 0, "keepdim": True}),
    ],
    "std": [
        ((A, (0,)), {}),
        ((A, False), {}),
        ((A, (0,), False), {}),
        ((BATCH, (0, -1), True, True), {}),
        ((A, (1,)), {"correction": 0, "keepdim": True}),
    ],
    "tanh": [((A,), {})],
    "sigmoid": [((A,), {})],
    "sin": [((A,), {})],
    "cos": [((A,), {})],
    "softplus": [((A,), {}), ((A, 3.0), {}), ((A, 2.0, 0.3), {}), ((30 * A, 1.0, 20.0), {})],
    "sum": [((A,), {}), ((A, (0,)), {}), ((A, 1, True), {}), ((BATCH, (0, 2)), {}), ((A, ()), {})],
    "mean": [((A,), {}), ((A, (0,)), {}), ((BATCH, (0, -1), True), {})],
    "cumsum": [((A, 0), {}), ((BATCH, -1), {})],
    "linalg_vector_norm": [
        ((A,), {}),
        ((A, 1), {}),
        ((A, math.inf), {}),
        ((A, 2, (0,), True), {}),
        ((A, 1, (1,)), {}),
        ((A, math.inf, (-1,), True), {}),
        ((1e100 * A,), {}),
    ],
    "norm": [((A,), {}), ((A, 1), {}), ((A, 2, (0,), True), {}), ((A, None, (1,)), {})],
    "_weight_norm": [((A, P[:, :1], 0), {}), ((A, P[:1], 1), {}), ((C, P[:1, :1], -1), {})],
    "matmul": [((A, B), {}), ((A, V), {}), ((V, A), {}), ((V, W), {}), ((BATCH, A), {})],
    "mm": [((A, B), {})],
    "bmm": [((BATCH, BATCH), {})],
    "mv": [((A, V), {})],
    "dot": [((V, W), {})],
    "vdot": [((V, W), {})],
    "inner": [((A, B), {}), ((V, W), {}), ((A, V), {}), ((C, A), {}), ((BATCH, A), {})],
    "outer": [((V, W), {})],
    "ger": [((V, W), {})],
    "linear": [((C, A), {}), ((C, A, V), {}), ((A, V), {}), ((C, A), {"bias": V})],
    "pow": [((A, n), {}) for n in (1, 2, 3, 8)]
    + [((P, n), {}) for n in (0.5, -1, -0.5)]
    + [((10000.0, A), {}), ((0.3, A), {})],
    "arange": [((5.5,), {}), ((0.5, 5.0), {}), ((0.1, 3.0, 0.3), {}), ((3.0, 0.1, -0.7), {})],
    "linspace": [((0.0, 1.0, 7), {}), ((-0.3, 2.1, 5), {}), ((0.3, 2.0, 1), {})],
    "matrix_exp": [((A,), {}), ((BATCH,), {})],
    "linalg_matrix_exp": [((A,), {})],
    "linalg_solve": [
        ((M, B), {}),
        ((M, B), {"left": False}),
        ((M, V), {}),
        ((M, C), {"left": False}),
        ((BATCH + 4 * torch.eye(3, dtype=torch.float64), BATCH), {}),
    ],
    "linalg_householder_product": [
        ((A, 0.3 * V), {}),
        ((HALF, 0.3 * V[:2]), {}),
        ((BATCHED_HALF, 0.3 * normal(4, 1)), {}),
    ],
}
# What takes no dtype: `_Case` gives the others float64, as the model's own would be.
FACTORIES = ("arange", "linspace")
CALLS = [(op, index) for op, calls in CASES.items() for index in range(len(calls))]
CONTINUOUS = [(op, index) for op, index in CALLS if op not in (*FACTORIES, "remainder")]


class Case:
    """One call: its node, and its tensors under the names that the node refers to."""

    def __init__(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        positional = tuple(self._argument(entry) for entry in args)
        named = {key: self._argument(entry) for key, entry in kwargs.items()}
        if op in FACTORIES:
            named["dtype"] = Reference("dtype", "float64")
        self.node = Node("y", f"aten.{op}", positional, tuple(sorted(named.items())))

    def _argument(self, entry: Any) -> Argument:
        if not isinstance(entry, Tensor):
            return entry  # type: ignore[no-any-return]
        name = f"p{len(self.tensors)}"
        self.tensors[name] = entry
        return Reference("parameter", name)

    def enclosure(self, errors: float = 0.0) -> tuple[Tensor, Tensor]:
        given = {error_name(k): errors * v.abs() for k, v in self.tensors.items() if errors}
        found = evaluate_computed([self.node], {**self.tensors, **given}, {})
        value = found["computed:y"]
        return value, found.get(error_name("computed:y"), torch.zeros_like(value))

    def torch(self, tensors: dict[str, Tensor]) -> Tensor:
        return call_op(self.node, lambda ref: tensors[ref.name], 0)

    def neighbours(self, errors: float) -> Iterator[dict[str, Tensor]]:
        for _ in range(6):
            yield {
                name: value + errors * value.abs() * torch.randn_like(value).sign() * 0.999
                for name, value in self.tensors.items()
            }
            yield {
                name: value + errors * value.abs() * (2 * torch.rand_like(value) - 1) * 0.999
                for name, value in self.tensors.items()
            }


@pytest.mark.parametrize(("op", "index"), CALLS)
def test_the_interval_holds_what_torch_evaluates(op: str, index: int) -> None:
    """Both results are rounded, so they are within two bounds of each other."""
    case = Case(op, *CASES[op][index])
    value, error = case.enclosure()
    expected = case.torch(case.tensors)
    assert value.shape == expected.shape == error.shape
    assert bool(((value - expected).abs() <= 2 * error).all())
    assert float(error.max()) <= 1e-10 * (1 + float(value.abs().max()))


@pytest.mark.parametrize(("op", "index"), CONTINUOUS)
@pytest.mark.parametrize("errors", [1e-9, 1e-4])
def test_the_interval_holds_the_results_of_all_operands_within_their_errors(
    op: str, index: int, errors: float
) -> None:
    torch.manual_seed(index)
    case = Case(op, *CASES[op][index])
    value, error = case.enclosure(errors)
    for tensors in case.neighbours(errors):
        off = (value - case.torch(tensors)).abs()
        assert bool((off <= error * (1 + 1e-9) + 1e-14 * value.abs()).all())


def options_of(op: str) -> set[str]:
    """Names of the arguments of all overloads, without those that say where a tensor lies."""
    packet = getattr(torch.ops.aten, op)
    schemas = [getattr(packet, name)._schema for name in packet.overloads()]
    schemas = [s for s in schemas if not any(a.is_out for a in s.arguments)]
    elsewhere = ("dtype", "layout", "device", "pin_memory")
    return {argument.name for s in schemas for argument in s.arguments} - set(elsewhere)


def _gives(
    call: tuple[tuple[Any, ...], dict[str, Any]], position: int, parameter: inspect.Parameter
) -> bool:
    """Whether a call has another value than the default."""
    args, kwargs = call
    value = kwargs.get(parameter.name, args[position] if len(args) > position else None)
    return isinstance(value, Tensor) or value not in (None, parameter.default)


@pytest.mark.parametrize("op", [name for name in PARAMETER_RULES if name.startswith("aten.")])
def test_every_option_is_tried_above_or_refused(op: str) -> None:
    name = op.removeprefix("aten.")
    parameters = list(inspect.signature(PARAMETER_RULES[op].evaluate).parameters.values())
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    optional = [p for p in parameters if p.default is not inspect.Parameter.empty]
    for position, parameter in enumerate(parameters):
        if parameter in optional:
            assert any(_gives(call, position, parameter) for call in CASES[name]), parameter.name
    tensors = tuple(Reference("parameter", f"p{i}") for i in range(len(required)))
    for option in options_of(name) - {p.name for p in parameters}:
        assert refusal(Node("y", op, tensors, ((option, 1.5),))) is not None
    assert refusal(Node("y", op, (*tensors, *[1.5] * (1 + len(optional))))) is not None


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("aten.div", 2, {"rounding_mode": "floor"}),
        ("aten.linalg_vector_norm", 1, {"ord": 3}),
        ("aten.norm", 1, {"p": 0}),
        ("aten.pow", 1, {"exponent": 2.5}),
        ("aten.pow", 2, {}),
        ("aten.index_put", 3, {"accumulate": True}),
        ("aten.linalg_solve", 2, {"unheard_of": True}),
    ],
)
def test_options_beyond_a_rule_are_refused(op: str, args: int, kwargs: dict[str, Any]) -> None:
    tensors = tuple(Reference("parameter", f"p{i}") for i in range(args))
    assert refusal(Node("y", op, tensors, tuple(kwargs.items()))) is not None


def test_integers_are_what_torch_makes_of_them() -> None:
    index = torch.tensor([0, 2, 5])
    for op, args in {
        "aten.add": (1,),
        "aten.mul": (2,),
        "aten.remainder": (2,),
        "aten.floor_divide": (2,),
        "aten.neg": (),
        "aten.clamp": (1, 4),
        "aten.sum": (),
    }.items():
        node = Node("y", op, (Reference("parameter", "i"), *args))
        found = evaluate_computed([node], {"i": index}, {})["computed:y"]
        expected = call_op(node, lambda _: index, 0)
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)


def test_what_jumps_is_refused_where_it_may() -> None:
    w = Reference("parameter", "w")
    with pytest.raises(TraceError, match="floor_divide"):
        evaluate_computed([Node("y", "aten.floor_divide", (w, 0.3))], {"w": A}, {})
    root = Node("x", "aten.sqrt", (w,))
    for op in ("aten.remainder", "aten.sign", "aten.gt"):
        jump = Node("y", op, (Reference("node", "x"), *([] if op == "aten.sign" else [0.3])))
        with pytest.raises((TraceError, NonFiniteError), match=op):
            evaluate_computed([root, jump], {"w": P}, {})


def test_a_remainder_is_within_its_bound_in_rational_arithmetic() -> None:
    """fmod(v, c) + c is rounded where v is negative: at most by its bound."""
    for size in (1e-3, 0.1, 1.0, 30.0):
        case = Case("remainder", (-size * P, 0.3), {})
        value, error = case.enclosure()
        entries = torch.stack([-size * P, value, error]).flatten(1).T.tolist()
        for v, found, room in entries:
            truth = Fraction(v) % Fraction(0.3)
            assert abs(truth - Fraction(found)) <= Fraction(room)


def test_what_is_exact_is_said_to_be_exact() -> None:
    """A mask of -inf, halves and whole quotients carry no error; thirds do."""
    ones = torch.ones(3, 3, dtype=torch.float64)
    mask = (ones.triu(1), -math.inf)
    table = {"m": mask[0].masked_fill(mask[0] == 0, 1.0), "i": torch.arange(4.0)}
    constants = {name: Constant.from_tensor(value) for name, value in table.items()}
    m, i = Reference("constant", "m"), Reference("constant", "i")
    for exact in (
        Node("y", "aten.mul", (m, -math.inf)),
        Node("y", "aten.mul", (i, 0.5)),
        Node("y", "aten.div", (i, 2)),
        Node("y", "aten.rsub", (i, 1.0)),
        Node("y", "aten.sum", (i,)),
        Node("y", "aten.arange", (5,), (("dtype", Reference("dtype", "float32")),)),
    ):
        assert exact_value(exact, constants) is not None
    for inexact in (
        Node("y", "aten.div", (i, 3)),
        Node("y", "aten.sqrt", (i,)),
        Node("y", "aten.mul", (i, 0.1)),
        Node("y", "aten.linspace", (0, 1, 4)),
        Node("y", "aten.lgamma", (i,)),
    ):
        assert exact_value(inexact, constants) is None
