"""The folder of a sweep: where everything is; refuses to mix configurations.

<out>/<name>-<scale>/       with a folder <variant>/ inside where the scale has variants
    sweep.json              the configuration that everything below belongs to
    data.safetensors        x_train, y_train, x_test, y_test, y_train_true
    checkpoints/<run>/step_000100.safetensors
    checkpoints/<run>/done.json    written when the run is complete
    metrics/<group>.parquet        one row per run and logged step
    resume/<group>.pt       the state of a group that is being trained
    scores/                 written by `lipfast score`; scores-quadratic/ with --upper quadratic
    *.png, *.pdf            figures
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiments.checkpoints import checkpoint_name
from experiments.config import SweepConfig
from experiments.errors import ConfigError
from experiments.files import write_whole
from experiments.metrics import read_parts
from experiments.train import Network

# Raised whenever the same configuration would train other networks than before.
_FORMAT = 3


@dataclass(frozen=True)
class SweepFolder:
    """Where the parts of one sweep are.

    Attributes:
        root: the folder of the sweep.
        upper: method of the upper bounds of its scores.
    """

    root: Path
    upper: str = "product"

    @property
    def settings(self) -> Path:
        """The configuration, as JSON."""
        return self.root / "sweep.json"

    @property
    def data(self) -> Path:
        """The training and test set."""
        return self.root / "data.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The archive of checkpoints, one folder per run."""
        return self.root / "checkpoints"

    @property
    def scores(self) -> Path:
        """The store that `lipfast score` writes: one for each method of upper bounds."""
        return self.root / ("scores-quadratic" if self.upper == "quadratic" else "scores")

    @property
    def metrics(self) -> Path:
        """The logs, a Parquet file per group."""
        return self.root / "metrics"

    @property
    def resume(self) -> Path:
        """The states of groups that are being trained."""
        return self.root / "resume"

    def run(self, network: Network) -> Path:
        """Return the folder of one run."""
        return self.checkpoints / run_name(network)


def sweep_folder(config: SweepConfig, out: Path) -> SweepFolder:
    """Return where a sweep is, or would be, inside the folder of all sweeps."""
    return SweepFolder(out / f"{config.name}-{config.scale}" / config.variant, config.upper)


def found_folder(root: Path) -> SweepFolder:
    """Return the folder of a sweep that is there, with the upper bounds that it was scored with."""
    folder = SweepFolder(root)
    stored = read_json(folder.settings) or {}
    return dataclasses.replace(folder, upper=stored.get("upper", folder.upper))


def read_metrics(folder: SweepFolder) -> pa.Table:
    """Read the logs of a sweep: one row per run and logged step, see `experiments.metrics`."""
    return read_parts(folder.metrics)


def run_name(network: Network) -> str:
    """Return the name of a run: of its folder and in the metadata of its checkpoints.

    Example:
        >>> run_name(Network(width=16, seed=0))
        'width-00016-seed-0'
    """
    return f"width-{network.width:05d}-seed-{network.seed}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _of_training(settings: dict[str, Any]) -> dict[str, Any]:
    """What networks depend on: scored in another way they are the ones that are there."""
    return {key: value for key, value in settings.items() if key != "upper"}


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    stored, wanted = _of_training(stored), _of_training(wanted)
    parts = [
        f"{key} (there {stored.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    ]
    return ", ".join(parts)


def _clear(folder: SweepFolder) -> None:
    stores = (SweepFolder(folder.root, upper).scores for upper in ("product", "quadratic"))
    for path in (folder.checkpoints, *stores, folder.metrics, folder.resume):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.data, *folder.root.glob("*.png"), *folder.root.glob("*.pdf")):
        path.unlink(missing_ok=True)
    folder.settings.unlink()  # last: a sweep half cleared is still known as one


def open_sweep(config: SweepConfig, out: Path, *, force: bool = False) -> SweepFolder:
    """Make or find the folder of a sweep.

    Args:
        config: the sweep.
        out: the folder of all sweeps; this one's is `<out>/<name>-<scale>[/<variant>]`.
        force: delete what an earlier run of the sweep left there.

    Returns:
        The folder, which holds this configuration.

    Raises:
        ConfigError: the folder holds a sweep with another configuration, or something else, or
            cannot be written.
    """
    folder = sweep_folder(config, out)
    wanted = {"format": _FORMAT, **config.settings()}
    try:
        stored = read_json(folder.settings)
        if force and stored is not None:
            _clear(folder)
            stored = None
        if stored is None:
            if folder.root.exists() and any(folder.root.iterdir()):
                raise ConfigError(
                    f"{folder.root} is not empty and holds no readable sweep.json, so it is not "
                    "a sweep: empty it yourself or choose another folder with --out"
                )
            folder.root.mkdir(parents=True, exist_ok=True)
            write_json(folder.settings, wanted)
        elif _of_training(stored) != _of_training(wanted):
            raise ConfigError(
                f"{folder.root} holds this sweep with other settings: "
                f"{_differences(stored, wanted)}. Train into another folder with --out, delete "
                "the old checkpoints and scores with --force, or undo the change"
            )
        elif stored != wanted:
            write_json(folder.settings, wanted)
        for path in (folder.checkpoints, folder.metrics, folder.resume):
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder.root}: cannot write the sweep: {error.strerror or error}. Choose another "
            "folder with --out"
        ) from None
    return folder


def finished(folder: SweepFolder, network: Network) -> dict[str, Any] | None:
    """Return what `done.json` says of a run whose checkpoints are all there, else None."""
    run = folder.run(network)
    done = read_json(run / "done.json")
    if done is None:
        return None
    complete = all((run / checkpoint_name(step)).is_file() for step in done["checkpoints"])
    return done if complete else None
