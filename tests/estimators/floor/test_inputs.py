"""Inputs that realise a pattern as starts of the ascent, and starts from convex combinations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError


def _samples(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def _random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _wide() -> nn.Module:
    """Every pattern is reached: the first matrix has full row rank."""
    return _random(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)))


def _largest(model: nn.Module, x: Tensor, **options: object) -> float:
    found = lipfast.lower_bound(model, x, search="ascent", **options)  # type: ignore[arg-type]
    assert found.search is not None
    return found.search.estimate.value


def test_a_pattern_that_is_reached_is_the_truth() -> None:
    model, x = _wide(), _samples(30, 20)
    floor = lipfast.bounds(model, x, floor=True).floor
    assert floor is not None
    found = lipfast.lower_bound(model, x, search="ascent", starts_from="pattern")
    assert found.certified
    assert found.value == pytest.approx(floor.value, rel=1e-6)
    assert found.value > 1.05 * _largest(model, x)


def test_convex_combinations_are_starts() -> None:
    model, x = _wide(), _samples(30, 20)
    combined = lipfast.lower_bound(model, x, search="convex", draws=500).search
    assert combined is not None
    reached = _largest(model, x, starts_from=("data", "convex"), draws=500, steps=1)
    assert reached >= combined.estimate.value > _largest(model, x, steps=1)
    both = _largest(model, x, starts_from=["pattern", "convex"], draws=500)
    assert both >= combined.estimate.value


def test_without_them_all_is_as_before() -> None:
    model, x = _wide(), _samples(10, 20)
    plain = lipfast.lower_bound(model, x, search="ascent", steps=3)
    same = lipfast.lower_bound(model, x, search="ascent", steps=3, starts_from=("data",))
    assert plain == same
    assert torch.equal(plain.points, same.points)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.maximum(self.first(x), self.other(x))
        return self.last(h * torch.sigmoid(h)) + torch.maximum(self.last(h), self.last.bias)


_ACTIVATIONS = (nn.Hardtanh(), nn.Tanh(), nn.GELU(), nn.PReLU(init=1.5), nn.ELU(), nn.Hardswish())


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize(
    "model",
    [
        *(
            nn.Sequential(nn.Linear(6, 12), act, nn.Linear(12, 8), act, nn.Linear(8, 3))
            for act in _ACTIVATIONS
        ),
        _Two(),
        nn.Sequential(nn.Linear(6, 3)),
        nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
    ],
    ids=lambda model: type(model[1]).__name__ if isinstance(model, nn.Sequential) and len(model) > 1
    else type(model).__name__,
)  # fmt: skip
def test_never_below_the_samples(model: nn.Module, norm: float) -> None:
    x = _samples(20, 6)
    box = lipfast.Box(-4.0, 4.0)
    found = lipfast.lower_bound(
        _random(model), x, norm=norm, search="ascent", starts_from="pattern", steps=3, domain=box
    )
    assert found.search is not None
    assert found.search.estimate.value >= found.jacobian.value
    assert found.search.points.abs().max() <= 4.0
    assert found.points.abs().max() <= 4.0
    assert found.value <= lipfast.upper_bound(model, x, norm=norm).value


class _Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().sum()) > -1e9 else x


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (_wide(), {"starts_from": "magic"}, "one or several of data, convex, pattern, not 'magic'"),
        (_wide(), {"starts_from": ()}, "starts_from must be one or several"),
        (_wide(), {"starts_from": ["data", 1]}, "starts_from must be"),
        (_wide(), {"starts_from": 3}, "starts_from must be"),
        (_wide(), {"draws": 0}, "draws must be a positive integer"),
        (_wide(), {"limit": 1.5}, "limit must be a positive integer"),
        (nn.Softmax(1), {"starts_from": "pattern"}, "slopes of all activations: .*softmax"),
        (_Untraceable(), {"starts_from": "pattern"}, "that lipfast.compile can trace"),
    ],
)
def test_refusals(model: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lipfast.lower_bound(model, _samples(4, 20), search="ascent", **options)  # type: ignore[arg-type]


def test_several_inputs_are_refused() -> None:
    model = nn.Bilinear(2, 3, 2)
    with pytest.raises(ArgumentError, match="several inputs"):
        lipfast.lower_bound(
            model, (_samples(4, 2), _samples(4, 3)), search="ascent", starts_from="pattern"
        )


def test_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _wide().train(), _samples(10, 20)
    state = torch.get_rng_state()
    with torch.inference_mode():
        inside = _largest(model, x.clone(), starts_from=("convex", "pattern"), draws=50, steps=2)
    assert inside == _largest(model, x, starts_from=("convex", "pattern"), draws=50, steps=2)
    monkeypatch.setattr(
        "lipfast.estimators.floor.inputs.walk",
        lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        _largest(model, x, starts_from="pattern")
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
