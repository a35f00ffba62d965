"""Modules that write: each evaluation is of the state as found, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, LipfastError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


class Scaled(nn.Module):
    """A layer on what parameters, buffers, attributes and numbers scale, after a write to one."""

    def __init__(self, write: Callable[[Scaled], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("buffer", torch.ones(4))
        self.plain, self.number, self.table = torch.ones(4), 1.0, {"scale": torch.ones(4)}
        self.cache: Tensor | None = None
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        weight = self.layer.weight if self.cache is None else self.cache
        scaled = x * self.buffer * self.plain * self.number * self.table["scale"]
        return nn.functional.linear(scaled, weight, self.layer.bias)


def without_gradients(write: Callable[[Scaled], object]) -> Callable[[Scaled], object]:
    def written(model: Scaled) -> None:
        with torch.no_grad():
            write(model)

    return written


def rescaled(model: Scaled) -> None:
    flat = nn.utils.parameters_to_vector(model.layer.parameters())
    nn.utils.vector_to_parameters(3 * flat.detach(), model.layer.parameters())


WRITES: dict[str, Callable[[Scaled], object]] = {
    "data": lambda m: m.layer.weight.data.mul_(3),
    "data clipped": lambda m: m.layer.weight.data.clamp_(min=0.25),
    "data set": lambda m: setattr(m.layer.weight, "data", 3 * m.layer.weight.data),
    "data replaced": lambda m: setattr(m.layer.weight, "data", torch.ones(3, 4)),
    "in place": without_gradients(lambda m: m.layer.weight.mul_(3)),
    "renormalised": without_gradients(lambda m: m.layer.weight.renorm_(2, 0, 0.1)),
    "detached": lambda m: m.layer.weight.detach().mul_(3),
    "numpy": lambda m: m.layer.weight.detach().numpy().__imul__(3),
    "vector": rescaled,
    "buffer": lambda m: m.buffer.mul_(3),
    "buffer data": lambda m: m.buffer.data.mul_(3),
    "buffer set": lambda m: setattr(m, "buffer", 3 * m.buffer),
    "plain": lambda m: m.plain.mul_(3),
    "plain data": lambda m: setattr(m.plain, "data", 3 * m.plain.data),
    "number": lambda m: setattr(m, "number", 3 * m.number),
    "table": lambda m: m.table.update(scale=3 * m.table["scale"]),
    "parameter": lambda m: setattr(m.layer, "weight", nn.Parameter(3 * m.layer.weight)),
    "cache": lambda m: setattr(m, "cache", 3 * m.layer.weight if m.cache is None else m.cache),
}


def truth(write: Callable[[Scaled], object]) -> Tensor:
    """Of the first evaluation of a fresh module."""
    jacobian = torch.autograd.functional.jacobian(Scaled(write).eval(), X[:1])
    return torch.linalg.matrix_norm(jacobian.reshape(3, 4).double(), 2)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_values_are_those_of_the_state_as_found(write: Callable[[Scaled], object]) -> None:
    model, expected = Scaled(write), truth(write).expand(5).float()
    for options in ({"method": "rows"}, {"method": "lanczos"}, {"create_graph": True}, {}):
        for _ in range(2):
            found = lipfast.jacobian_norms(model, X, **options)  # type: ignore[call-overload]
            torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=0)
    assert lipfast.lower_bound(model, X).value <= float(expected[0]) * (1 + 1e-6)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_upper_bounds_are_above_or_refused(write: Callable[[Scaled], object]) -> None:
    try:
        bound = lipfast.upper_bound(Scaled(write), X)
    except LipfastError as error:
        assert "writes its" in str(error)
        return
    assert bound.value >= float(truth(write))


def test_the_gradient_of_a_penalty_is_that_of_the_written_weight() -> None:
    def clip(model: Scaled) -> None:
        model.layer.weight.data.clamp_(-0.2, 0.2)

    model = Scaled(clip)
    lipfast.jacobian_norms(model, X, create_graph=True)[0].backward()
    u, _, v = torch.linalg.svd(model.layer.weight.detach().clamp(-0.2, 0.2))
    torch.testing.assert_close(model.layer.weight.grad, torch.outer(u[:, 0], v[0]))


def test_a_cache_that_was_filled_without_gradients_is_filled_again() -> None:
    model = Scaled(WRITES["cache"])
    lipfast.jacobian_norms(model, X, create_graph=True)[0].backward()
    assert model.layer.weight.grad is not None
    assert float(model.layer.weight.grad.norm()) == pytest.approx(3.0, rel=1e-5)


class Initialised(nn.Module):
    """Data-dependent initialisation, as of normalising flows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("done", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))
        self.flag, self.how, self.last = False, how, torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute" and not self.flag:
            self.scale.data.copy_(1 / x.std(0))
            self.flag = True
        elif self.how == "buffer" and not self.done:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
            self.done.fill_(1)
        elif self.how == "average":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        elif self.how == "attribute tensor":
            self.last = 0.5 * self.last + x.detach().mean(0)
        return (x + self.shift - self.mean - self.last) * self.scale


@pytest.mark.filterwarnings("ignore:std")  # of one sample
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("attribute", "parameter 'scale'"),
        ("buffer", "parameter 'shift'"),
        ("average", "buffer 'mean'"),
        ("attribute tensor", "attribute 'last'"),
    ],
)
def test_what_is_written_from_the_samples_is_refused_by_name(
    how: str, name: str, samples: int
) -> None:
    for call in (lipfast.jacobian_norms, lipfast.lower_bound):
        with pytest.raises(ArgumentError, match=f"forward writes its .*{name}.*from the samples"):
            call(Initialised(how), X[:samples])


@pytest.mark.parametrize("how", ["attribute", "buffer"])
def test_after_the_initialisation_there_is_a_bound(how: str) -> None:
    model = Initialised(how)
    with torch.no_grad():
        model(X)
    largest = float(model.scale.detach().abs().max())
    assert float(lipfast.jacobian_norms(model, X)[0]) == pytest.approx(largest, rel=1e-6)
    if how == "attribute":
        assert lipfast.upper_bound(model, X).value >= largest


def test_observers_that_no_output_depends_on_are_no_obstacle() -> None:
    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.zeros(()))
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
            self.last = x
            return 2 * x

    norms = lipfast.jacobian_norms(Observed(), X)
    torch.testing.assert_close(norms, torch.full((5,), 2.0))


def test_a_parameter_that_is_written_behind_the_module_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.own = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.own[0].mul_(2)
            result: Tensor = self.layer(x)
            return result

    with pytest.raises(ArgumentError, match=r"writes its parameter 'layer\.weight'"):
        lipfast.jacobian_norms(Hidden(), X)
