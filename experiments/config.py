"""What a sweep trains: the settings of one scale, and one variant, of a study; validated.

Adding a setting means adding a field to `SweepConfig`, its check to `_CHECKS` and, where it
excludes others, a rule to `_combination_errors`. `experiments.study` reads the TOML files.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.data.label_noise import KINDS
from experiments.data.registry import DATA_SETS
from experiments.losses import LOSSES
from experiments.models import ACTIVATIONS, MODELS, OUTPUT_ACTIVATIONS
from experiments.models.resnet import DEPTHS
from experiments.optimizers import OPTIMIZERS
from experiments.schedules import SCHEDULE_EPOCHS, SCHEDULES
from lipfast.errors import ArgumentError


class ConfigError(ArgumentError):
    """A sweep's TOML file, or a scale of it, cannot be used; the message names file and key."""


@dataclass(frozen=True)
class SweepConfig:
    """All settings of one sweep: what is varied (widths, seeds) and what is held.

    Attributes:
        name: of the study, the stem of its file.
        scale: the table of the file that it comes from.
        widths: units per hidden layer ("fcn"), channels of the first layer ("cnn", "resnet"),
            features of a token ("vit"); ascending.
        seeds: of the initial weights, the order of the mini-batches and dropout.
        steps: largest number of updates; 0 for the networks at initialisation.
        lr: peak learning rate.
        checkpoints: the steps at which checkpoints are written, ascending; 0 is the start.
        variant: of the scale; "" where it has none.
        model: "fcn", "cnn", "resnet" or "vit".
        depth: number of hidden layers ("fcn"), of layers ("resnet"), of blocks ("vit").
        bias: whether linear layers and convolutions have biases ("fcn", "cnn").
        activation: after each hidden layer ("fcn").
        output_activation: after the last layer ("fcn").
        patch: height and width of a patch ("vit").
        heads: of the attention ("vit").
        head_features: of each head ("vit").
        dropout: probability.
        data: name of the data set.
        data_folder: of the data's files, where they are the user's.
        image_size: images are averaged down to it ("image_folder": resized).
        classes: number of classes.
        train_size: the first so many training samples are used.
        label_noise: fraction of the training labels that are disturbed.
        label_noise_kind: "redraw", "shuffle" or "swap", see `with_label_noise`.
        data_seed: of the label noise; all networks share one training set.
        loss: "cross_entropy", "mse" (summed over classes) or "nll" (of a softmax output);
            averaged over the samples.
        target_scale: one-hot targets of "mse" are this large.
        optimizer: "sgd", "adam" (weight decay added to the gradient), "adamw" (decoupled).
        momentum: of "sgd".
        weight_decay: as torch.optim defines it for the optimizer.
        schedule: "constant", "cosine" (to zero at the last step), "step25" or "cont".
        schedule_epochs: of "step25" and "cont".
        warmup_steps: linear warm-up of the learning rate over so many steps.
        batch_size: samples per update; the whole training set in the file as "full".
        min_epochs: training is not stopped before.
        stop_gradient_norm: training stops when the gradient of the loss over all training
            samples has at most this norm; 0: never.
        stop_train_loss: training stops when the training loss is at most this; 0: never.
        stop_every: the two are looked at after every so many epochs.
        spectral_constraint: after every update each weight matrix is scaled to at most this
            spectral norm; 0: not.
        lipschitz_penalty: this times the largest Jacobian norm over some samples is added to the
            loss; 0: not.
        penalty_samples: how many, the first of each mini-batch.
        path_length: whether the lengths of all updates are added up.
        log_points: metrics are logged at so many log-spaced steps, beside the checkpoints'.
    """

    name: str
    scale: str
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    lr: float
    checkpoints: tuple[int, ...]
    variant: str = ""
    model: str = "fcn"
    depth: int = 1
    bias: bool = True
    activation: str = "relu"
    output_activation: str = "none"
    patch: int = 8
    heads: int = 6
    head_features: int = 64
    dropout: float = 0.0
    data: str = "mnist1d"
    data_folder: str = ""
    image_size: int = 0
    classes: int = 10
    train_size: int = 4000
    label_noise: float = 0.0
    label_noise_kind: str = "redraw"
    data_seed: int = 0
    loss: str = "cross_entropy"
    target_scale: float = 1.0
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    schedule_epochs: int = 0
    warmup_steps: int = 0
    batch_size: int = 4000
    min_epochs: int = 0
    stop_gradient_norm: float = 0.0
    stop_train_loss: float = 0.0
    stop_every: int = 1
    spectral_constraint: float = 0.0
    lipschitz_penalty: float = 0.0
    penalty_samples: int = 16
    path_length: bool = False
    log_points: int = 0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample of the data, averaged down."""
        shape = DATA_SETS[self.data].shape
        return (shape[0], self.image_size, self.image_size) if len(shape) == 3 else shape

    @property
    def logged_steps(self) -> tuple[int, ...]:
        """Steps at which metrics are logged: the checkpoints', and log-spaced ones."""
        spaced = log_spaced_steps(self.steps, self.log_points) if self.log_points > 1 else ()
        return tuple(sorted({*self.checkpoints, *spaced}))

    @property
    def stops_early(self) -> bool:
        """Whether training may end before the last step."""
        return self.stop_gradient_norm > 0 or self.stop_train_loss > 0

    def architecture(self) -> dict[str, Any]:
        """Return the model's arguments but for the width."""
        if self.model == "fcn":
            return {
                "depth": self.depth,
                "inputs": math.prod(self.sample_shape),
                "classes": self.classes,
                "bias": self.bias,
                "activation": self.activation,
                "output_activation": self.output_activation,
                "dropout": self.dropout,
            }
        images = {
            "channels": self.sample_shape[0],
            "image_size": self.image_size,
            "classes": self.classes,
            "dropout": self.dropout,
        }
        own: dict[str, dict[str, Any]] = {
            "cnn": {"bias": self.bias},
            "resnet": {"depth": self.depth},
            "vit": {
                "depth": self.depth,
                "heads": self.heads,
                "head_features": self.head_features,
                "patch": self.patch,
            },
        }
        return {**images, **own[self.model]}

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
        steps: the last one; 0 gives (0,).
        count: how many, at least 2; at most steps + 1 are returned.

    Returns:
        Ascending distinct steps, the first 0 and the last `steps`.

    Example:
        >>> log_spaced_steps(1000, 8)
        (0, 1, 3, 10, 32, 101, 318, 1000)
    """
    if count == 2 or steps == 0:
        return (0, steps)[: steps + 1]
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


def _optimizer(value: object) -> str:
    return _choice(OPTIMIZERS)(value)  # those that are registered by now


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


_CHECKS: dict[str, Callable[[object], Any]] = {
    "widths": _integers(1),
    "seeds": _integers(0),
    "steps": _integer(0),
    "epochs": _integer(1),
    "lr": _number(0, above=True),
    "checkpoints": _checkpoints,
    "model": _choice(MODELS),
    "depth": _integer(1),
    "bias": _boolean,
    "activation": _choice(ACTIVATIONS),
    "output_activation": _choice(OUTPUT_ACTIVATIONS),
    "patch": _integer(1),
    "heads": _integer(1),
    "head_features": _integer(1),
    "dropout": _number(0, 0.99),
    "data": _choice(DATA_SETS),
    "data_folder": _text,
    "image_size": _integer(1),
    "classes": _integer(2),
    "train_size": _integer(1),
    "label_noise": _number(0, 1),
    "label_noise_kind": _choice(KINDS),
    "data_seed": _integer(0),
    "loss": _choice(LOSSES),
    "target_scale": _number(0, above=True),
    "optimizer": _optimizer,
    "momentum": _number(0, 1),
    "weight_decay": _number(0),
    "schedule": _choice(SCHEDULES),
    "schedule_epochs": _integer(1),
    "warmup_steps": _integer(0),
    "batch_size": _batch_size,
    "min_epochs": _integer(0),
    "stop_gradient_norm": _number(0),
    "stop_train_loss": _number(0),
    "stop_every": _integer(1),
    "spectral_constraint": _number(0),
    "lipschitz_penalty": _number(0),
    "penalty_samples": _integer(1),
    "path_length": _boolean,
    "log_points": _integer(0),
}
_REQUIRED = ("widths", "seeds", "steps", "lr", "checkpoints")
# Keys of one model only, and those models.
_MODEL_KEYS = {
    "bias": ("fcn", "cnn"),
    "activation": ("fcn",),
    "output_activation": ("fcn",),
    "depth": ("fcn", "resnet", "vit"),
    "patch": ("vit",),
    "heads": ("vit",),
    "head_features": ("vit",),
}
_DEPTHS = {"fcn": 1, "cnn": 1, "resnet": 20, "vit": 6}


def _model_errors(config: SweepConfig, given: Iterable[str]) -> Iterator[str]:
    for key in given:
        models = _MODEL_KEYS.get(key, (config.model,))
        if config.model not in models:
            yield f'{key} is for model = "{models[0]}", not "{config.model}"; remove it'
    flat = len(DATA_SETS[config.data].shape) == 1
    if config.model != "fcn" and flat:
        yield f'model = "{config.model}" needs images; data = "{config.data}" has none'
    if config.model == "resnet" and config.depth not in DEPTHS:
        yield f"depth = {config.depth}: a resnet has one of {', '.join(map(str, DEPTHS))}"
    if config.model == "cnn" and config.image_size < 4:
        yield f"image_size = {config.image_size}: a cnn needs at least 4"
    if config.model == "vit" and config.image_size % config.patch:
        yield f"patch = {config.patch} does not divide image_size ({config.image_size})"
    if config.spectral_constraint and config.model != "fcn":
        yield f'spectral_constraint is for model = "fcn", not "{config.model}"; remove it'
    if config.lipschitz_penalty and config.model == "resnet":
        yield 'lipschitz_penalty is not for model = "resnet"; remove it'


def _data_errors(config: SweepConfig, given: Iterable[str]) -> Iterator[str]:
    known = DATA_SETS[config.data]
    if known.train_samples is not None and config.train_size > known.train_samples:
        yield (
            f"train_size = {config.train_size}: expected an integer from 1 to {known.train_samples}"
        )
    if known.needs_folder and not config.data_folder:
        yield f'data_folder is missing: where the files of data = "{config.data}" are'
    if not known.needs_folder and config.data_folder:
        yield f'data_folder: data = "{config.data}" needs none; remove it'
    if known.classes is not None and config.classes != known.classes:
        yield f'classes = {config.classes}: data = "{config.data}" has {known.classes}'
    size = known.shape[-1]
    if len(known.shape) == 1 and "image_size" in given:
        yield f'image_size: data = "{config.data}" has no images; remove it'
    elif len(known.shape) == 3 and size and size % config.image_size:
        yield f"image_size = {config.image_size}: the images' {size} is no multiple of it"


def _combination_errors(config: SweepConfig, given: Iterable[str]) -> Iterator[str]:
    yield from _model_errors(config, given)
    yield from _data_errors(config, given)
    if config.momentum and config.optimizer != "sgd":
        yield f'momentum is for optimizer = "sgd", not "{config.optimizer}"; remove one of them'
    if config.target_scale != 1 and config.loss != "mse":
        yield 'target_scale is for loss = "mse"; remove it or change loss'
    if config.loss == "nll" and config.output_activation != "softmax":
        yield 'loss = "nll" needs output_activation = "softmax"'
    if config.warmup_steps >= max(config.steps, 1):
        yield f"warmup_steps ({config.warmup_steps}) must be below steps ({config.steps})"
    if "schedule_epochs" in given and config.schedule not in SCHEDULE_EPOCHS:
        yield f'schedule_epochs is not for schedule = "{config.schedule}"; remove it'
    if config.batch_size > config.train_size:
        yield (
            f"batch_size ({config.batch_size}) exceeds train_size ({config.train_size}); "
            'use "full" for the whole training set'
        )
    if config.checkpoints[-1] > config.steps:
        yield f"checkpoints ask for step {config.checkpoints[-1]}, beyond steps ({config.steps})"
    if config.min_epochs and not config.stops_early:
        yield "min_epochs needs stop_gradient_norm or stop_train_loss"
    if config.min_epochs * config.steps_per_epoch > config.steps:
        yield f"min_epochs ({config.min_epochs}) are more than the steps ({config.steps})"


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Say that a name is unknown, which one is close to it, and what is allowed."""
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}allowed: {', '.join(names)}"


def _filled_in(values: dict[str, Any]) -> dict[str, Any]:
    """Put in those defaults that depend on other settings, and numbers for what they stand for."""
    known = DATA_SETS[values.get("data", "mnist1d")]
    values.setdefault("train_size", known.train_samples or 1)
    values.setdefault("classes", known.classes or 2)
    if len(known.shape) == 3:
        values.setdefault("image_size", known.shape[-1] or 224)
    values.setdefault("depth", _DEPTHS[values.get("model", "fcn")])
    if values.get("batch_size", "full") == "full":
        values["batch_size"] = values["train_size"]
    values.setdefault("schedule_epochs", SCHEDULE_EPOCHS.get(values.get("schedule", ""), 0))
    if "epochs" in values:
        values["steps"] = values.pop("epochs") * -(-values["train_size"] // values["batch_size"])
    return values


def parse_settings(
    name: str, scale: str, settings: Mapping[str, object], variant: str = ""
) -> SweepConfig:
    """Check the settings of one sweep and fill in what they leave out.

    Args:
        name: of the study.
        scale: of the study.
        settings: key to value, as TOML gives them.
        variant: of the scale.

    Returns:
        The configuration; `checkpoints` and `batch_size` as numbers, `epochs` as `steps`.

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
            raise ConfigError(unknown("key", key, _CHECKS))
        try:
            values[key] = _CHECKS[key](value)
        except ValueError as error:
            raise ConfigError(f"{key} = {value!r}: expected {error}") from None
    if "steps" in values and "epochs" in values:
        raise ConfigError("steps and epochs exclude one another; remove one of them")
    given = tuple(values)
    values = _filled_in(values)
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}; set in this scale or in [defaults]")
    if isinstance(values["checkpoints"], int):
        values["checkpoints"] = log_spaced_steps(values["steps"], values["checkpoints"])
    config = SweepConfig(name=name, scale=scale, variant=variant, **values)
    for message in _combination_errors(config, given):
        raise ConfigError(message)
    return config
