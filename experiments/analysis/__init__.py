"""What checkpoints, scores and metrics say: one concept per file.

Functions of numbers (`widths`, `threshold`, `power_law`, `double_descent`, `peaks`, `position`,
`histogram`, `rank`) and functions of networks (`bias_variance`, `searches`, `perturbation`,
`path_length`, `patterns`). Equations are those of Khromov and Singh, ICLR 2024 (arXiv 2302.10886),
unless a docstring says otherwise.
"""

from experiments.analysis.threshold import interpolation_threshold, parameter_count
from experiments.analysis.widths import (
    COLUMNS,
    Curves,
    WidthSummary,
    neighbouring,
    peak_widths,
    scored_rows,
    summarise,
)

__all__ = [
    "COLUMNS",
    "Curves",
    "WidthSummary",
    "interpolation_threshold",
    "neighbouring",
    "parameter_count",
    "peak_widths",
    "scored_rows",
    "summarise",
]
