"""The settings of a sweep, from the keys of a TOML file: checked, and gaps filled in.

`experiments.study` reads the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from experiments.checks import AtLeast, Described, checked
from experiments.combinations import combination_errors
from experiments.config import SweepConfig
from experiments.data.registry import DATA_SETS
from experiments.errors import ConfigError, unknown
from experiments.models import model_arguments
from experiments.schedules import SCHEDULE_EPOCHS
from experiments.spacing import log_spaced_steps


class _Written(TypedDict, total=False):
    """Keys of a file that are written otherwise than the settings which they give."""

    epochs: Annotated[int, AtLeast(1)]
    batch_size: Literal["full"] | Annotated[int, AtLeast(1)]
    checkpoints: Annotated[
        Annotated[int, AtLeast(2)] | Annotated[tuple[int, ...], AtLeast(0)],
        Described("a number of log-spaced checkpoints, at least 2, or a list of distinct steps"),
    ]


_BY_PLACE = ("name", "scale", "variant")  # where the keys stand says these
_TYPES: dict[str, Any] = {
    key: kind
    for key, kind in {
        **get_type_hints(SweepConfig, include_extras=True),
        **get_type_hints(_Written, include_extras=True),
    }.items()
    if key not in _BY_PLACE
}
_REQUIRED = [
    field.name
    for field in dataclasses.fields(SweepConfig)
    if field.default is dataclasses.MISSING and field.name not in _BY_PLACE
]


def _filled_in(values: dict[str, Any]) -> dict[str, Any]:
    """Put in those defaults that depend on other settings, and numbers for what they stand for."""
    known = DATA_SETS[values.get("data", "mnist1d")]
    values.setdefault("train_size", known.train_samples or 1)
    values.setdefault("classes", known.classes or 2)
    if len(known.shape) == 3:
        values.setdefault("image_size", known.shape[-1] or 224)
    values.setdefault("depth", model_arguments(values.get("model", "fcn")).get("depth", 1))
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
        if key not in _TYPES:
            raise ConfigError(unknown("key", key, _TYPES))
        try:
            values[key] = checked(_TYPES[key], value)
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
    for message in combination_errors(config, given):
        raise ConfigError(message)
    return config
