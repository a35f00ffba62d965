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


def test_an_assertion_on_the_number_of_samples_is_no_decision() -> None:
    assert lipfast.upper_bound(Applies(asserting), X).value == 2.0


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
