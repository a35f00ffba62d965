"""The runs of a sweep on disk, and the networks in their checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass

from safetensors.torch import load_file
from torch import nn

from experiments.checkpoints import checkpoint_name, read_metadata
from experiments.models import build_model
from experiments.sweep import SweepFolder
from lipfast.errors import StoreError


@dataclass(frozen=True)
class Run:
    """One network of a sweep, trained.

    Attributes:
        name: of its folder.
        width: as `SweepConfig.widths` says.
        seed: of its initial weights.
        status: "ok" or "diverged".
        steps: of its checkpoints, ascending.
        stopped: why training ended: "steps", "gradient_norm", "train_loss" or "diverged".
    """

    name: str
    width: int
    seed: int
    status: str
    steps: tuple[int, ...]
    stopped: str

    @property
    def last_step(self) -> int:
        """The step of the last checkpoint."""
        return self.steps[-1]


def runs(folder: SweepFolder) -> list[Run]:
    """Return the complete runs of a sweep, ordered by width and seed.

    Raises:
        StoreError: there are none.
    """
    found: list[Run] = []
    for path in folder.checkpoints.glob("*/done.json"):
        done = json.loads(path.read_text(encoding="utf-8"))
        _, width, _, seed = path.parent.name.split("-")
        found.append(
            Run(
                name=path.parent.name,
                width=int(width),
                seed=int(seed),
                status=done["status"],
                steps=tuple(done["checkpoints"]),
                stopped=done["stopped"],
            )
        )
    if not found:
        raise StoreError(f"{folder.checkpoints}: no complete runs there; run the study first")
    return sorted(found, key=lambda run: (run.width, run.seed))


def load_model(folder: SweepFolder, run: Run, step: int = -1) -> nn.Module:
    """Load the network of a checkpoint, in eval mode.

    Args:
        folder: of the sweep.
        run: from `runs`.
        step: of the checkpoint; -1 for the last.

    Raises:
        StoreError: the run has no checkpoint at that step.
    """
    wanted = run.last_step if step < 0 and run.steps else step
    if wanted not in run.steps:
        raise StoreError(f"{run.name} has no checkpoint at step {step}; it has {list(run.steps)}")
    path = folder.checkpoints / run.name / checkpoint_name(wanted)
    model = build_model(read_metadata(path))
    model.load_state_dict(load_file(path))
    return model.eval()
