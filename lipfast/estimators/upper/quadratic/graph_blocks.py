"""The blocks of one step's inequality, as they are computed from the stored Y and multipliers.

Part of the proof: `graph_certificate` bounds their rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_constraints import Constraint
from lipfast.estimators.upper.quadratic.graph_problem import GraphStep, Problem


class Terms(NamedTuple):
    """Multipliers of a constraint as they stand in a matrix: ``D``, ``m D`` and ``p D``."""

    diagonal: Tensor
    mixed: Tensor | None
    product: Tensor


def terms_of(constraint: Constraint, multipliers: Tensor) -> Terms:
    """One number per entry of what is read (D, m D) and of what comes out (p D)."""
    if constraint.means is None:
        product = (constraint.products * multipliers).expand(constraint.outputs)
        return Terms(multipliers.expand(constraint.inputs), None, product)
    return Terms(multipliers, constraint.means * multipliers, constraint.products * multipliers)


class Products(NamedTuple):
    """``C Y C^T``, ``C Y A^T`` and ``A Y A^T``; the last two None where A is zero."""

    read: Tensor
    mixed: Tensor | None
    kept: Tensor | None


def products_of(step: GraphStep, y: Tensor | None, like: Tensor) -> Products:
    """What a step reads of Y (None: the identity)."""
    size = sum(step.before)
    c, a = step.read.value, None if step.kept is None else step.kept.dense(size, like)
    if c is None:
        whole = torch.eye(size, dtype=like.dtype, device=like.device) if y is None else y
        if a is None:
            return Products(whole, None, None)
        mixed = whole @ a.mT
        return Products(whole, mixed, a @ mixed)
    rows = c if a is None else torch.cat([c, a])
    found = (rows if y is None else rows @ y) @ rows.mT
    n = len(c)
    if a is None:
        return Products(found, None, None)
    return Products(found[:n, :n], found[:n, n:], found[n:, n:])


def coupling(step: GraphStep, terms: Terms, products: Products) -> Tensor:
    """``C Y A^T + m D B^T``, of what is read and what is carried on."""
    b, n, size = step.added.value, step.constraint.inputs, sum(step.behind)
    if terms.mixed is None:
        return terms.diagonal.new_zeros(n, size) if products.mixed is None else products.mixed
    own = torch.diag(terms.mixed) if b is None else terms.mixed[:, None] * b.mT
    return own if products.mixed is None else products.mixed + own


def added_products(step: GraphStep, product: Tensor) -> Tensor:
    """``B p D B^T``."""
    b = step.added.value
    return torch.diag(product) if b is None else (b * product) @ b.mT


def output_products(problem: Problem, y: Tensor | None) -> Tensor:
    """``C Y C^T`` of all outputs."""
    c, like = problem.output, problem.like
    assert c is not None
    if c.value is None:
        eye = torch.eye(sum(problem.outputs), dtype=like.dtype, device=like.device)
        return eye if y is None else y
    return (c.value if y is None else c.value @ y) @ c.value.mT
