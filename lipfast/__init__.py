"""Certified bounds on the Lipschitz constant of neural networks, for thousands of checkpoints.

Every estimate says its side (lower or upper), its norm, its method and whether it is certified:
true in real arithmetic, with every rounding accounted for.

The names below are imported when they are first used, so that `lipfast --help` does not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lipfast._version import __version__
from lipfast.errors import LipfastError

if TYPE_CHECKING:
    from lipfast._info import info
    from lipfast.estimators.calls import (
        bounds,
        compile,  # noqa: A004
        input_gradient_norms,
        jacobian_norms,
        lower_bound,
        upper_bound,
    )
    from lipfast.estimators.domain import Ball, Box
    from lipfast.estimators.estimate import Estimate
    from lipfast.estimators.plan import Plan
    from lipfast.estimators.results import Bounds, LowerBound, UpperBound
    from lipfast.estimators.upper.layer_bracket import LayerBracket
    from lipfast.estimators.upper.tracker import Tracker
    from lipfast.ops.conv_norms import ConvNorms, conv_norms
    from lipfast.ops.spectral_norms import SpectralNorms, spectral_norms
    from lipfast.rules.registry import rule
    from lipfast.scoring import read_scores, score

_HOME = {
    "info": "lipfast._info",
    "bounds": "lipfast.estimators.calls",
    "compile": "lipfast.estimators.calls",
    "input_gradient_norms": "lipfast.estimators.calls",
    "jacobian_norms": "lipfast.estimators.calls",
    "lower_bound": "lipfast.estimators.calls",
    "upper_bound": "lipfast.estimators.calls",
    "Ball": "lipfast.estimators.domain",
    "Bounds": "lipfast.estimators.results",
    "Box": "lipfast.estimators.domain",
    "Estimate": "lipfast.estimators.estimate",
    "LayerBracket": "lipfast.estimators.upper.layer_bracket",
    "LowerBound": "lipfast.estimators.results",
    "UpperBound": "lipfast.estimators.results",
    "Tracker": "lipfast.estimators.upper.tracker",
    "ConvNorms": "lipfast.ops.conv_norms",
    "conv_norms": "lipfast.ops.conv_norms",
    "SpectralNorms": "lipfast.ops.spectral_norms",
    "spectral_norms": "lipfast.ops.spectral_norms",
    "Plan": "lipfast.estimators.plan",
    "rule": "lipfast.rules.registry",
    "read_scores": "lipfast.scoring",
    "score": "lipfast.scoring",
}

__all__ = [
    "Ball",
    "Bounds",
    "Box",
    "ConvNorms",
    "Estimate",
    "LayerBracket",
    "LipfastError",
    "LowerBound",
    "Plan",
    "SpectralNorms",
    "Tracker",
    "UpperBound",
    "__version__",
    "bounds",
    "compile",
    "conv_norms",
    "info",
    "input_gradient_norms",
    "jacobian_norms",
    "lower_bound",
    "read_scores",
    "rule",
    "score",
    "spectral_norms",
    "upper_bound",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lipfast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
