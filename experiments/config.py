"""What a sweep trains: one scale of a TOML file in `experiments/configs`, validated.

Adding a setting means adding a field to `SweepConfig`, its check to `_CHECKS` and, where it
excludes others, a rule to `_combination_errors`.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.data import TRAIN_SAMPLES
from experiments.models import ACTIVATIONS, OUTPUT_ACTIVATIONS
from lipfast.errors import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FOLDER = Path(__file__).parent / "configs"


class ConfigError(ArgumentError):
    """A sweep's TOML file, or a scale of it, cannot be used; the message names file and key."""


@dataclass(frozen=True)
class SweepConfig:
    """All settings of one sweep: what is varied (widths, seeds) and what is held.

    Attributes:
        name: of the sweep, the stem of its file.
        scale: the table of the file that it comes from.
        widths: units per hidden layer, ascending.
        seeds: of the initial weights and of the order of the mini-batches.
        steps: number of updates.
        lr: peak learning rate.
        checkpoints: the steps at which checkpoints are written, ascending; 0 is the start.
        depth: number of hidden layers.
        bias: whether linear layers have biases.
        activation: after each hidden layer.
        output_activation: after the last layer.
        train_size: the first so many training samples are used.
        label_noise: fraction of the training labels redrawn uniformly.
        data_seed: of the label noise; all networks share one training set.
        loss: "cross_entropy" or "mse" (summed over classes); both averaged over the samples.
        target_scale: one-hot targets of "mse" are this large.
        optimizer: "sgd", "adam" (weight decay added to the gradient) or "adamw" (decoupled).
        momentum: of "sgd".
        weight_decay: as torch.optim defines it for the optimizer.
        schedule: "constant" or "cosine" (to zero at the last step).
        warmup_steps: linear warm-up of the learning rate over so many steps.
        batch_size: samples per update; the whole training set in the file as "full".
    """

    name: str
    scale: str
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    lr: float
    checkpoints: tuple[int, ...]
    depth: int = 1
    bias: bool = True
    activation: str = "relu"
    output_activation: str = "none"
    train_size: int = TRAIN_SAMPLES
    label_noise: float = 0.0
    data_seed: int = 0
    loss: str = "cross_entropy"
    target_scale: float = 1.0
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    batch_size: int = TRAIN_SAMPLES

    @property
    def steps_per_epoch(self) -> int:
        """Updates per pass over the training set; the last batch may be smaller."""
        return -(-self.train_size // self.batch_size)

    def settings(self) -> dict[str, Any]:
        """Every field as JSON values (tuples as lists)."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


def log_spaced_steps(steps: int, count: int) -> tuple[int, ...]:
    """Return `count` steps from 0 to `steps`: 0, 1, then in constant ratio where integers allow.

    Args:
        steps: the last one, at least 1.
        count: how many, at least 2; at most steps + 1 are returned.

    Returns:
        Ascending distinct steps, the first 0 and the last `steps`.

    Example:
        >>> log_spaced_steps(1000, 8)
        (0, 1, 3, 10, 32, 101, 318, 1000)
    """
    if count == 2:
        return (0, steps)
    chosen = [0, 1]
    for remaining in range(count - 2, 0, -1):
        current = chosen[-1]
        if current >= steps:
            break
        ratio = (steps / current) ** (1 / remaining)
        chosen.append(max(current + 1, round(current * ratio)))
    return tuple(chosen)


def _integer(minimum: int, maximum: int | None = None) -> Callable[[object], int]:
    limit = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"an integer {limit}")
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(f"an integer {limit}")
        return value

    return check


def _integers(minimum: int) -> Callable[[object], tuple[int, ...]]:
    def check(value: object) -> tuple[int, ...]:
        expected = f"a list of distinct integers, at least {minimum} each, not empty"
        if not isinstance(value, list) or not value:
            raise ValueError(expected)
        try:
            numbers = [_integer(minimum)(entry) for entry in value]
        except ValueError:
            raise ValueError(expected) from None
        if len(set(numbers)) < len(numbers):
            raise ValueError(expected)
        return tuple(sorted(numbers))

    return check


def _number(
    minimum: float, maximum: float = float("inf"), *, above: bool = False
) -> Callable[[object], float]:
    limit = f"above {minimum:g}" if above else f"at least {minimum:g}"
    limit += "" if maximum == float("inf") else f" and at most {maximum:g}"

    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"a number {limit}")
        # Written so that NaN fails; infinity is excluded by the strict comparison.
        inside = minimum < value if above else minimum <= value
        if not (inside and value <= maximum and value < float("inf")):
            raise ValueError(f"a finite number {limit}")
        return float(value)

    return check


def _choice(allowed: Iterable[str]) -> Callable[[object], str]:
    names = tuple(allowed)

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError("one of " + ", ".join(f'"{name}"' for name in names))
        return value

    return check


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _batch_size(value: object) -> int | str:
    if value == "full":
        return "full"
    try:
        return _integer(1)(value)
    except ValueError:
        raise ValueError('"full" or an integer at least 1') from None


def _checkpoints(value: object) -> int | tuple[int, ...]:
    try:
        return _integers(0)(value) if isinstance(value, list) else _integer(2)(value)
    except ValueError:
        raise ValueError(
            "a number of log-spaced checkpoints, at least 2, or a list of distinct steps"
        ) from None


_CHECKS: dict[str, Callable[[object], Any]] = {
    "widths": _integers(1),
    "seeds": _integers(0),
    "steps": _integer(1),
    "lr": _number(0, above=True),
    "checkpoints": _checkpoints,
    "depth": _integer(1),
    "bias": _boolean,
    "activation": _choice(ACTIVATIONS),
    "output_activation": _choice(OUTPUT_ACTIVATIONS),
    "train_size": _integer(1, TRAIN_SAMPLES),
    "label_noise": _number(0, 1),
    "data_seed": _integer(0),
    "loss": _choice(("cross_entropy", "mse")),
    "target_scale": _number(0, above=True),
    "optimizer": _choice(("sgd", "adam", "adamw")),
    "momentum": _number(0, 1),
    "weight_decay": _number(0),
    "schedule": _choice(("constant", "cosine")),
    "warmup_steps": _integer(0),
    "batch_size": _batch_size,
}
_REQUIRED = ("widths", "seeds", "steps", "lr", "checkpoints")


def _combination_errors(config: SweepConfig) -> Iterator[str]:
    if config.momentum and config.optimizer != "sgd":
        yield f'momentum is for optimizer = "sgd", not "{config.optimizer}"; remove one of them'
    if config.target_scale != 1 and config.loss != "mse":
        yield 'target_scale is for loss = "mse"; remove it or change loss'
    if config.warmup_steps >= config.steps:
        yield f"warmup_steps ({config.warmup_steps}) must be below steps ({config.steps})"
    if config.batch_size > config.train_size:
        yield (
            f"batch_size ({config.batch_size}) exceeds train_size ({config.train_size}); "
            'use "full" for the whole training set'
        )
    if config.checkpoints[-1] > config.steps:
        yield f"checkpoints ask for step {config.checkpoints[-1]}, beyond steps ({config.steps})"


def _unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}allowed: {', '.join(names)}"


def parse_settings(name: str, scale: str, settings: Mapping[str, object]) -> SweepConfig:
    """Check the settings of one scale and fill in what they leave out.

    Args:
        name: of the sweep.
        scale: of the sweep.
        settings: key to value, as TOML gives them.

    Returns:
        The configuration; `checkpoints` and `batch_size` as numbers.

    Raises:
        ConfigError: an unknown or missing key, a wrong value, an impossible combination; the
            message names the key and what is allowed.

    Example:
        >>> config = parse_settings("s", "tiny", {"widths": [4], "seeds": [0], "steps": 10,
        ...     "lr": 0.1, "checkpoints": 3})
        >>> config.checkpoints, config.batch_size
        ((0, 1, 10), 4000)
    """
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in _CHECKS:
            raise ConfigError(_unknown("key", key, _CHECKS))
        try:
            values[key] = _CHECKS[key](value)
        except ValueError as error:
            raise ConfigError(f"{key} = {value!r}: expected {error}") from None
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}; set in this scale or in [defaults]")
    if isinstance(values["checkpoints"], int):
        values["checkpoints"] = log_spaced_steps(values["steps"], values["checkpoints"])
    if values.get("batch_size", "full") == "full":
        values["batch_size"] = values.get("train_size", TRAIN_SAMPLES)
    config = SweepConfig(name=name, scale=scale, **values)
    for message in _combination_errors(config):
        raise ConfigError(message)
    return config


def sweep_names(folder: Path = CONFIG_FOLDER) -> list[str]:
    """Return the names of the sweeps that have a file in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def find_sweep(sweep: str) -> tuple[str, Path]:
    """Return the name of a sweep and the folder of its file.

    Args:
        sweep: the name of a file in `CONFIG_FOLDER`, or the path of any file that ends in `.toml`.

    Raises:
        ConfigError: there is no such file.

    Example:
        >>> find_sweep("double-descent")[1] == CONFIG_FOLDER
        True
    """
    if not sweep.endswith(".toml"):
        return sweep, CONFIG_FOLDER
    path = Path(sweep)
    if not path.is_file():
        raise ConfigError(f"{sweep}: no such file")
    return path.stem, path.parent


def _read(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.toml"
    if name not in sweep_names(folder):
        raise ConfigError(_unknown("sweep", name, sweep_names(folder)))
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    allowed = {"description": str, "defaults": dict, "scales": dict}
    for key, value in content.items():
        if key not in allowed:
            raise ConfigError(f"{path}: " + _unknown("key", key, allowed))
        if not isinstance(value, allowed[key]):
            expected = "a string" if allowed[key] is str else "a table"
            raise ConfigError(f"{path}: {key}: expected {expected}")
    scales = content.get("scales", {})
    if not scales or not all(isinstance(table, dict) for table in scales.values()):
        raise ConfigError(f"{path}: expected at least one table [scales.<name>]")
    return content


def describe_sweep(name: str, folder: Path = CONFIG_FOLDER) -> tuple[str, list[str]]:
    """Return the description and the names of the scales of a sweep.

    Raises:
        ConfigError: there is no such sweep or its file cannot be used.
    """
    content = _read(name, folder)
    return content.get("description", ""), list(content["scales"])


def load_config(name: str, scale: str, folder: Path = CONFIG_FOLDER) -> SweepConfig:
    """Load the configuration of one scale of the sweep in `<folder>/<name>.toml`.

    The file has the tables `[defaults]` and `[scales.<scale>]`; the latter overrides the former.

    Raises:
        ConfigError: no such sweep or scale, or a setting is wrong; the message names file, table
            and key.
    """
    content = _read(name, folder)
    path = folder / f"{name}.toml"
    if scale not in content["scales"]:
        raise ConfigError(f"{path}: " + _unknown("scale", scale, content["scales"]))
    settings = {**content.get("defaults", {}), **content["scales"][scale]}
    try:
        return parse_settings(name, scale, settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: [scales.{scale}]: {error}") from None
