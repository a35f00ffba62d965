"""Rules: what one ATen operation does to a Lipschitz bound, one file per family.

Importing this package registers the rules that lipfast ships.
"""

from __future__ import annotations

from lipfast.rules import (  # noqa: F401 (they register themselves)
    affine,
    arithmetic,
    attention,
    compositions,
    convolution,
    gates,
    normalization,
    order,
    parts,
    pointwise,
    pooling,
    products,
    resampling,
    residual,
    steep,
    structural,
)
from lipfast.rules.registry import RULES, Call, Dimensions, LayerRequest, Rule, rule, ship

__all__ = ["RULES", "Call", "Dimensions", "LayerRequest", "Rule", "rule"]

ship()
