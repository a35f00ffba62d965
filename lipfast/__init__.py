"""Certified bounds on the Lipschitz constant of neural networks, for thousands of checkpoints.

Every estimate says its side (lower or upper), its norm, its method and whether it is certified:
true in real arithmetic, with every rounding accounted for.

The names below are imported when they are first used, so that `lipfast --help` does not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lipfast._version import __version__ as __version__
from lipfast.errors import LipfastError as LipfastError

# Module -> the names that are imported from it when they are first used.
_HOME = {
    "lipfast._info": "info",
    "lipfast.estimators.calls": "bounds compile input_gradient_norms jacobian_norms lower_bound "
    "upper_bound",
    "lipfast.estimators.domain": "Ball Box",
    "lipfast.estimators.estimate": "Estimate",
    "lipfast.estimators.plan": "Plan",
    "lipfast.estimators.results": "Bounds LowerBound UpperBound",
    "lipfast.estimators.upper.layer_bracket": "LayerBracket",
    "lipfast.estimators.upper.quadratic.certificate": "QuadraticCertificate",
    "lipfast.estimators.upper.quadratic.verify": "verify_certificate",
    "lipfast.estimators.upper.tracker": "Tracker",
    "lipfast.ops.conv_norms": "ConvNorms conv_norms",
    "lipfast.ops.spectral_norms": "SpectralNorms spectral_norms",
    "lipfast.rules.registry": "rule",
    "lipfast.scoring": "read_scores score",
}
_LAZY = {name: module for module, names in _HOME.items() for name in names.split()}

if TYPE_CHECKING:
    from lipfast._info import info as info
    from lipfast.estimators.calls import bounds as bounds
    from lipfast.estimators.calls import compile as compile  # noqa: A004
    from lipfast.estimators.calls import input_gradient_norms as input_gradient_norms
    from lipfast.estimators.calls import jacobian_norms as jacobian_norms
    from lipfast.estimators.calls import lower_bound as lower_bound
    from lipfast.estimators.calls import upper_bound as upper_bound
    from lipfast.estimators.domain import Ball as Ball
    from lipfast.estimators.domain import Box as Box
    from lipfast.estimators.estimate import Estimate as Estimate
    from lipfast.estimators.plan import Plan as Plan
    from lipfast.estimators.results import Bounds as Bounds
    from lipfast.estimators.results import LowerBound as LowerBound
    from lipfast.estimators.results import UpperBound as UpperBound
    from lipfast.estimators.upper.layer_bracket import LayerBracket as LayerBracket
    from lipfast.estimators.upper.quadratic.certificate import (
        QuadraticCertificate as QuadraticCertificate,
    )
    from lipfast.estimators.upper.quadratic.verify import verify_certificate as verify_certificate
    from lipfast.estimators.upper.tracker import Tracker as Tracker
    from lipfast.ops.conv_norms import ConvNorms as ConvNorms
    from lipfast.ops.conv_norms import conv_norms as conv_norms
    from lipfast.ops.spectral_norms import SpectralNorms as SpectralNorms
    from lipfast.ops.spectral_norms import spectral_norms as spectral_norms
    from lipfast.rules.registry import rule as rule
    from lipfast.scoring import read_scores as read_scores
    from lipfast.scoring import score as score
else:  # a type checker takes a computed list for an empty one, and the imports above instead
    __all__ = sorted([*_LAZY, "LipfastError", "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lipfast' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
