"""What keys and names in a file say by their words: a network, an average of one, a state."""

from __future__ import annotations

import re
from functools import lru_cache

WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "weights"),
    *("params", "model_state", "model_weights", "net_state_dict", "generator", "netG"),
)
"""Keys under which training scripts keep the weights inside a larger dict: the first goes first."""

# Words of an average of weights over training, joined to such of a network or not: `emamodel`.
_AVERAGED = re.compile(
    r"(?:(?:model|net|network|param|weight|generator|unet)s?|g)?"
    r"(?:ema|average|averaged|avg|swa|shadow|polyak)s?"
    r"(?:(?:model|net|network|param|weight|generator|unet|state)s?)?"
)
_SECOND = frozenset(
    (
        *("teacher", "target", "critic", "value", "discriminator", "disc", "momentum"),
        *("old", "best", "init", "initial", "prev", "previous"),
    )
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_MAX_KEY_LENGTH = 128  # characters of a key that are looked at: hostile ones may have millions
_OPTIMIZERS = frozenset(
    f"{word}{plural}"
    for word in ("optimizer", "optimiser", "optim", "scheduler", "sched")
    for plural in ("", "s")
)
_STATE = {"state", "states", "dict", "dicts"}
# Keys of states that are these words and no other ones: `scaler`, but not `input_scaler`.
_ALONE = (
    ({"scaler", "scalers"}, {"grad", "gradient", "amp", "loss", "native", "fp", "16"}),
    ({"rng", "random"}, {"torch", "cuda", "cpu", "gpu", "numpy", "np", "python", "py", "xla"}),
    ({"opt", "opts", "amp", "callbacks", "loops"}, set[str]()),
)


def words_of(key: str) -> tuple[str, ...]:
    """The words of a key in lower case, whatever parts them.

    Example:
        >>> words_of("netEMA"), words_of("params-ema"), words_of("emaModel2"), words_of("optimal")
        (('net', 'ema'), ('params', 'ema'), ('ema', 'model', '2'), ('optimal',))
    """
    return _words(key[:_MAX_KEY_LENGTH])


@lru_cache(maxsize=1 << 12)  # of short texts: it must not keep what hostile files hold
def _words(key: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _WORD.findall(key))


def is_state(key: str) -> bool:
    """Whether a key names the state of an optimizer, a scheduler or a generator, by whole words.

    Example:
        >>> [is_state(key) for key in ("optimizer_g", "scaler", "rng_state", "optimal", "upscaler")]
        [True, True, True, False, False]
    """
    words = set(words_of(key))
    if words & _OPTIMIZERS:
        return True
    rest = {word for word in words - _STATE if not word.isdigit() or word == "16"}
    return any(rest & some and rest <= some | others for some, others in _ALONE)


def standing(prefix: str) -> tuple[int, int]:
    """The documented order of networks: raw before second ones before averages; by `WRAPPERS`.

    Those that nothing precedes come after `WRAPPERS`, and before other keys.

    Example:
        >>> sorted(["ema.", "teacher.", "student.", "", "model."], key=standing)
        ['model.', '', 'student.', 'teacher.', 'ema.']
    """
    keys = prefix.strip(".").split(".")
    words = [words_of(key) for key in keys]
    if any(_AVERAGED.fullmatch(word) for one in words for word in one):
        rank = 2
    else:
        rank = int(any(not _SECOND.isdisjoint(one) or _is_second_net(one) for one in words))
    in_order = WRAPPERS.index(keys[0]) if keys[0] in WRAPPERS else len(WRAPPERS) + bool(keys[0])
    return rank, in_order


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key to sort by: numbers in names count as numbers.

    Example:
        >>> sorted(["net10", "net2"], key=natural)
        ['net2', 'net10']
    """
    parts = re.split(r"(\d+)", name)
    # a number's length first; int() refuses very long ones
    return tuple(
        (len(digits), digits) if odd % 2 else (0, part)
        for odd, part in enumerate(parts)
        for digits in [part.lstrip("0")]
    )


def _is_second_net(words: tuple[str, ...]) -> bool:
    named = tuple(word for word in words if not word.isdigit())
    return named in (("d",), ("net", "d"))
