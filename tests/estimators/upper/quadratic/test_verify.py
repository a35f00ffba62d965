"""Certificates as files, and what is proved by them again; hostile ones are refused in words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, CertificateError
from lipfast.estimators.upper.quadratic.certificate import QuadraticCertificate
from lipfast.estimators.upper.quadratic.certificate_json import LARGEST_FILE
from lipfast.estimators.upper.quadratic.verify import verify_certificate


def _network(*between: Callable[[], nn.Module], sizes: tuple[int, ...] = (6, 12, 9, 3)) -> Any:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), *(make() for make in between)]
    model = nn.Sequential(*modules[: -len(between)]).eval()
    return lipfast.compile(model, torch.zeros(2, sizes[0])), model.state_dict()


PLAN, WEIGHTS = _network(nn.ReLU)
UPPER = PLAN.upper(WEIGHTS, method="quadratic", effort=1)
CERTIFICATE = UPPER.certificate


@pytest.mark.parametrize(
    "make", [nn.ReLU, nn.GELU, nn.Tanh, nn.PReLU, nn.SELU, lambda: nn.LeakyReLU(0.9)]
)
def test_what_was_proved_is_proved_again(make: Callable[[], nn.Module]) -> None:
    for between in ((make,), (lambda: nn.BatchNorm1d(12), make)):
        sizes = (6, 12, 12, 12)
        plan, weights = _network(*between, sizes=sizes)
        for simplify in (True, False):
            upper = plan.upper(weights, method="quadratic", effort=1, simplify=simplify)
            if upper.certificate is None:
                assert not simplify
                continue
            again = verify_certificate(upper.certificate, plan, weights)
            assert (again.value, again.log_value) == (upper.value, upper.log_value)
            assert again.certified
            assert again.side == "upper"


def test_round_trip(tmp_path: Path) -> None:
    own = CERTIFICATE.made_for(PLAN, WEIGHTS)
    own.save(tmp_path / "c.json")
    read = QuadraticCertificate.load(tmp_path / "c.json")
    assert read.to_json() == own.to_json()
    assert all(map(torch.equal, read.multipliers, CERTIFICATE.multipliers))
    assert all(map(torch.equal, read.units, CERTIFICATE.units))
    assert verify_certificate(read, PLAN, WEIGHTS).value == UPPER.value


def test_any_scaling_of_it_is_the_same() -> None:
    moved = replace(
        CERTIFICATE,
        multipliers=tuple(d * 4.0**-700 * 4.0**400 for d in CERTIFICATE.multipliers),
        units=tuple(e + 300 for e in CERTIFICATE.units),
        maps=(CERTIFICATE.maps[0] + 600, *CERTIFICATE.maps[1:-1], CERTIFICATE.maps[-1] - 600),
    )
    with pytest.raises(CertificateError):  # another s_1 and no other D: it is another inequality
        verify_certificate(moved, PLAN, WEIGHTS)
    right = replace(
        CERTIFICATE,
        multipliers=tuple(d * 4.0**300 for d in CERTIFICATE.multipliers),
        units=tuple(e + 300 for e in CERTIFICATE.units),
    )
    assert verify_certificate(right, PLAN, WEIGHTS).value == UPPER.value


def _scaled(index: int, factor: float) -> tuple[Tensor, ...]:
    own = list(CERTIFICATE.multipliers)
    own[index] = own[index] * factor
    return tuple(own)


@pytest.mark.parametrize(
    "changes",
    [
        {"square": CERTIFICATE.square * (1 - 1e-5)},
        {"square": float("nan")},
        {"square": 0.0},
        {"square": 5e-324},
        {"square": -1.0},
        {"maps": (CERTIFICATE.maps[0] - 1, *CERTIFICATE.maps[1:])},
        {"maps": (1 << 40, *CERTIFICATE.maps[1:])},
        {"maps": CERTIFICATE.maps[1:]},
        {"multipliers": _scaled(0, 0.7)},
        {"multipliers": _scaled(1, 1.5)},
        {"multipliers": _scaled(0, 0.0)},
        {"multipliers": _scaled(0, -1.0)},
        {"multipliers": _scaled(1, float("nan"))},
        {"multipliers": _scaled(1, float("inf"))},
        {"multipliers": CERTIFICATE.multipliers[:1]},
        {"multipliers": tuple(d.float() for d in CERTIFICATE.multipliers)},
        {"units": tuple(e[:-1] for e in CERTIFICATE.units)},
        {"units": tuple(torch.full_like(e, -(2**31)) for e in CERTIFICATE.units)},
        {"units": tuple(e + torch.arange(len(e), dtype=e.dtype) for e in CERTIFICATE.units)},
        {"layers": ("0.weight", "2.weight")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_certificates_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CertificateError):
        verify_certificate(replace(CERTIFICATE, **changes), PLAN, WEIGHTS)


class _Loud:
    def __iter__(self) -> Any:
        raise RuntimeError("asked")


def _hostile() -> list[dict[str, Any]]:
    first, second = CERTIFICATE.multipliers
    unit, other = CERTIFICATE.units
    vectors: list[Any] = [None, 3, "a", [1.0] * 12, first.tolist(), first[None], first[0], unit]
    vectors += [first.to_sparse(), first.to(torch.complex128), first.to("meta"), first.float()]
    exponents: list[Any] = [None, "ab", unit.tolist(), unit.long(), unit.float(), first]
    whole: list[Any] = [None, 5, "abc", {}, {1, 2}, _Loud(), first, float("nan")]
    return [
        *({"multipliers": (own, second)} for own in vectors),
        *({"units": (own, other)} for own in exponents),
        *({name: own} for name in ("layers", "multipliers", "units", "maps") for own in whole),
        *({"maps": (own, *CERTIFICATE.maps[1:])} for own in (None, 1.0, True, "1", float("nan"))),
        *({"layers": (own, *CERTIFICATE.layers[1:])} for own in (None, 1, b"0.weight")),
        *({"square": own} for own in (None, "1", 4, True, 1j, first, float("inf"), [1.0])),
        *({name: own} for name in ("plan", "weights") for own in (5, b"a", first)),
    ]


@pytest.mark.parametrize("index", range(len(_hostile())))
def test_objects_made_by_hand_are_refused(index: int) -> None:
    changes = _hostile()[index]
    made = replace(CERTIFICATE, **changes)
    for call in (lambda: lipfast.verify_certificate(made, PLAN, WEIGHTS), made.to_json, made.check):
        with pytest.raises(CertificateError, match=next(iter(changes))):
            call()


@pytest.mark.parametrize("other", [None, {}, "c.json", CERTIFICATE.to_json(), UPPER, object()])
def test_what_is_no_certificate_and_no_plan(other: Any) -> None:
    with pytest.raises(CertificateError, match="expected a certificate"):
        verify_certificate(other, PLAN, WEIGHTS)
    with pytest.raises(ArgumentError, match="plan must be"):
        verify_certificate(CERTIFICATE, other, WEIGHTS)


def test_numbers_that_no_float_holds_are_infinite_without_a_warning() -> None:
    """The largest exponents that a certificate may have."""
    units = tuple(torch.full_like(e, 1 << 20) for e in CERTIFICATE.units)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sign in (1, -1):
            made = replace(CERTIFICATE, units=tuple(sign * e for e in units))
            with pytest.raises(CertificateError):
                verify_certificate(made, PLAN, WEIGHTS)


def test_another_network_is_said() -> None:
    own = CERTIFICATE.made_for(PLAN, WEIGHTS)
    larger = {name: 1.01 * tensor for name, tensor in WEIGHTS.items()}
    with pytest.raises(CertificateError, match="made for other weights"):
        verify_certificate(own, PLAN, larger)
    smaller = {name: 0.5 * tensor for name, tensor in WEIGHTS.items()}
    found = verify_certificate(own, PLAN, smaller)  # true all the same
    assert found.certified
    assert found.reason == "it was made for other weights"
    plan, weights = _network(nn.Tanh)
    assert verify_certificate(own, plan, weights).reason == "it was made for another plan"
    plan, weights = _network(nn.ReLU, sizes=(6, 12, 12, 9, 3))
    with pytest.raises(CertificateError, match="another architecture"):
        verify_certificate(own, plan, weights)


def _edited(**changes: Any) -> str:
    return json.dumps({**json.loads(CERTIFICATE.to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        "[" * 200_000,
        '{"format":' * 100_000,
        "1" * 5_000,
        " " * (LARGEST_FILE + 1),
        _edited(version=2),
        _edited(version=[]),
        _edited(extra=1),
        _edited(square="nan"),
        _edited(square="inf"),
        _edited(square="-0x1p0"),
        _edited(square="0x0p0"),
        _edited(square="0x1p99999"),
        _edited(square="0x1p" + "9" * 100),
        _edited(square=1.5),
        _edited(square=None),
        _edited(square=float("nan")),
        _edited(maps=[0, 0]),
        _edited(maps=[0.0, 0.0, 0.0]),
        _edited(maps=[True, False, True]),
        _edited(maps=[1 << 30, 0, 0]),
        _edited(maps=10**30),
        _edited(maps=[10**30, 0, 0]),
        _edited(units=[[], []]),
        _edited(units="abc"),
        _edited(units=[["a"] * 12, [0] * 9]),
        _edited(multipliers=[["0x1p0"] * 12]),
        _edited(multipliers=[["-0x1p0"] * 12, ["0x1p0"] * 9]),
        _edited(multipliers=[[[]] * 12, ["0x1p0"] * 9]),
        _edited(multipliers=[[], []], units=[[], []]),
        _edited(layers=[]),
        _edited(layers=[1, 2, 3]),
        _edited(weights=5),
        CERTIFICATE.to_json()[:-5],
    ],
    ids=lambda text: text[-24:],
)
def test_hostile_files_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CertificateError):
        QuadraticCertificate.from_json(text)
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CertificateError, match=r"c\.json"):
        QuadraticCertificate.load(tmp_path / "c.json")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CertificateError, match="no text"):
        QuadraticCertificate.load(tmp_path / "c.json")
    with pytest.raises(CertificateError, match="none"):
        QuadraticCertificate.load(tmp_path / "none.json")
    with pytest.raises(CertificateError):
        QuadraticCertificate.load(tmp_path)
