"""What a file is, by its first bytes: for errors, and where names do not say."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable

from lipfast.text import printable

HEAD = 4096
"""As many bytes are looked at."""

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save, pickled
_FIRST_ENTRY = re.compile(rb"[^/]{1,255}/(data\.pkl|\.format_version|constants\.pkl)")
_GZIP = b"\x1f\x8b"
_HEADER_OF_ENTRY = 30  # bytes before the name of a zip's entry
_TAR = (257, b"ustar")
_MAX_SAFE_HEADER = 100 << 20

_WEIGHTS_OF_OTHERS = "Convert it in its own framework, and save the weights with safetensors"
_AGAIN = "Download it again, from the address of the file itself, logged in where that is needed"

_SIGNATURES: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs.github.com/spec/": (
        "a pointer of Git LFS, not the file it stands for",
        "Fetch it with 'git lfs install' and 'git lfs pull'",
    ),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as Keras writes them (.h5)", _WEIGHTS_OF_OTHERS),
    b"\x93NUMPY": ("an array of numpy (.npy)", "Save the weights by name, with safetensors"),
    b"GGUF": ("a GGUF file of llama.cpp", _WEIGHTS_OF_OTHERS),
    _GZIP: ("compressed with gzip", "Unpack it with gunzip"),
    b"BZh": ("compressed with bzip2", "Unpack it with bunzip2"),
    b"\xfd7zXZ\0": ("compressed with xz", "Unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "Unpack it with unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it"),
    b"Rar!": ("a rar archive", "Unpack it"),
    b"\x89PNG": ("a picture (PNG)", "Check its name"),
    b"\xff\xd8\xff": ("a picture (JPEG)", "Check its name"),
    b"%PDF": ("a PDF document", "Check its name"),
    b"\x7fELF": ("a program or a library (ELF)", "Check its name"),
    b"PAR1": ("a table (Parquet)", "Check its name"),
    b"ARROW1": ("a table (Arrow)", "Check its name"),
    b"SQLite format 3": ("a database (SQLite)", "Check its name"),
}
_KINDS_OF_TEXT: tuple[tuple[str, str, str], ...] = (
    (r"<!doctype html|<html|<head|<body", "a web page (HTML) saved under this name", _AGAIN),
    (r"<\?xml|<error", "an XML text, as servers answer instead of a file", _AGAIN),
    (r"[{\[]", "a JSON text", _AGAIN),
)
_PROGRAM = "Pass it as the architecture; of weights save save_file(program.state_dict, ...)"
_ZIPS: tuple[tuple[str, str, str], ...] = (
    (r"(.*/)?models/.+\.json|.*exported_program\.json", "a program of torch.export", _PROGRAM),
    (r"model\.weights\.h5", "a model of Keras (.keras)", _WEIGHTS_OF_OTHERS),
    (r".*\.npy", "arrays of numpy (.npz)", "Save them by name with safetensors"),
    (r"\[Content_Types\]\.xml", "an office document", "Check its name"),
    (
        r".*\.(safetensors|pt|pth|ckpt|pth\.tar|bin)",
        "a zip archive of other files",
        "Rename it to .zip: checkpoints inside are then found",
    ),
)


def is_torch(head: bytes) -> bool:
    """Whether a file begins as those of `torch.save` do, the older format included.

    Example:
        >>> is_torch(b"PK"), is_torch(b"<html>")
        (False, False)
    """
    if head.startswith(_LEGACY):
        return True
    return head.startswith(_ZIP) and _FIRST_ENTRY.match(head, _HEADER_OF_ENTRY) is not None


def is_pickle(head: bytes) -> bool:
    """Whether a file begins as pickles do, those of protocol 0 and 1 left out."""
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header, and the header."""
    if len(head) < 10:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return length <= _MAX_SAFE_HEADER and head[8:].lstrip().startswith(b'{"')


def is_tar(head: bytes) -> bool:
    """Whether a file is a tar archive, packed or not."""
    at, magic = _TAR
    return head[at : at + len(magic)] == magic or _unzipped(head)[at : at + len(magic)] == magic


def foreign(head: bytes, size: int) -> str | None:
    """Say what a file is that holds no weights, and what to do.

    Args:
        head: its first `HEAD` bytes, or all.
        size: its length.

    Returns:
        A sentence or two; None where it may well be weights.

    Example:
        >>> foreign(b"<!DOCTYPE html><title>Sign in</title>", 37).partition(".")[0]
        'a web page (HTML) saved under this name'
    """
    if not head or head.startswith(_ZIP) or is_pickle(head) or is_safetensors(head):
        return None
    if not head.strip(b"\0"):
        return (
            f"truncated, or not a safetensors file and none of torch.save: its {size} bytes begin "
            "with zeros only, as where a copy was not finished. Copy it again"
        )
    return _by_magic(head, size) or _by_text(head)


def _by_magic(head: bytes, size: int) -> str | None:
    inside = _unzipped(head)
    if is_tar(head):
        return "a tar archive. Rename it to .tar: checkpoints inside are then found"
    # Not further than that: there are files that hold themselves.
    if not inside.startswith(_GZIP) and (packed := foreign(inside, size)):
        return f"compressed with gzip, and inside {packed}"
    if re.match(rb"\x08[\x01-\x1f][\x12\x1a]", head):
        return f"a model in ONNX. {_WEIGHTS_OF_OTHERS}"
    if head[4:8] == b"TFL3":
        return f"a model of TensorFlow Lite. {_WEIGHTS_OF_OTHERS}"
    for start, (what, advice) in _SIGNATURES.items():
        if head.startswith(start):
            return f"{what}. {advice}"
    return None


def foreign_zip(names: Iterable[str]) -> str | None:
    """Say what a zip archive is that torch.save did not write, by the names in it.

    Example:
        >>> foreign_zip(["a.npy", "b.npy"])
        'arrays of numpy (.npz). Save them by name with safetensors'
    """
    listed = list(names)
    for pattern, what, advice in _ZIPS:
        if any(re.fullmatch(pattern, name) for name in listed):
            return f"{what}. {advice}"
    return None


def _by_text(head: bytes) -> str | None:
    try:
        text = head[: HEAD - 4].decode("utf-8-sig")  # four bytes less: the last sign may be cut
    except UnicodeDecodeError:
        return None
    if not all(sign.isprintable() or sign.isspace() for sign in text):
        return None
    for pattern, what, advice in _KINDS_OF_TEXT:
        if re.match(pattern, text.lstrip(), re.IGNORECASE):
            return f"{what}. {advice}"
    first = printable(text.strip().split("\n", 1)[0][:40])
    return (
        f"truncated, or not weights: a text that begins with '{first}'. Check its name, or "
        "download it again"
    )


def _unzipped(head: bytes) -> bytes:
    """The first bytes of what gzip packed; none where it did not."""
    if not head.startswith(_GZIP):
        return b""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD)
    except zlib.error:
        return b""
