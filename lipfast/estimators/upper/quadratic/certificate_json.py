"""Certificates as JSON, and what is no certificate told from them: files may be anybody's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from lipfast.errors import CertificateError

LARGEST_FILE = 16 << 20
"""Bytes: some 500,000 units."""
_FORMAT = "lipfast quadratic certificate"
_VERSION = 1
LARGEST_SHIFT = 1 << 20
_KEYS = {"format", "version", "layers", "multipliers", "units", "maps", "square"}
_OPTIONAL = ("plan", "weights")


def certificate_json(fields: Mapping[str, Any]) -> str:
    """The fields of a `QuadraticCertificate` as one JSON object; numbers as hexadecimal floats.

    Raises:
        CertificateError: they are not what they may be, see `check_fields`.
    """
    check_fields(fields)
    return json.dumps(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "plan": fields["plan"],
            "weights": fields["weights"],
            "layers": list(fields["layers"]),
            "square": fields["square"].hex(),
            "maps": list(fields["maps"]),
            "units": [own.tolist() for own in fields["units"]],
            "multipliers": [[d.hex() for d in own.tolist()] for own in fields["multipliers"]],
        }
    )


def check_fields(fields: Mapping[str, Any]) -> None:
    """Check the fields of a certificate that somebody may have made by hand.

    Raises:
        CertificateError: one has another type, or numbers that none has; says which.
    """
    for name in ("layers", "multipliers", "units", "maps"):
        if not isinstance(fields[name], (list, tuple)):
            kind = type(fields[name]).__name__
            raise CertificateError(f"'{name}' must be a tuple with an entry for each, not {kind}")
    for layer in fields["layers"]:
        _json_text(layer, "layers")
    for shift in fields["maps"]:
        _exponent(shift, "maps")
    for name, dtype in (("multipliers", torch.float64), ("units", torch.int32)):
        for index, own in enumerate(fields[name]):
            _check_vector(own, f"'{name}', entry {index}", dtype)
    if not all(bool(((d > 0) & (d < math.inf)).all()) for d in fields["multipliers"]):
        raise CertificateError("'multipliers' must hold finite numbers above 0")
    # The size of -2^31 is no int32.
    if not all(bool((e.long().abs() <= LARGEST_SHIFT).all()) for e in fields["units"]):
        raise CertificateError("'units' must hold integers of at most 2^20 in size")
    square = fields["square"]
    if type(square) is not float or not 0.0 < square < math.inf:
        raise CertificateError(f"'square' must be a finite float above 0, got {square!r:.80}")
    for name in _OPTIONAL:
        _optional_text(fields[name], name)


def _check_vector(value: Any, name: str, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise CertificateError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or not value.is_cpu or value.dim() != 1:
        raise CertificateError(f"{name}: expected a dense tensor of one dimension on the CPU")
    if value.dtype != dtype:
        raise CertificateError(f"{name}: expected {dtype}, got {value.dtype}")


def certificate_fields(text: str) -> dict[str, Any]:
    """The fields of a certificate.

    Raises:
        CertificateError: the text is something else; says what is wrong.
    """
    if len(text) > LARGEST_FILE:
        raise CertificateError(f"more than {LARGEST_FILE >> 20} MiB: this is no certificate")
    try:
        # A constant such as NaN, and an integer of thousands of digits, are refused as they come.
        read = json.loads(text, parse_constant=_refuse_constant, parse_int=_short_integer)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CertificateError):
            raise
        raise CertificateError("this is not JSON, so no certificate") from error
    if not isinstance(read, dict) or read.get("format") != _FORMAT:
        raise CertificateError(f"this is no certificate: its 'format' is not '{_FORMAT}'")
    if type(read.get("version")) is not int or read["version"] != _VERSION:
        raise CertificateError("a certificate of another version: expected 1")
    missing = sorted(_KEYS - set(read)) or sorted(set(read) - _KEYS - set(_OPTIONAL))
    if missing:
        raise CertificateError(f"the entry '{missing[0][:80]}' is missing, or has no meaning here")
    layers = tuple(_json_text(name, "layers") for name in _list(read["layers"], "layers"))
    rows = [_list(own, "multipliers") for own in _list(read["multipliers"], "multipliers")]
    units = [_list(own, "units") for own in _list(read["units"], "units")]
    maps = tuple(_exponent(own, "maps") for own in _list(read["maps"], "maps"))
    if len(layers) < 2 or len(maps) != len(layers):
        raise CertificateError("'layers' and 'maps' must have one entry for each of >= 2 matrices")
    sizes = [len(row) for row in rows]
    if len(rows) != len(layers) - 1 or [len(own) for own in units] != sizes or 0 in sizes:
        raise CertificateError(
            "'multipliers' and 'units' must have one list for each activation, of equal lengths"
        )
    return {
        "layers": layers,
        "multipliers": tuple(_multipliers(row) for row in rows),
        "units": tuple(
            torch.tensor([_exponent(own, "units") for own in row], dtype=torch.int32)
            for row in units
        ),
        "maps": maps,
        "square": _hex_number(read["square"], "square"),
        **{name: _optional_text(read.get(name), name) for name in _OPTIONAL},
    }


def _refuse_constant(name: str) -> NoReturn:
    raise CertificateError(f"{name} is no number of a certificate")


def _short_integer(digits: str) -> int:
    if len(digits) > 12:
        raise CertificateError("an integer has more than 12 digits")
    return int(digits)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise CertificateError(f"'{name}' must be a list")
    return value


def _json_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise CertificateError(f"'{name}' must hold texts")
    return value


def _optional_text(value: Any, name: str) -> str | None:
    return None if value is None else _json_text(value, name)


def _exponent(value: Any, name: str) -> int:
    if type(value) is not int or abs(value) > LARGEST_SHIFT:
        raise CertificateError(f"'{name}' must hold integers of at most 2^20 in size")
    return value


def _multipliers(row: list[Any]) -> Tensor:
    return torch.tensor([_hex_number(own, "multipliers") for own in row], dtype=torch.float64)


def _hex_number(value: Any, name: str) -> float:
    number = math.nan
    if isinstance(value, str) and len(value) <= 40:
        try:
            number = float.fromhex(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not 0.0 < number < math.inf:
        raise CertificateError(
            f"'{name}' must hold finite numbers above 0, as texts such as '0x1.8p+3'"
        )
    return number
