"""Every rule of the registry against the op itself: none is left out.

Linear ops: the bound is not below the norms 1, 2 and inf of the explicit matrix. Others: no sampled
difference quotient is above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lipfast.estimators.domain import Box
from lipfast.estimators.plan import Plan
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Graph, Node, Reference
from lipfast.plan.interpret import evaluate
from lipfast.rules import RULES
from tests.support.explicit import NORMS, Function, traced

X = Reference("node", "x")
BOX = Box(-1.5, 1.5)


@dataclass(frozen=True)
class Case:
    """An op on samples of a shape; arguments may be X or names of parameters ("p:...")."""

    shape: tuple[int, ...]
    args: tuple[object, ...] = (X,)
    linear: bool = False
    on_a_box: bool = False
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)


def linear(shape: tuple[int, ...], *args: object, **parameters: tuple[int, ...]) -> Case:
    return Case(shape, (X, *args), linear=True, parameters=parameters)


def other(shape: tuple[int, ...], *args: object, **parameters: tuple[int, ...]) -> Case:
    return Case(shape, (X, *args), parameters=parameters)


ROW, IMAGE, LINE, BLOCK = (4,), (2, 5, 4), (2, 7), (2, 3, 4, 3)
W, B = "p:w", "p:b"
NORMALISED = {"w": (2,), "b": (2,), "mean": (2,), "var": (2,)}
STORED = (W, B, "p:mean", "p:var")
CASES: dict[str, Case] = {
    **{
        f"aten.{name}": other(ROW)
        for name in (
            *("abs", "atan", "celu", "clamp_min", "cos", "elu", "erf", "gelu", "hardshrink"),
            *("hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish", "neg"),
            *("relu", "relu6", "selu", "sigmoid", "silu", "sin", "softplus", "softshrink", "tanh"),
        )
    },
    "aten.clamp_min": other(ROW, 0.3),
    "aten.clamp_max": other(ROW, 0.3),
    "aten.clamp": other(ROW, -0.2, 0.4),
    "aten.threshold": other(ROW, 0.1, 5.0),
    "aten.rrelu": other(ROW, 0.2, 0.3, False),
    "aten.prelu": other(IMAGE, W, w=(2,)),
    "aten.pow": Case(ROW, (X, 3), on_a_box=True),
    "aten.mul": Case(ROW, (X, X), on_a_box=True),
    "aten.matmul": Case((3, 3), (X, X), on_a_box=True),
    "aten.bmm": Case((3, 3), (X, X), on_a_box=True),
    "aten.scaled_dot_product_attention": Case((3, 4), (X, X, X), on_a_box=True),
    "aten.softmax": other(ROW, 1),
    "aten.log_softmax": other(ROW, 1),
    "aten.logsumexp": other(ROW, (1,)),
    "aten.amax": other(LINE, (2,)),
    "aten.amin": other(LINE, (2,)),
    "aten.max": other(LINE, 2),
    "aten.min": other(LINE, 2),
    "aten.linalg_vector_norm": other(LINE, 2, (2,)),
    "aten.sort": other(LINE, 2),
    "aten.topk": other(LINE, 3, 2),
    "aten.glu": Case((4, 3), (X, 1), on_a_box=True),
    "aten.exp": Case(ROW, on_a_box=True),
    "aten.expm1": Case(ROW, on_a_box=True),
    "aten.square": Case(ROW, on_a_box=True),
    "aten.maximum": Case(IMAGE, (X, W), parameters={"w": (2, 5, 4)}),
    "aten.minimum": Case(IMAGE, (X, X)),
    "aten.layer_norm": other((3, 4), (4,), W, B, 0.1, w=(4,), b=(4,)),
    "aten.rms_norm": other((3, 4), (4,), W, 0.1, w=(4,)),
    "aten.group_norm": other((4, 3), 2, W, B, 0.1, w=(4,), b=(4,)),
    "aten.instance_norm": other(LINE, W, B, None, None, True, 0.1, 0.1, False, w=(2,), b=(2,)),
    "aten.max_pool1d": other(LINE, 3, 2, 1),
    "aten.max_pool2d": other(IMAGE, 3, 2, 1),
    "aten.max_pool2d_with_indices": other(IMAGE, 3, 1),
    "aten.max_pool3d": other(BLOCK, 2, 1),
    "aten.max_pool3d_with_indices": other(BLOCK, 2, 1),
    "aten.adaptive_max_pool1d": other(LINE, (3,)),
    "aten.adaptive_max_pool2d": other(IMAGE, (3, 3)),
    "aten.adaptive_max_pool3d": other(BLOCK, (2, 3, 2)),
    "aten.adaptive_avg_pool1d": linear(LINE, (3,)),
    "aten.adaptive_avg_pool2d": linear(IMAGE, (3, 3)),
    "aten.adaptive_avg_pool3d": linear(BLOCK, (2, 3, 2)),
    "aten.avg_pool1d": linear(LINE, (3,), (2,), (1,)),
    "aten.avg_pool2d": linear(IMAGE, (3, 2), (2, 1), (1, 0), True, False),
    "aten.avg_pool3d": linear(BLOCK, (2, 2, 2), (1, 2, 1)),
    "aten.batch_norm": linear(IMAGE, *STORED, False, 0.1, 1e-5, False, **NORMALISED),
    "aten.linear": linear((2, 4), W, B, w=(3, 4), b=(3,)),
    "lipfast.matmul": linear((2, 4), W, B, w=(4, 3), b=(3,)),
    "aten.conv1d": linear(LINE, W, B, w=(3, 2, 3), b=(3,)),
    "aten.conv2d": linear(IMAGE, W, None, (2, 1), (1, 0), w=(3, 2, 3, 2)),
    "aten.conv3d": linear(BLOCK, W, w=(1, 2, 2, 2, 2)),
    "aten.conv_transpose1d": linear(LINE, W, B, (2,), w=(2, 3, 3), b=(3,)),
    "aten.conv_transpose2d": linear(IMAGE, W, None, (2, 1), (1, 0), w=(2, 3, 3, 2)),
    "aten.conv_transpose3d": linear(BLOCK, W, w=(2, 1, 2, 2, 2)),
    "aten.convolution": linear(
        IMAGE, W, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, w=(3, 2, 3, 3)
    ),
    "aten.add": Case(IMAGE, (X, X), linear=True),
    "aten.sub": Case(IMAGE, (X, W), linear=True, parameters={"w": (2, 5, 4)}),
    "aten.rsub": linear(ROW, 1.5, -3.0),
    "aten.div": linear(ROW, -3.0),
    "aten.sum": linear(IMAGE, (2, 3)),
    "aten.mean": linear(IMAGE, (1, 3), True),
    "aten.cat": Case(LINE, ((X, X), 2), linear=True),
    "aten.stack": Case(LINE, ((X, X, X), 1), linear=True),
    "aten.permute": linear(IMAGE, (0, 3, 1, 2)),
    "aten.transpose": linear(IMAGE, 1, 3),
    "aten.flip": linear(IMAGE, (2, 3)),
    "aten.roll": linear(IMAGE, (1, 2), (2, 3)),
    "aten.pixel_shuffle": linear((4, 2, 3), 2),
    "aten.pixel_unshuffle": linear((1, 4, 6), 2),
    "aten.channel_shuffle": linear((4, 2, 2), 2),
    "aten.select": linear(IMAGE, 2, 1),
    "aten.slice": linear(IMAGE, 2, 1, 5, 2),
    "aten.flatten": linear(IMAGE, 1),
    "aten.view": linear(IMAGE, (Reference("batch"), 40)),
    "aten.reshape": linear(IMAGE, (Reference("batch"), 8, 5)),
    "aten._unsafe_view": linear(IMAGE, (Reference("batch"), 40)),
    "aten.unflatten": linear(LINE, 2, (7, 1)),
    "aten.squeeze": linear((2, 1, 3), 2),
    "aten.unsqueeze": linear(LINE, 1),
    "aten.expand": linear((1, 4), (-1, 3, -1)),
    "aten.repeat": linear(LINE, (1, 2, 3)),
    "aten.repeat_interleave": linear(LINE, 3, 2),
    "aten.index": linear(LINE, (None, None, "p:i"), i=()),
    "aten.index_select": linear(LINE, 2, "p:i", i=()),
    "aten.unfold": linear(LINE, 2, 3, 2),
    "aten.pad": linear(IMAGE, (1, 2, 0, 1), "reflect"),
    "aten.constant_pad_nd": linear(IMAGE, (1, 2, -1, 1), 0.0),
    "aten.im2col": linear(IMAGE, (2, 2), (1, 1), (1, 1), (1, 2)),
    "aten.upsample_nearest1d": linear(LINE, (9,), None),
    "aten.upsample_nearest2d": linear(IMAGE, (7, 9), None),
    "aten.upsample_nearest3d": linear(BLOCK, (4, 4, 6), None),
    "aten.upsample_linear1d": linear(LINE, (9,), False, None),
    "aten.upsample_bilinear2d": linear(IMAGE, (7, 3), True, None),
    "aten.upsample_bicubic2d": linear(IMAGE, (7, 9), False, None),
    "aten.upsample_trilinear3d": linear(BLOCK, (4, 4, 6), False, None),
    "lipfast.repeated": linear((2,), W, w=(1, 3)),
}


class Residual(torch.nn.Module):
    """``x - W^T relu(W x)``, W a vector of norm 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((1, 4), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.relu(x @ self.w.T) @ self.w


# These stand for several ops: modules (or functions) whose graphs hold them.
MODULES = {
    "lipfast.residual": (Residual(), ROW),
    "lipfast.softsign": (torch.nn.functional.softsign, ROW),
    "aten.where": (lambda x: torch.where(torch.arange(4) > 1, x, -2 * x), (3, 4)),
    "aten.masked_fill": (lambda x: x.masked_fill(torch.arange(4) > 1, -0.7), (3, 4)),
    "lipfast.weighted_rows": (lambda x: (3 * x @ x.mT).softmax(-1) @ x, (3, 4)),
    "lipfast.composition": (lambda x: x * x.sigmoid(), ROW),
    "lipfast.parts": (lambda x: torch.cat([2 * x[:, :1], x[:, 2:]], 1), ROW),
    # Alone these have no bound; see `lipfast.rules.steep`.
    "aten.log": (lambda x: torch.log(1 + x * x), ROW),
    "aten.log1p": (lambda x: torch.log1p(x * x), ROW),
    "aten.sqrt": (lambda x: torch.sqrt(1 + x * x), ROW),
    "aten.rsqrt": (lambda x: torch.rsqrt(1 + x * x), ROW),
    "aten.reciprocal": (lambda x: 1 / (1 + x * x), ROW),
}
# Rules of doctests and of other tests, which share the registry.
_ELSEWHERE = ("lipfast.rules.registry", "test_registry", "tests.rules.test_registry")
INDEX = torch.tensor([0, 3, 3, 1])


def tensors_of(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {
        name: torch.randn(shape, generator=generator).double()
        for name, shape in case.parameters.items()
    }
    if "var" in found:
        found["var"] = found["var"].square() + 0.1
    return found


def plan_of(op: str, case: Case) -> Plan:
    """The op alone as a plan, not by tracing: the arguments are those that export writes."""

    def argument(value: object) -> Argument:
        if isinstance(value, tuple):
            return tuple(argument(entry) for entry in value)
        if value == "p:i":
            return Reference("constant", "i")
        if isinstance(value, str) and value.startswith("p:"):
            return Reference("parameter", value[2:])
        return value  # type: ignore[return-value]

    from lipfast.graph.nodes import Constant  # noqa: PLC0415

    constants = {"i": Constant.from_tensor(INDEX)} if "i" in case.parameters else {}
    shapes = {name: shape for name, shape in case.parameters.items() if name != "i"}
    node = Node("y", op, tuple(argument(value) for value in case.args))
    source = Node("x", "input", shape=case.shape)
    sample = torch.zeros(1, 2, *case.shape).double()
    stacked = {name: value[None] for name, value in tensors_of(case).items()}
    if op.startswith("lipfast") or op in ("aten.view", "aten.reshape", "aten._unsafe_view"):
        shape = {"lipfast.matmul": (2, 3), "lipfast.repeated": (3,)}.get(op)
        shape = shape or tuple(int(n) for n in case.args[1][1:])  # type: ignore[index]
    else:
        graph = Graph((source, Node("y", op, node.args)), ("y",))
        values = {**{X: sample[0]}, **{Reference("parameter", k): v[0] for k, v in stacked.items()}}
        values |= {Reference("constant", k): v.tensor() for k, v in constants.items()}
        shape = tuple(call_op(graph.nodes[1], values.__getitem__, 2).shape[1:])
    graph = Graph((source, Node("y", op, node.args, (), shape)), ("y",))
    return Plan(graph, shapes, {}, constants, torch.float64)


def points(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator).double()


def outputs(plan: Plan, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    stacked = {name: value[None] for name, value in tensors.items()}
    return evaluate(plan.graph, stacked, plan.constants, [x[None]])[0]


def test_no_rule_is_without_its_check() -> None:
    shipped = {op for op, rule in RULES.items() if rule.bound.__module__ not in _ELSEWHERE}
    assert set(CASES) | set(MODULES) == shipped, "add the new rule's op to this file"


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if case.linear])
def test_linear_rules_bound_the_explicit_matrix(op: str) -> None:
    case = CASES[op]
    plan, tensors = plan_of(op, case), tensors_of(case)
    tensors.pop("i", None)
    assert RULES[op].supports is None or RULES[op].supports(plan.graph.nodes[1]) is None
    size = math.prod(case.shape)
    unit = torch.eye(size).double().reshape(size, *case.shape)
    zero = outputs(plan, tensors, torch.zeros(1, *case.shape).double())
    matrix = (outputs(plan, tensors, unit) - zero).T
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        bound = plan.upper(tensors, norm=norm)
        assert bound.certified
        assert truth * (1 - 1e-14) <= bound.value <= 4.0 * truth + 1e-300


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if not case.linear])
def test_other_rules_bound_sampled_quotients(op: str) -> None:
    case = CASES[op]
    plan, tensors = plan_of(op, case), tensors_of(case)
    assert RULES[op].supports is None or RULES[op].supports(plan.graph.nodes[1]) is None
    check(plan, tensors, case.shape, on_a_box=case.on_a_box)


def check(
    plan: Plan, tensors: dict[str, Tensor], shape: tuple[int, ...], *, on_a_box: bool
) -> None:
    largest = dict.fromkeys(NORMS, 0.0)
    for scale in (0.05, 1.0):
        for step in (1e-4, 0.1, 1.0):
            x = scale * points(shape, 200, 1)
            y = x + step * scale * points(shape, 200, 2)
            if on_a_box:
                x, y = BOX.project(x), BOX.project(y)
            change = outputs(plan, tensors, x) - outputs(plan, tensors, y)
            room = 1e-14 * (1 + change.abs())
            for norm in NORMS:
                top = torch.linalg.vector_norm((change.abs() - room).clamp_min(0), norm, 1)
                quotient = top / torch.linalg.vector_norm((x - y).flatten(1), norm, 1)
                largest[norm] = max(largest[norm], float(quotient.nan_to_num(0.0).max()))
    for norm in NORMS:
        bound = plan.upper(tensors, norm=norm, domain=BOX if on_a_box else None)
        assert bound.certified
        assert math.isfinite(bound.value) or (bound.reason or "") != ""
        assert 0 < largest[norm] <= bound.value


@pytest.mark.parametrize("op", MODULES)
def test_rules_of_joined_ops_bound_sampled_quotients(op: str) -> None:
    function, shape = MODULES[op]
    model = function if isinstance(function, torch.nn.Module) else Function(function)
    plan = traced(model, shape)
    assert op in [node.op for node in (*plan.graph.nodes, *plan.joined.graph.nodes)]
    tensors = {name: value.double() for name, value in model.state_dict().items()}
    check(plan, tensors, shape, on_a_box=op == "lipfast.weighted_rows")
