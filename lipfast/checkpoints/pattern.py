"""Metadata from a checkpoint's path: by a pattern that the user gives, or by common custom."""

from __future__ import annotations

import re
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
# epoch=3-step=100.ckpt, step_000100.pt, checkpoint-500/, ckpt100.pth
_CUSTOM = re.compile(
    r"(?<![A-Za-z])(?P<key>step|epoch|iter|iteration|checkpoint|ckpt)[-_=]?(?P<number>\d+)(?!\w)",
    re.IGNORECASE,
)
_MEANING = {"checkpoint": "step", "ckpt": "step", "iter": "step", "iteration": "step"}
_STEP_FOLDER = re.compile(r"(checkpoint|ckpt|step|epoch|iter)[-_=]?\d+", re.IGNORECASE)


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


def customary_folder(name: str) -> dict[str, Scalar]:
    """Step and epoch where a folder's name says nothing else, such as `checkpoint-500`."""
    return customary(name) if _STEP_FOLDER.fullmatch(name) else {}


@lru_cache(maxsize=1 << 12)
def customary(name: str) -> dict[str, Scalar]:
    """Step and epoch as common file and folder names spell them.

    Args:
        name: of a file or a folder.

    Example:
        >>> customary("epoch=3-step=100.ckpt"), customary("checkpoint-500")
        ({'epoch': 3, 'step': 100}, {'step': 500})
        >>> customary("resnet50.pt")
        {}
    """
    found: dict[str, Scalar] = {}
    for match in _CUSTOM.finditer(name):
        key = match["key"].lower()
        if len(match["number"]) <= _MAX_DIGITS:
            found[_MEANING.get(key, key)] = int(match["number"])
    return found


def run_folder(folder: str) -> str:
    """Name a run by its folder, without the levels that trainers add below it.

    Example:
        >>> run_folder("bert/checkpoint-500"), run_folder("logs/version_0/checkpoints")
        ('bert', 'logs/version_0')
    """
    parts = folder.split("/")
    while len(parts) > 1 and (parts[-1] == "checkpoints" or _STEP_FOLDER.fullmatch(parts[-1])):
        parts.pop()
    return "/".join(parts)
