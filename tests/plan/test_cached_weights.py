"""Weights that were computed before and kept: refused where other state dicts may follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import ArgumentError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Kept(nn.Linear):
    """Computes its weight once."""

    def __init__(self, *, buffer: bool = False) -> None:
        super().__init__(4, 4)
        self.buffer = buffer
        if buffer:
            self.register_buffer("kept", None, persistent=False)
        else:
            self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = 2 * self.weight.detach()
        return functional.linear(x, self.kept.detach(), self.bias)


@pytest.mark.parametrize("nested", [False, True])
def test_a_fresh_module_is_compiled(nested: bool) -> None:
    layer = Kept()
    model = nn.Sequential(nn.Sequential(layer), nn.ReLU()).eval() if nested else layer.eval()
    plan = lipfast.compile(model, X)
    wide = {name: 5 * value for name, value in model.state_dict().items()}
    truth = 10 * float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    assert truth * (1 - 1e-12) <= plan.upper(wide).value <= truth * (1 + 1e-5)


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_one_that_was_evaluated_is_refused(buffer: bool, nested: bool) -> None:
    layer = Kept(buffer=buffer)
    model = nn.Sequential(nn.Sequential(layer), nn.ReLU()).eval() if nested else layer.eval()
    model(X)
    with pytest.raises(ArgumentError, match=r"does not use its parameter '.*weight'"):
        lipfast.compile(model, X)
    # As it is, the module has a bound: that of the weight which it kept.
    truth = 2 * float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    assert lipfast.upper_bound(model, X).value == pytest.approx(truth, rel=1e-5)
    assert float(lipfast.jacobian_norms(model, X).max()) <= truth * (1 + 1e-5)


def test_constants_beside_parameters_that_are_read_are_no_kept_weights() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.tensor([1.0, 2.0, 3.0, 4.0]))

    assert lipfast.compile(Shifted(4, 4), X).layers


class Sharing(nn.Module):
    """Computes with what shares the memory of its parameter."""

    def __init__(self, share: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.shared = share(self.layer.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared[0] if isinstance(self.shared, list) else self.shared
        return self.layer(functional.pad(functional.linear(x, _rows(shared)), (0, 4))[:, :4])


SHARED: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda weight: weight,
    "a part": lambda weight: weight[:2],
    "an entry": lambda weight: [weight[2]],
    "transposed": lambda weight: weight.T,
    "numpy": lambda weight: weight.numpy(),
}


@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
def test_aliases_of_parameters_are_refused(share: Callable[[Tensor], Any]) -> None:
    model = Sharing(share)
    with pytest.raises(ArgumentError, match=r"shares the memory of 'layer\.weight'"):
        lipfast.compile(model, X)
    assert lipfast.upper_bound(model, X).certified  # of the weights as they are


def test_copies_of_parameters_are_their_own() -> None:
    assert lipfast.compile(Sharing(lambda weight: 2 * weight[:2]), X).output_shapes == ((4,),)


def _rows(value: Any) -> Tensor:
    return torch.as_tensor(value).reshape(-1, 4)


class Idle(nn.Module):
    """A parameter that nothing reads, and numbers that are as many."""

    def __init__(self, numbers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.numbers = nn.Linear(4, 4), numbers
        self.unused = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.numbers(x)


KEPT = torch.tensor([1.0, 2.0, 3.0, 4.0])
ARRAY = KEPT.numpy()
WRITTEN_OUT = {
    "literal": lambda x: torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "of a literal": lambda x: 2 * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "like x": lambda x: x.new_tensor([1.0, 2.0, 3.0, 4.0]),
    "calculated": lambda x: torch.arange(4.0).sin(),
}


@pytest.mark.parametrize("numbers", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
def test_numbers_that_forward_writes_out_are_no_weights(
    numbers: Callable[[Tensor], Tensor],
) -> None:
    assert lipfast.compile(Idle(numbers), torch.zeros(2, 4)).layers


@pytest.mark.parametrize(
    "numbers", [lambda x: KEPT, lambda x: 2 * KEPT, lambda x: torch.from_numpy(ARRAY)]
)
def test_numbers_that_were_kept_are_taken_for_weights(numbers: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ArgumentError, match="does not use its parameter 'unused'"):
        lipfast.compile(Idle(numbers), torch.zeros(2, 4))
