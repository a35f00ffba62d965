"""The layers of a bound as a table: plain text, HTML, and rows for a data frame."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from lipfast.errors import MissingPackageError
from lipfast.estimators.upper.composition import Sources
from lipfast.estimators.upper.layer_bracket import LayerBracket

WIDTH = 100
_COLUMNS: tuple[str, ...] = (
    "#",
    "layer",
    "kind",
    "shape",
    "lower",
    "upper",
    "certified",
    "log share",
)
_LEFT = (1, 2, 6)  # columns of text
_NAME, _KIND = 1, 2
_NARROWEST = 10  # what long names and kinds keep
# A share that rounds to less is not worth a row.
_NEGLIGIBLE = 5e-4


def shortened(text: str, width: int) -> str:
    """At most `width` characters: the middle gives way.

    Example:
        >>> shortened("encoder.blocks.11.attention.output", 20)
        'encoder.b...n.output'
    """
    if len(text) <= width:
        return text
    kept = max(2, width - 3)
    return f"{text[: kept - kept // 2]}...{text[-(kept // 2) :]}"


def log_shares(terms: Sequence[float]) -> list[float | None]:
    """Share of each term in their sum, the logarithm of a bound; negative for what contracts.

    Where terms that expand and terms that contract nearly cancel, shares say nothing: None.
    """
    if not all(math.isfinite(term) for term in terms):
        return [None] * len(terms)
    total, size = math.fsum(terms), math.fsum(abs(term) for term in terms)
    if abs(total) <= 0.5 * size:
        return [None] * len(terms)
    return [term / total for term in terms]


def shares_of(
    layers: Sequence[LayerBracket], sources: Sources | None
) -> tuple[list[float | None], float | None, float | None]:
    """Shares of log L: of the layers, of ops without a layer, of meeting branches.

    Without `sources` those of the layers in the logarithm of their product.
    """
    if sources is None:
        logs = [math.log(layer.upper) if layer.upper > 0 else -math.inf for layer in layers]
        return log_shares(logs), None, None
    *parts, other, branches = log_shares([*sources.layers, sources.other, sources.branches])
    return parts, other, branches


def layer_table(layers: Sequence[LayerBracket], sources: Sources | None = None) -> list[str]:
    """Lines of a table: index, name, kind, shape, bracket, certified and how, share of log L."""
    rows = _table_rows(layers, sources)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for column in (_NAME, _KIND):
        excess = max(0, sum(widths) + 2 * (len(widths) - 1) - WIDTH)
        widths[column] = min(widths[column], max(_NARROWEST, widths[column] - excess))
    return [
        "  ".join(
            shortened(cell, width).ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def layer_html(layers: Sequence[LayerBracket], sources: Sources | None, summary: str) -> str:
    """Lay the table out for a notebook, with lines of text below it."""
    header, *rows = _table_rows(layers, sources)
    style = ['style="text-align: left"' if column in _LEFT else "" for column in range(len(header))]

    def line(tag: str, row: Sequence[str]) -> str:
        cells = [
            f"<{tag} {how}>{html.escape(cell)}</{tag}>"
            for cell, how in zip(row, style, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
        f"<pre>{html.escape(summary)}</pre>"
    )


def layer_records(layers: Sequence[LayerBracket], sources: Sources | None) -> list[dict[str, Any]]:
    """One dictionary per layer: the fields of its bracket and its share of log L."""
    shares, _, _ = shares_of(layers, sources)
    return [
        {**vars(layer), "log_share": share} for layer, share in zip(layers, shares, strict=True)
    ]


def layer_frame(layers: Sequence[LayerBracket], sources: Sources | None) -> Any:
    """A `pandas.DataFrame` of `layer_records`.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise MissingPackageError(
            "to_pandas() needs pandas, which is not installed: pip install pandas "
            "(or lipfast[pandas])"
        ) from error
    return pandas.DataFrame(layer_records(layers, sources))


def _table_rows(layers: Sequence[LayerBracket], sources: Sources | None) -> list[tuple[str, ...]]:
    shares, other, branches = shares_of(layers, sources)
    rows = [_COLUMNS]
    rows += [_layer_row(layer, share) for layer, share in zip(layers, shares, strict=True)]
    for label, share in (("other ops", other), ("where branches meet", branches)):
        if share is not None and abs(share) >= _NEGLIGIBLE:
            rows.append(("", label, "", "", "", "", "", _percent(share)))
    return rows


def _layer_row(layer: LayerBracket, share: float | None) -> tuple[str, ...]:
    return (
        str(layer.index),
        layer.name,
        layer.kind.replace(" + batch norm", "+bn"),
        "x".join(str(size) for size in layer.shape),
        f"{layer.lower:.8g}",
        f"{layer.upper:.8g}",
        f"{'yes' if layer.certified else 'no'}, {layer.method}",
        _percent(share),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
