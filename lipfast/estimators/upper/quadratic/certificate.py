"""What proves a bound by quadratic constraints: a few numbers that anybody can check again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lipfast.errors import CertificateError
from lipfast.estimators.upper.quadratic.certificate_json import (
    LARGEST_FILE,
    certificate_fields,
    certificate_json,
    check_fields,
)
from lipfast.estimators.upper.quadratic.digest import weights_digest
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict

Multipliers = Sequence[Tensor]
"""Base-2 logarithms of D of the weights as they are, (n_i,) per activation."""


@dataclass(frozen=True, eq=False)
class QuadraticCertificate:
    r"""Multipliers for which one matrix is positive, which proves the bound of a chain.

    The matrices $W_1 \ldots W_{h+1}$ of the folded graph are rescaled by powers of two, $W_i[j, k]
    2^{e_i[j] - e_{i-1}[k] - s_i}$ with $e_0 = e_{h+1} = 0$; for $D_1 \ldots D_h$ and $\rho^2$ the
    block tridiagonal matrix of docs/bounds.md is positive, and the bound is $\rho 2^{\sum s_i}$
    times the constant of an op behind the last matrix. Ranges of slopes are not here: they are the
    architecture's.

    Attributes:
        layers: names of the matrices.
        multipliers: D_i, (n_i,) float64.
        units: e_i, (n_i,) int32.
        maps: s_i.
        square: rho^2.
        plan: fingerprint of the plan that it was made for, where it is known (`made_for`).
        weights: digest of the weights. Neither has a part in the proof.
    """

    layers: tuple[str, ...]
    multipliers: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    maps: tuple[int, ...]
    square: float
    plan: str | None = None
    weights: str | None = None

    def made_for(self, plan: Architecture, state_dict: StateDict) -> QuadraticCertificate:
        """Name the plan and the weights in it, so that `verify_certificate` can tell others."""
        return replace(self, plan=plan.fingerprint, weights=weights_digest(plan, state_dict))

    def to_json(self) -> str:
        """One JSON object; numbers exactly, as hexadecimal floats.

        Raises:
            CertificateError: a field is not what it may be; says which.
        """
        return certificate_json(self._fields())

    def check(self) -> None:
        """Check types and numbers of what may have been made by hand; proves nothing.

        Raises:
            CertificateError: a field is not what it may be; says which.
        """
        check_fields(self._fields())

    def _fields(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON: a few kilobytes."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> QuadraticCertificate:
        """Read what `to_json` wrote.

        Raises:
            CertificateError: it is something else; says what is wrong.
        """
        return cls(**certificate_fields(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuadraticCertificate:
        """Read what `save` wrote.

        Raises:
            CertificateError: there is no such file, it is too large or something else; says why.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(LARGEST_FILE + 1)
            return cls.from_json(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CertificateError(f"'{os.fspath(path)}': this is no text") from error
        except (OSError, CertificateError) as error:
            raise CertificateError(f"'{os.fspath(path)}': {error}") from error

    def __repr__(self) -> str:
        sizes = "-".join(str(len(own)) for own in self.multipliers)
        return f"QuadraticCertificate({len(self.layers)} matrices, hidden {sizes})"
