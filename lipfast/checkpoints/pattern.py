"""Metadata from a checkpoint's path: by a pattern that the user gives, or by common custom."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache

from lipfast.checkpoints.metadata import Scalar, parse_value
from lipfast.errors import ArgumentError

_TYPES = {
    "": r"[^/]+?",
    "s": r"[^/]+?",
    "d": r"[+-]?\d+",
    "f": r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?",
    "path": r".+?",
}
_TOKEN = re.compile(r"\{(?P<name>\w*)(?::(?P<type>\w*))?\}|(?P<any>\*\*/?)|(?P<some>\*)")
_MAX_DIGITS = 18  # of a number in a path: fits into 64 bits
_STEPS = "steps?|iters?|iterations?|checkpoint|ckpt"
_EPOCHS = "epochs?|ep"
_NUMBER = rf"(?:{_STEPS}|{_EPOCHS})[-_=]?\d+[kKM]?"
# epoch=3-step=100.ckpt, step_000100.pt, checkpoint-500/, ckpt100k.pth, epoch_3_step_100.pt
_CUSTOM = re.compile(
    rf"(?<![A-Za-z])(?P<key>{_STEPS}|{_EPOCHS})[-_=]?(?P<number>\d+(?:\.\d+)?)(?P<unit>[kKM]?)"
    rf"(?:(?!\w)|(?=_{_NUMBER}))"
    # ... or at the end: net_e10.pt
    r"|(?<=[-_.])(?P<last>e)(?P<last_number>\d+)\Z",
    re.IGNORECASE,
)
# model_0004999.pth, 0050000.pt: zeros in front make it a counter
_COUNTER = re.compile(
    r"(?:(?:.*[-_.])?(?:model|net|network|weights|state|snapshot|ckpt|checkpoint|iter)[-_])?"
    r"(?P<number>0\d{4,})",
    re.IGNORECASE,
)
# rl_model_1000_steps.pt, net_10epochs.pt; of pix2pix 10_net_G.pth
_BEHIND = re.compile(
    rf"(?<![A-Za-z\d.])(?P<number>\d+)(?P<unit>[kKM]?)[-_]?(?P<key>steps|iters|iterations|{_EPOCHS})"
    r"(?!\w)|\A(?P<epoch>\d+)_net_",
    re.IGNORECASE,
)
# Words before a key whose number is a setting: steps_per_epoch_10, max_steps_1000.
_SETTING = re.compile(
    r"(?<![A-Za-z])(?:per|max|min|num|n|total|of|warmup|decay|every|save|log|eval)[-_]\Z",
    re.IGNORECASE,
)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
# What trainers call the folders of one run's checkpoints, and those of one checkpoint.
_LEVEL = re.compile(
    rf"checkpoints?|ckpts?|(?:(?:checkpoint|ckpt|global)[-_]?)?{_NUMBER}(?:[-_,]{_NUMBER})*(?:\.ckpt)?"
    r"|[^/]*\.ckpt|mp_rank_\d+(?:_\d+)?|pytorch_model_fsdp_\d+",
    re.IGNORECASE,
)


class Pattern:
    """A path with fields: `{run}/step_{step:d}.pt`.

    Fields are `{name}` (part of one folder or file name), `{name:d}` (an integer), `{name:f}` (a
    number), `{name:path}` (may hold slashes); `{}` matches and is dropped; `*` matches within a
    name, `**` across folders. The pattern describes the end of a path, from the start of a name.

    Raises:
        ArgumentError: it has no field, one twice, or a field of an unknown type.

    Example:
        >>> pattern = Pattern("w{width:d}/step_{step:d}.pt")
        >>> pattern.match("/runs/w64/step_000100.pt")
        {'width': 64, 'step': 100}
        >>> pattern.match("/runs/w64/last.pt") is None
        True
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.keys: dict[str, str] = {}
        pieces: list[str] = []
        at = 0
        for token in _TOKEN.finditer(text):
            pieces += [re.escape(text[at : token.start()]), self._piece(token)]
            at = token.end()
        rest = text[at:]
        if not self.keys or any(c in re.sub(_TOKEN, "", text) for c in "{}"):
            raise ArgumentError(
                f"pattern '{text}': expected fields such as {{run}} or {{step:d}}, for instance "
                "'{run}/step_{step:d}.pt'"
            )
        self._regex = re.compile(f"(?:^|.*?/){''.join(pieces)}{re.escape(rest)}", re.DOTALL)

    def _piece(self, token: re.Match[str]) -> str:
        if token["any"]:
            return "(?:.*/)?" if token["any"].endswith("/") else ".*"
        if token["some"]:
            return "[^/]*"
        name, kind = token["name"], token["type"] or ""
        if kind not in _TYPES:
            raise ArgumentError(
                f"pattern '{self.text}': unknown type ':{kind}' of '{name}'; known are :d "
                "(integer), :f (number), :s (text) and :path (text with slashes)"
            )
        if not name:
            return f"(?:{_TYPES[kind]})"
        if name in self.keys or not name.isidentifier():
            raise ArgumentError(f"pattern '{self.text}': the field '{name}' twice, or no name")
        self.keys[name] = kind
        return f"(?P<{name}>{_TYPES[kind]})"

    def match(self, path: str) -> dict[str, Scalar] | None:
        """Return the fields of a path; None where the pattern does not describe it."""
        found = self._regex.fullmatch(path)
        if found is None:
            return None
        return {name: _field_value(found[name], kind) for name, kind in self.keys.items()}


def _field_value(text: str, kind: str) -> Scalar:
    if kind == "d" and len(text) <= _MAX_DIGITS:
        return int(text)
    if kind == "f":
        return float(text)
    return parse_value(text) if kind == "" else text


def customary_path(path: str) -> dict[str, Scalar]:
    """Step and epoch as a path spells them; the file's name goes before the folders'.

    Folders count as long as their names say nothing else, such as `checkpoint-500`.

    Example:
        >>> customary_path("/runs/epoch=1-step=20.ckpt/checkpoint/mp_rank_00_model_states.pt")
        {'epoch': 1, 'step': 20}
    """
    *folders, name = path.split("/")
    found = customary(name[: name.rfind(".")] if "." in name[1:] else name)
    for folder in reversed(folders):
        if not is_level(folder):
            break
        found = {**customary(folder), **found}
    return found


@lru_cache(maxsize=1 << 12)
def customary(name: str) -> dict[str, Scalar]:
    """Step and epoch as common file and folder names spell them.

    Args:
        name: of a file, without its ending, or of a folder.

    Example:
        >>> customary("epoch=3-step=100.ckpt"), customary("checkpoint-500"), customary("ckpt_20k")
        ({'epoch': 3, 'step': 100}, {'step': 500}, {'step': 20000})
        >>> customary("resnet50.pt"), customary("steps_per_epoch_10_step_5"), customary("ckpt_1.5M")
        ({}, {'step': 5}, {'step': 1500000})
    """
    found: dict[str, Scalar] = {}
    matches = [m for m in _CUSTOM.finditer(name) if not _SETTING.search(name[: m.start()])]
    # beside one of them, several are how many there are in all: epochs_100_step_5
    single = [m for m in matches if not (m["key"] or m["last"]).lower().endswith("s")]
    for match in single or matches:
        _add(
            found,
            match["key"] or match["last"],
            match["number"] or match["last_number"],
            match["unit"],
        )
    for match in _BEHIND.finditer(name) if not found else ():
        _add(found, match["key"] or "epoch", match["number"] or match["epoch"], match["unit"])
    counter = _COUNTER.fullmatch(name) if not found else None
    if counter is not None:
        _add(found, "step", counter["number"], None)
    return found


def _add(found: dict[str, Scalar], key: str, number: str, unit: str | None) -> None:
    if len(number) > _MAX_DIGITS:
        return
    word = "epoch" if key.lower().startswith("e") else "step"
    value = Decimal(number) * _UNITS[(unit or "").lower()]
    if value == int(value):
        found[word] = int(value)
    elif word == "epoch":
        found[word] = float(value)


@lru_cache(maxsize=1 << 12)
def is_level(folder: str) -> bool:
    """Whether a folder's name is none of a run: that of one checkpoint, or where a run has them.

    Example:
        >>> [is_level(name) for name in ("checkpoint-500", "global_step100", "checkpoints", "w64")]
        [True, True, True, False]
    """
    return _LEVEL.fullmatch(folder) is not None


@lru_cache(maxsize=1 << 12)
def run_folder(folder: str) -> str:
    """Name a run by its folder, without the levels that trainers add below it.

    Example:
        >>> run_folder("bert/checkpoint-500"), run_folder("logs/version_0/checkpoints")
        ('bert', 'logs/version_0')
    """
    parts = folder.split("/")
    while len(parts) > 1 and is_level(parts[-1]):
        parts.pop()
    return "/".join(parts)
