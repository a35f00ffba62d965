"""Studies: the TOML files in `experiments/configs`, each with scales, and variants of them.

A file has the tables `[defaults]`, `[scales.<scale>]`, `[variants.<variant>]` and
`[scales.<scale>.variants.<variant>]`; of one key the last of them counts. Each variant is a sweep.
`uses` names studies whose sweeps, at the same scale, it evaluates.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import SweepConfig
from experiments.errors import ConfigError, unknown
from experiments.settings import parse_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FOLDER = Path(__file__).parent / "configs"
_SCALE_TABLES = ("variants", "uses")


@dataclass(frozen=True)
class Study:
    """One scale of a study.

    Attributes:
        name: the stem of its file.
        scale: which scale.
        description: what is asked, a line.
        sweeps: its own sweeps, one per variant, in the order of the file; none where it only
            evaluates those of others.
        uses: names of the studies whose sweeps it evaluates, too.
    """

    name: str
    scale: str
    description: str
    sweeps: tuple[SweepConfig, ...]
    uses: tuple[str, ...]


def sweep_names(folder: Path = CONFIG_FOLDER) -> list[str]:
    """Return the names of the studies that have a file in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def find_sweep(sweep: str) -> tuple[str, Path]:
    """Return the name of a study and the folder of its file.

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


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_tables(path: Path, content: dict[str, Any]) -> None:
    allowed = {"description": str, "defaults": dict, "scales": dict, "variants": dict, "uses": list}
    for key, value in content.items():
        if key not in allowed:
            raise ConfigError(f"{path}: " + unknown("key", key, allowed))
        if not isinstance(value, allowed[key]):
            expected = {str: "a string", dict: "a table", list: "a list of names"}[allowed[key]]
            raise ConfigError(f"{path}: {key}: expected {expected}")
    scales = content.get("scales", {})
    if not scales or not all(isinstance(table, dict) for table in scales.values()):
        raise ConfigError(f"{path}: expected at least one table [scales.<name>]")
    places = {"": content, **{f"scales.{name}.": table for name, table in scales.items()}}
    for place, table in places.items():
        if not _is_names(table.get("uses", [])):
            raise ConfigError(f"{path}: {place}uses: expected a list of names of studies")
        variants = table.get("variants", {})
        if not isinstance(variants, dict) or not all(
            isinstance(v, dict) for v in variants.values()
        ):
            raise ConfigError(f"{path}: {place}variants: expected tables [{place}variants.<name>]")


def _read(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.toml"
    if name not in sweep_names(folder):
        raise ConfigError(unknown("sweep", name, sweep_names(folder)))
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    _check_tables(path, content)
    return content


def describe_sweep(name: str, folder: Path = CONFIG_FOLDER) -> tuple[str, list[str]]:
    """Return the description and the names of the scales of a study.

    Raises:
        ConfigError: there is no such study or its file cannot be used.
    """
    content = _read(name, folder)
    return content.get("description", ""), list(content["scales"])


def _parsed(path: Path, scale: str, variant: str, settings: dict[str, Any]) -> SweepConfig:
    try:
        return parse_settings(path.stem, scale, settings, variant)
    except ConfigError as error:
        place = f"scales.{scale}" + (f", variant {variant}" if variant else "")
        raise ConfigError(f"{path}: [{place}]: {error}") from None


def load_study(name: str, scale: str, folder: Path = CONFIG_FOLDER) -> Study:
    """Load one scale of the study in `<folder>/<name>.toml`.

    The variants are those that the scale names, in `[scales.<scale>.variants.<variant>]`, or else
    all of `[variants]`.

    Raises:
        ConfigError: no such study or scale, or a setting is wrong; the message names file, table
            and key.

    Example:
        >>> [sweep.variant for sweep in load_study("double-descent", "demo").sweeps]
        ['']
    """
    content = _read(name, folder)
    path = folder / f"{name}.toml"
    if scale not in content["scales"]:
        raise ConfigError(f"{path}: " + unknown("scale", scale, content["scales"]))
    table = content["scales"][scale]
    uses = tuple(table.get("uses", content.get("uses", [])))
    for used in uses:
        if used not in sweep_names(folder):
            raise ConfigError(f"{path}: uses: " + unknown("study", used, sweep_names(folder)))
    own = {key: value for key, value in table.items() if key not in _SCALE_TABLES}
    common = content.get("variants", {})
    chosen = table.get("variants") or common
    variants = {key: {**common.get(key, {}), **settings} for key, settings in chosen.items()}
    if not variants and (own or not uses):
        variants = {"": {}}
    shared = {**content.get("defaults", {}), **own}
    sweeps = [
        _parsed(path, scale, variant, {**shared, **settings})
        for variant, settings in variants.items()
    ]
    return Study(name, scale, content.get("description", ""), tuple(sweeps), uses)


def studies_of(study: Study, folder: Path = CONFIG_FOLDER) -> list[Study]:
    """Return the studies that a study uses, directly or not, each once, and itself as the last.

    Raises:
        ConfigError: one of them cannot be loaded, or two use one another.
    """
    found: dict[str, Study] = {}

    def add(one: Study, above: tuple[str, ...]) -> None:
        if one.name in above:
            raise ConfigError(f"{folder / one.name}.toml: uses: the studies use one another")
        for name in one.uses:
            if name not in found:
                add(load_study(name, one.scale, folder), (*above, one.name))
        found[one.name] = one

    add(study, ())
    return list(found.values())


def load_config(name: str, scale: str, folder: Path = CONFIG_FOLDER) -> SweepConfig:
    """Load the only sweep of one scale of a study.

    Raises:
        ConfigError: as `load_study`, or the scale has no sweep of its own, or several.
    """
    sweeps = load_study(name, scale, folder).sweeps
    if len(sweeps) != 1:
        raise ConfigError(
            f"{folder / name}.toml: scale '{scale}' has {len(sweeps)} sweeps of its own; name one"
        )
    return sweeps[0]
