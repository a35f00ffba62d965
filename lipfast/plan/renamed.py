"""Names in state dicts: further ones of a tensor, as of weight norm, and those of no operand."""

from __future__ import annotations

import re

# What either parametrisation of torch calls the parts of a weight: (now, before).
_SPELLINGS = (
    ("original0", "g"),
    ("original1", "v"),
    ("original", "orig"),
    ("0._u", "u"),
    ("0._v", "v"),
)
_NOW = re.compile(r"(?P<module>(?:.*\.)?)parametrizations\.(?P<name>\w+)\.(?P<part>.+)\Z")
_BEFORE = re.compile(r"(?P<module>(?:.*\.)?)(?P<name>\w+?)_(?P<part>g|v|u|orig)\Z")
_LAYER_NORM = {"weight": "gamma", "bias": "beta"}
_COUNT_OF_BATCHES = "num_batches_tracked"


def loaded_names(name: str) -> tuple[str, ...]:
    """Other names in a state dict that torch's `load_state_dict` takes for a parameter.

    These are `weight_g` and `weight_v` of `torch.nn.utils.weight_norm`, for a module that has the
    parametrization of the same name.

    Example:
        >>> loaded_names("0.parametrizations.weight.original0"), loaded_names("0.weight")
        (('0.weight_g',), ())
    """
    found = _NOW.fullmatch(name)
    if found is None or not found["part"].startswith("original") or found["part"] == "original":
        return ()
    return _before(found)


def equivalent_names(name: str) -> tuple[str, ...]:
    """Other names under which checkpoints keep a parameter, whoever renames it.

    Beside `loaded_names` these are weight norm the other way, spectral norm both ways (eval mode
    evaluates both alike), and `gamma` and `beta` of old layer norms.

    Example:
        >>> equivalent_names("0.weight_v"), equivalent_names("norm.bias")
        (('0.parametrizations.weight.original1', '0.parametrizations.weight.0._v'), ('norm.beta',))
    """
    now, before = _NOW.fullmatch(name), _BEFORE.fullmatch(name)
    if now is not None:
        return _before(now)
    module, _, last = name.rpartition(".")
    if last in _LAYER_NORM:
        return (f"{module}.{_LAYER_NORM[last]}",) if module else ()
    if before is None:
        return ()
    stem = f"{before['module']}parametrizations.{before['name']}"
    return tuple(f"{stem}.{new}" for new, old in _SPELLINGS if old == before["part"])


def is_counter(name: str) -> bool:
    """Whether it counts the batches of a BatchNorm: old files lack it, and eval never reads it."""
    return name.rpartition(".")[2] == _COUNT_OF_BATCHES


def is_extra_state(name: str) -> bool:
    """Whether an entry is what `Module.get_extra_state` gave: of any kind, and no operand."""
    return name.rpartition(".")[2] == "_extra_state"


def _before(found: re.Match[str]) -> tuple[str, ...]:
    olds = [old for new, old in _SPELLINGS if new == found["part"]]
    return tuple(f"{found['module']}{found['name']}_{old}" for old in olds)
