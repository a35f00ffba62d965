"""The pretended device keeps CUDA's rules, and counts what it is asked to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.pretended_device import CUDA, module_on_device, on_device, pretended_device


def test_operands_must_be_on_one_device() -> None:
    here, there = torch.ones(3), on_device(torch.ones(3))
    with pretended_device():
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([here, there])
        with pytest.raises(RuntimeError, match="same device"):
            there + on_device(torch.ones(3), "cuda:1")
        with pytest.raises(RuntimeError, match="indices should be"):
            here[on_device(torch.tensor([0]))]
        assert (there + torch.tensor(1.0)).device == CUDA
        assert there[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_factories_and_moves() -> None:
    with pretended_device() as counts:
        made = torch.zeros(2, device="cuda")
        assert made.device == torch.tensor([1.0], device=CUDA).device == CUDA
        assert (counts.launches, counts.copies, counts.syncs) == (1, 1, 0)
        assert made.cpu().device.type == made.to("cpu", torch.float64).device.type == "cpu"
        assert counts.syncs == 2
        assert torch.ones(2).to(made).device == torch.ones(2).cuda().device == CUDA
        assert torch.ones(2).to(CUDA, non_blocking=True).dtype == torch.float32
        assert (counts.copies, counts.blocking) == (4, 3)
        assert made.new_zeros(3).device == torch.zeros_like(made).device == CUDA


def test_counts() -> None:
    x = on_device(torch.arange(300.0))
    with pretended_device() as counts:
        torch.stack([x] * 300)
        assert counts.launches == 3  # a kernel takes 128 tensors
        counts.clear()
        x.reshape(3, 100).T.flatten()[None]
        assert dict(counts.ops) == {"clone": 1}
        counts.clear()
        float(x.sum())
        x[x > 2]
        assert counts.syncs == 2
        assert bool(torch.isfinite(x).all())
        assert counts.syncs == 3


def test_modules_and_gradients() -> None:
    tied = nn.Linear(3, 3)
    model = nn.Sequential(tied, nn.ReLU(), nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)).eval()
    model[2].weight = tied.weight
    x = torch.randn(4, 3)
    with pretended_device():
        there = module_on_device(model)
        assert there[0].weight is there[2].weight
        assert all(value.device == CUDA for value in there.state_dict().values())
        outputs = copy.deepcopy(there)(on_device(x))
        torch.testing.assert_close(outputs.cpu(), model(x))
        there(on_device(x)).sum().backward()
        model(x).sum().backward()
        assert there[0].weight.grad.device == CUDA
        torch.testing.assert_close(there[0].weight.grad.cpu(), tied.weight.grad)
        assert next(copy.deepcopy(model).to("cuda").parameters()).device == CUDA
        slope = torch.func.jvp(there, (on_device(x),), (on_device(x),))[1]
        torch.testing.assert_close(slope.cpu(), torch.func.jvp(model, (x,), (x,))[1])


def test_native_ops_without_a_kernel_are_refused() -> None:
    points = on_device(torch.zeros(1, 1, 2, dtype=torch.float64))
    weight = on_device(torch.ones(1, 2, dtype=torch.float64))
    with pretended_device(), pytest.raises(NotImplementedError, match="'CUDA' backend"):
        torch.ops.lipfast.chain_secants_enclosures(points, [weight], [weight[:, 0]], [-1], [0, 0])
    samples = on_device(torch.zeros(1, 1, 2), "mps")
    with pretended_device(), pytest.raises(NotImplementedError, match="on mps"):
        torch.ops.lipfast.jacobian_reduction(samples)
