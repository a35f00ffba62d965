"""Small perceptrons of several widths, as checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TOY_MODELS = """
from torch import nn

def mlp(width: int, depth: int = 1, inputs: int = 4, bias: bool = True, name: str = "toy"):
    assert isinstance(width, int) and isinstance(bias, bool) and isinstance(name, str)
    sizes = [inputs] + [width] * depth
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=bias))

def broken(width: int):
    raise RuntimeError("no such model")

not_a_model = len
"""


def toy_state(width: int, seed: int = 0, **arguments: int) -> dict[str, Tensor]:
    namespace: dict[str, Callable[..., nn.Module]] = {}
    exec(TOY_MODELS, namespace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return namespace["mlp"](width, **arguments).state_dict()


def write_toy(path: Path, width: int, *, seed: int = 0, step: int = 0, **metadata: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"width": width, "step": step, "seed": seed, **metadata}
    save_file(toy_state(width, seed), path, metadata={k: str(v) for k, v in values.items()})
    return path
