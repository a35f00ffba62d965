"""What the studies found: one module per question, in the order of the report."""

from __future__ import annotations

from experiments.findings.double_descent import C1, C2, C3, C4
from experiments.findings.evolution import A1, A2, A3, A4, X4
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.histograms import F7
from experiments.findings.initialisation import A6, C5
from experiments.findings.label_noise import E
from experiments.findings.losses import F1
from experiments.findings.optimisers import F2, X1, X2, X3
from experiments.findings.regularisation import F5, F6
from experiments.findings.robustness import G
from experiments.findings.size import F3, F4
from experiments.findings.toy import A5
from experiments.findings.variance import D

FINDINGS: tuple[Finding, ...] = (
    *(A1, A2, A3, A4, A5, A6),
    *(C1, C2, C3, C4, C5),
    *(D, E),
    *(F1, F2, F3, F4, F5, F6, F7),
    G,
    *(X1, X2, X3, X4),
)
BY_STUDY = {finding.name: finding for finding in FINDINGS}

__all__ = ["BY_STUDY", "FINDINGS", "Check", "Finding", "Outcome"]
