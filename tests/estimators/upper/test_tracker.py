from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError, StateDictError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 80), nn.ReLU())


@pytest.fixture
def plan() -> lipfast.Plan:
    return lipfast.compile(model(), torch.zeros(2, 60))


def run(steps: int, change: float, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """State dicts of a run: each differs from the one before by a relative change."""
    weights = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model().state_dict().items()
    }
    states = [weights]
    for _ in range(steps - 1):
        states.append(
            {
                name: value + change * torch.randn(value.shape, generator=generator)
                for name, value in states[-1].items()
            }
        )
    return states


def passes(bound: lipfast.UpperBound) -> int:
    return sum(layer.passes for layer in bound.layers)


def true_norms(state: dict[str, Tensor]) -> list[float]:
    return [
        float(torch.linalg.svdvals(state[name].double())[0]) for name in ("0.weight", "2.weight")
    ]


@pytest.mark.parametrize("change", [0.0, 1e-3, 1e-2, 1.0])
def test_brackets_hold_the_truth_along_a_run(
    plan: lipfast.Plan, change: float, generator: torch.Generator
) -> None:
    tracker = plan.tracker()
    for state in run(5, change, generator):
        bound, cold = tracker.upper(state), plan.upper(state)
        assert bound.certified
        for layer, other, truth in zip(bound.layers, cold.layers, true_norms(state), strict=True):
            assert layer.lower <= truth * (1 + 1e-14)
            assert layer.upper >= truth * (1 - 1e-14)
            assert layer.upper - layer.lower <= 1e-6 * layer.upper
            # Warm and cold values lie within each other's brackets.
            assert layer.lower <= other.upper and other.lower <= layer.upper
    assert set(tracker.vectors) == {"0.weight", "2.weight"}


def test_fewer_passes_when_little_changes(plan: lipfast.Plan, generator: torch.Generator) -> None:
    tracker = plan.tracker()
    states = run(4, 1e-3, generator)
    cold = [passes(plan.upper(state)) for state in states]
    warm = [passes(tracker.upper(state)) for state in states]
    assert warm[0] == cold[0]
    assert sum(warm[1:]) < 0.5 * sum(cold[1:])
    tracker.reset()
    assert passes(tracker.upper(states[0])) == cold[0]


def test_consecutive_checkpoints_in_one_call(
    plan: lipfast.Plan, generator: torch.Generator
) -> None:
    states = run(5, 1e-3, generator)
    together, alone = plan.tracker(), plan.tracker()
    first = together.upper(states[:2])
    assert [bound.value for bound in first] == [bound.value for bound in plan.upper(states[:2])]
    alone.upper(states[1])
    later = together.upper(states[2:])
    assert later[0].value == alone.upper(states[2]).value
    assert together.upper(states[4]).certified


def test_any_start_gives_a_certified_bound(plan: lipfast.Plan, generator: torch.Generator) -> None:
    """Vectors of the smallest singular value: the worst start there is."""
    state = run(1, 0.0, generator)[0]
    smallest = {
        name: torch.linalg.svd(state[name].double())[2][-1] for name in ("0.weight", "2.weight")
    }
    for start in (smallest, {"0.weight": smallest["0.weight"]}):
        bound = plan.upper(state, start=start)
        assert bound.certified
        for layer, truth in zip(bound.layers, true_norms(state), strict=True):
            assert layer.lower <= truth * (1 + 1e-14)
            assert truth * (1 - 1e-14) <= layer.upper <= truth * (1 + 1e-6)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_other_norms_carry_nothing(
    plan: lipfast.Plan, norm: float, generator: torch.Generator
) -> None:
    tracker = plan.tracker(norm=norm)
    for state in run(2, 1e-2, generator):
        assert tracker.upper(state).value == plan.upper(state, norm=norm).value
    assert tracker.vectors == {}


def test_errors_leave_the_vectors(plan: lipfast.Plan, generator: torch.Generator) -> None:
    tracker = plan.tracker()
    state = run(1, 0.0, generator)[0]
    tracker.upper(state)
    before = tracker.vectors
    with pytest.raises(StateDictError):
        tracker.upper({"0.weight": state["0.weight"]})
    with pytest.raises(NonFiniteError):
        tracker.upper({**state, "0.weight": state["0.weight"] * math.nan})
    with pytest.raises(ArgumentError, match="no state dicts"):
        tracker.upper([])
    assert tracker.vectors is before


def test_bad_starts(plan: lipfast.Plan, generator: torch.Generator) -> None:
    state = run(1, 0.0, generator)[0]
    with pytest.raises(ArgumentError, match="2 mappings for 1 state dicts"):
        plan.upper([state], start=[{}, {}])
    with pytest.raises(ArgumentError, match="'bias' is not the weight of a layer"):
        plan.upper(state, start={"bias": torch.ones(60)})
    with pytest.raises(ArgumentError, match="expected 60 values"):
        plan.upper(state, start={"0.weight": torch.ones(61)})
    with pytest.raises(ArgumentError, match="norm"):
        plan.tracker(norm=3)


class Convolutional(nn.Module):
    """A residual block between a strided and a transposed convolution, on 3 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.down(x)))
        return self.up(h + self.point(torch.relu(self.block(h))))


CONVOLUTIONAL = (3, 8, 8)


def checkpoints(count: int, change: float, generator: torch.Generator) -> list[dict[str, Tensor]]:
    state = Convolutional().state_dict()
    kernels = [name for name, value in state.items() if value.dim() == 4]
    states = [
        {**state, **{name: torch.randn(state[name].shape, generator=generator) for name in kernels}}
    ]
    for _ in range(count - 1):
        noise = {
            name: change * torch.randn(state[name].shape, generator=generator) for name in kernels
        }
        states.append({name: v + noise.get(name, 0) for name, v in states[-1].items()})
    return states


def true_convolution_norms(state: dict[str, Tensor]) -> dict[str, float]:
    """Singular values of the explicit matrices; batch norm divides by sqrt(1 + eps)."""
    options = {
        "down": {"stride": 2, "padding": 1},
        "block": {"padding": 1, "groups": 2},
        "point": {},
    }
    sizes = {"down": CONVOLUTIONAL, "block": (8, 4, 4), "point": (8, 4, 4), "up": (8, 4, 4)}
    found = {}
    for name, size in sizes.items():
        kernel = state[f"{name}.weight"].double()
        eye = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, *size)
        if name == "up":
            image = torch.nn.functional.conv_transpose2d(eye, kernel, stride=2)
        else:
            image = torch.nn.functional.conv2d(eye, kernel, **options[name])  # type: ignore[arg-type]
        found[name] = float(torch.linalg.svdvals(image.flatten(1))[0])
    found["down"] /= math.sqrt(1 + 1e-5)
    return found


@pytest.mark.parametrize("change", [0.0, 1e-3, 1.0])
def test_convolutions_along_a_run(change: float, generator: torch.Generator) -> None:
    plan = lipfast.compile(Convolutional().eval(), torch.zeros(2, *CONVOLUTIONAL))
    tracker = plan.tracker(rtol=1e-2)
    for number, state in enumerate(checkpoints(6, change, generator)):
        bound = tracker.upper(state)
        assert bound.certified
        truth = true_convolution_norms(state)
        for layer in bound.layers:
            assert layer.lower <= truth[layer.name] * (1 + 1e-13)
            assert layer.upper >= truth[layer.name] * (1 - 1e-13)
        methods = [layer.method for layer in bound.layers]
        # Of the four, one has one tap: a matrix.
        expected = 3 if number and change == 0.0 else 2 if number == 1 and change < 1 else 0
        assert methods.count("difference") >= expected
        if change == 1.0:
            assert "difference" not in methods


def test_a_start_of_another_run_is_as_good(generator: torch.Generator) -> None:
    plan = lipfast.compile(Convolutional().eval(), torch.zeros(2, *CONVOLUTIONAL))
    tracker = plan.tracker(rtol=1e-2)
    (first,) = checkpoints(1, 0.0, generator)
    tracker.upper(first)
    (other,) = checkpoints(1, 0.0, generator)
    other = {name: 7 * value if value.dim() == 4 else value for name, value in other.items()}
    bound = plan.upper(other, rtol=1e-2, start=tracker.vectors)
    assert bound.certified
    truth = true_convolution_norms(other)
    for layer in bound.layers:
        assert layer.lower <= truth[layer.name] * (1 + 1e-13)
        assert layer.upper >= truth[layer.name] * (1 - 1e-13)


def test_a_proof_whose_taps_were_changed_is_not_used(generator: torch.Generator) -> None:
    plan = lipfast.compile(nn.Conv2d(4, 4, 3), torch.zeros(2, 4, 6, 6))
    tracker = plan.tracker(rtol=1e-2)
    state = {
        "weight": torch.randn(4, 4, 3, 3, generator=generator),
        "bias": torch.zeros(4),
    }
    before = tracker.upper(state).value
    assert tracker.upper(state).layers[0].method == "difference"
    proof = tracker.vectors["weight"].reference  # type: ignore[union-attr]
    taps, _ = proof.bound_of((1, 3, 3, 1, 4, 4))  # type: ignore[misc,union-attr]
    taps.mul_(3.0)
    after = tracker.upper({"weight": 3 * state["weight"], "bias": state["bias"]})
    assert after.layers[0].method == "cholesky"
    assert after.value >= 2.9 * before


def test_starts_of_the_wrong_kind() -> None:
    plan = lipfast.compile(
        nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 2)), torch.zeros(1, 2, 6, 6)
    )
    state = {name: torch.ones(shape) for name, shape in plan.parameters.items()}
    tracker = plan.tracker()
    tracker.upper(state)
    vectors = tracker.vectors
    with pytest.raises(ArgumentError, match=r"'0.weight' is a convolution's"):
        plan.upper(state, start={"0.weight": torch.ones(5)})
    with pytest.raises(ArgumentError, match=r"'2.weight' is a matrix"):
        plan.upper(state, start={"2.weight": vectors["0.weight"]})
    larger = lipfast.compile(nn.Sequential(nn.Conv2d(2, 2, 3)), torch.zeros(1, 2, 9, 9))
    with pytest.raises(ArgumentError, match=r"was applied to samples of shape \(2, 6, 6\)"):
        larger.upper(
            {name: state[name] for name in larger.parameters},
            start={"0.weight": vectors["0.weight"]},
        )


@pytest.mark.parametrize("given", [None, 1, torch.tensor(1.0), torch.zeros(2, 3), [], iter(())])
def test_what_is_no_state_dict_is_refused(plan: lipfast.Plan, given: object) -> None:
    tracker = plan.tracker()
    with pytest.raises(ArgumentError, match=r"expected a state dict|no state dicts were given"):
        tracker.upper(given)  # type: ignore[call-overload]
    assert not tracker.vectors
