"""Networks that others published: in tests/data/networks, and in a folder of the user."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lipfast

StateDict = dict[str, Tensor]
FOLDER = Path(__file__).parent.parent / "tests" / "data" / "networks"
VARIABLE = "LIPFAST_BENCH_NETWORKS"
RANDOM, ECLIPSE, MNIST = "lipsdp-random-2-10-30-20-2", "eclipse-4-80-1", "lipsdp-mnist-784-50-10"
NO_ACAS = (
    f"ACAS Xu's networks are not kept here: {VARIABLE} may name a folder of acasxu-*.safetensors "
    "(tests/data/networks/README.md)"
)


class Networks(NamedTuple):
    """Networks of one architecture, a chain."""

    plan: lipfast.Plan
    state_dicts: list[StateDict]

    def weights(self, network: int = 0) -> list[Tensor]:
        """The matrices of a network, first to last."""
        own = self.state_dicts[network]
        return [own[name] for name in _in_order(own) if name.endswith(".weight")]


def published(name: str) -> Networks:
    """The network of that name in this repository."""
    return _of([FOLDER / f"{name}.safetensors"])


def acas() -> Networks | None:
    """The networks of ACAS Xu that the environment points to; None where it does not."""
    folder = os.environ.get(VARIABLE)
    paths = sorted(Path(folder).glob("acasxu-*.safetensors")) if folder else []
    return _of(paths) if paths else None


def _in_order(state_dict: StateDict) -> list[str]:
    return sorted(state_dict, key=lambda name: int(name.partition(".")[0]))


def _of(paths: list[Path]) -> Networks:
    state_dicts = [load_file(path) for path in paths]
    modules: list[nn.Module] = []
    for name in _in_order(state_dicts[0]):
        if name.endswith(".weight"):
            weight, bias = state_dicts[0][name], name.replace("weight", "bias") in state_dicts[0]
            modules += [nn.Linear(weight.shape[1], weight.shape[0], bias), nn.ReLU()]
    model = nn.Sequential(*modules[:-1]).double()
    inputs = next(value.shape[1] for value in state_dicts[0].values() if value.dim() == 2)
    example = torch.zeros(1, inputs, dtype=torch.float64)
    return Networks(lipfast.compile(model, example), state_dicts)
