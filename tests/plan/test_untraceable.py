"""What cannot be traced is said with the line and the reason."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, TraceError, UnsupportedOpError
from lipfast.plan import cache
from lipfast.plan.untraceable import is_users

Function = Callable[[Tensor], Tensor]


class Applies(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def by_length(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def by_int(x: Tensor) -> Tensor:
    return x.reshape(int(x.shape[0]), -1)


def by_loop(x: Tensor) -> Tensor:
    return torch.stack([2.0 * row for row in x])


def by_unbinding(x: Tensor) -> Tensor:
    return torch.stack(x.unbind(0))


def by_range(x: Tensor) -> Tensor:
    return torch.stack([x[index] for index in range(x.shape[0])])


def by_number(x: Tensor) -> Tensor:
    return x.view(4, 3)


def by_zeros(x: Tensor) -> Tensor:
    return x + torch.zeros(len(x), 3)


def by_sum(x: Tensor) -> Tensor:
    return x + torch.ones(4, 3)


def by_branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else 2.0 * x


def by_loop_on_values(x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = x / 2.0
    return x


def by_truth(x: Tensor) -> Tensor:
    return x * bool((x > 0).all())


def by_check(x: Tensor) -> Tensor:
    if (x > 100).any():
        raise ValueError
    return 2.0 * x


def by_numpy(x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.detach().numpy())


def by_many(x: Tensor) -> Tensor:
    return x if x.shape[0] > 3 else 2.0 * x


def by_even(x: Tensor) -> Tensor:
    return x if x.shape[0] % 2 == 0 else 2.0 * x


def by_not_five(x: Tensor) -> Tensor:
    return x if x.shape[0] != 5 else 2.0 * x


def asserting(x: Tensor) -> Tensor:
    assert x.shape[0] < 1000
    return 2.0 * x


def asserting_on_lines(x: Tensor) -> Tensor:
    assert x.shape[0] < 1000, (
        f"too many samples: {x.shape[0]}"
    )  # fmt: skip
    return 2.0 * x


def asserting_with_effect(x: Tensor) -> Tensor:
    assert (factor := 3 if x.shape[0] > 5 else 1)  # noqa: RUF018 (the case itself)
    return factor * x


def asserting_by_call(x: Tensor) -> Tensor:
    factors = [1]
    assert x.shape[0] < 5 or not factors.append(3)
    return factors[-1] * x


X = torch.linspace(0.5, 1, 12).reshape(4, 3)


def line_of(function: Function, text: str) -> str:
    """Where a line of this file stands, as messages say it."""
    lines = Path(__file__).read_text().splitlines()
    start = lines.index(f"def {function.__name__}(x: Tensor) -> Tensor:")
    number = next(n for n in range(start + 1, len(lines)) if text in lines[n]) + 1
    return rf"\(at {re.escape(__file__)}:{number}\)"


@pytest.mark.parametrize(
    "function",
    [by_length, by_int, by_loop, by_unbinding, by_range, by_number, by_zeros, by_sum],
)
def test_a_fixed_number_of_samples(function: Function) -> None:
    where = line_of(function, "x")
    with pytest.raises(TraceError, match=rf"Applies fixes the number of samples {where}, and"):
        lipfast.compile(Applies(function), X)


@pytest.mark.parametrize("function", [by_branch, by_loop_on_values, by_truth, by_check])
def test_decisions_by_values(function: Function) -> None:
    where = line_of(function, "x") if function is not by_check else line_of(function, "if")
    with pytest.raises(TraceError, match=rf"decides by the values of a tensor {where}"):
        lipfast.compile(Applies(function), X)


def test_numpy() -> None:
    with pytest.raises(TraceError, match=rf"leaves torch for numpy {line_of(by_numpy, 'numpy')}"):
        lipfast.compile(Applies(by_numpy), X)


@pytest.mark.parametrize("function", [by_many, by_even, by_not_five])
def test_decisions_by_the_number_of_samples(function: Function) -> None:
    """Of such a function a bound for one number of samples is none for another."""
    where = line_of(function, "if")
    with pytest.raises(TraceError, match=rf"decides by the number of samples {where}"):
        lipfast.upper_bound(Applies(function), X)
    try:
        assert not lipfast.lower_bound(Applies(function), X).certified
    except ArgumentError as error:
        assert "mixes the samples" in str(error)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * len(x.split(3)),
        lambda x: x * len(x.chunk(4)),
        lambda x: x * len(x.tensor_split(2)),
        lambda x: torch.cat([(i + 1) * part for i, part in enumerate(x.split(5))]),
        lambda x: x * x[:5].shape[0],
        lambda x: x if x[5:].shape[0] == 0 else 2 * x,
    ],
)
def test_decisions_that_torch_takes_for_the_model(function: Function) -> None:
    with pytest.raises(TraceError, match="the number of samples"):
        lipfast.upper_bound(Applies(function), X[:2])


@pytest.mark.parametrize("function", [asserting, asserting_on_lines])
def test_an_assertion_on_the_number_of_samples_is_no_decision(function: Function) -> None:
    assert lipfast.upper_bound(Applies(function), X).value == 2.0


@pytest.mark.parametrize("function", [asserting_with_effect, asserting_by_call])
def test_an_assertion_that_does_more_is_a_decision(function: Function) -> None:
    with pytest.raises(TraceError, match="decides by the number of samples"):
        lipfast.upper_bound(Applies(function), X)


def test_all_inputs_have_one_number_of_samples() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert x.shape[0] == y.shape[0], (
                "of both inputs"
            )  # fmt: skip
            return x + y if x.shape[0] == y.shape[0] else x

    assert lipfast.compile(Two(), (X, X)).output_shapes == ((3,),)


def test_whose_files_are_whose() -> None:
    torchs, pythons = Path(torch.__file__).parent, Path(contextlib.__file__).parent
    own = Path(lipfast.__file__).parent
    users = [
        *(f"{torchs}vision/models/resnet.py", f"{torchs}_geometric/nn.py", f"{own}_of_mine/x.py"),
        *(f"{pythons}/site-packages/timm/x.py", f"{pythons}/dist-packages/timm/x.py"),
        *("<stdin>", "<string>", "<ipython-input-3-0>", "models/model.py"),
    ]
    assert [file for file in users if not is_users(file)] == []
    others = [torchs / "nn" / "x.py", pythons / "x.py", own / "plan" / "x.py", "<frozen runpy>"]
    assert [file for file in map(str, others) if is_users(file)] == []


def test_what_is_typed_in_is_a_users() -> None:
    names: dict[str, Function] = {}
    code = "def f(x):\n    return x if x.shape[0] < 5 else 3 * x"
    exec(compile(code, "<stdin>", "exec"), names)
    with pytest.raises(TraceError, match=r"decides by the number of samples \(at <stdin>:2\)"):
        lipfast.upper_bound(Applies(names["f"]), X)


def test_torchs_log_is_as_it_was() -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.level, list(logger.handlers), logger.propagate
    for function in (by_length, asserting):
        with contextlib.suppress(TraceError):
            lipfast.compile(Applies(function), X)
        assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_an_unknown_part_of_a_result_is_named() -> None:
    with pytest.raises(UnsupportedOpError, match=r"aten\.max\[1\] in module '\(root\)'"):
        lipfast.compile(Applies(lambda x: torch.max(x, 1)), X)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (torch.asinh, r"aten\.asinh in module '\(root\)'.*@lipfast\.rule"),
        (by_length, "Applies fixes the number of samples"),
        (by_check, "decides by the values of a tensor"),
    ],
)
def test_a_lower_bound_says_what_its_certificate_lacks(function: Function, named: str) -> None:
    lower = lipfast.lower_bound(Applies(function), X)
    assert not lower.certified
    assert re.search(named, lower.reason or "")
    again = lipfast.lower_bound(Applies(function), X)
    assert again.reason == lower.reason


def test_a_model_without_calls_has_a_certificate() -> None:
    lower = lipfast.lower_bound(nn.Sequential(), X)
    assert lower.certified
    assert 0.999 < lower.value <= 1


def test_what_cannot_be_traced_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Applies(by_check)
    before = lipfast.lower_bound(model, X)

    def traced(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(cache, "trace", traced)
    assert lipfast.lower_bound(model, X) == before
    model.function = torch.tanh
    monkeypatch.undo()
    assert lipfast.lower_bound(model, X).certified
