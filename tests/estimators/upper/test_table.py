"""The layer table as text, HTML, records and a data frame."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lipfast
from lipfast.errors import LipfastError, MissingPackageError
from lipfast.estimators.upper.composition import Sources
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.table import layer_html, layer_records, layer_table, shortened


def bracket(index: int, name: str, **changes: object) -> LayerBracket:
    fields = {
        "index": index,
        "name": name,
        "kind": "conv2d transposed + batch norm + batch norm",
        "shape": (2048, 1024, 13, 13),
        "lower": 1.2345678e-10,
        "upper": 1.2345678e10,
        "certified": True,
        "method": "difference",
        "passes": 7,
    }
    return LayerBracket(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> lipfast.Bounds:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return lipfast.bounds(model, torch.randn(5, 4))


def test_long_names_lose_their_middle() -> None:
    assert shortened("short", 20) == "short"
    name = "encoder.blocks.11.attention.projection"
    for width in range(5, len(name)):
        text = shortened(name, width)
        assert len(text) == width and "..." in text
        assert text[0] == name[0] and text[-1] == name[-1]
    lines = layer_table([bracket(0, name * 3), bracket(1, "out")])
    assert max(len(line) for line in lines) <= 100
    assert lines[1].split()[1] == "enco...ion" and lines[2].split()[1] == "out"


def test_columns_are_aligned() -> None:
    lines = layer_table(
        [bracket(0, "a", upper=2.0, lower=1.0), bracket(10, "b.c", kind="linear", shape=(3, 4))]
    )
    for heading in ("lower", "upper", "shape"):
        end = lines[0].index(heading) + len(heading)
        assert all(line[end - 1] != " " and line[end : end + 2] in ("  ", "") for line in lines)
    assert lines[0].index("layer") == lines[1].index("a")


def test_certified_says_how() -> None:
    lines = layer_table([bracket(0, "a"), bracket(1, "b", certified=False, method="power")])
    assert "yes, difference" in lines[1] and "no, power" in lines[2]


def test_other_ops_and_branches_have_rows() -> None:
    layers = [bracket(0, "a"), bracket(1, "b")]
    lines = layer_table(layers, Sources((1.0, 2.0), 0.5, 0.5))
    assert [line.split()[-1] for line in lines[1:]] == ["25.0%", "50.0%", "12.5%", "12.5%"]
    assert len(layer_table(layers, Sources((1.0, 3.0), 0.0, 1e-9))) == 3
    nothing = layer_table(layers, Sources((1.0, -1.0), 0.1, 0.0))
    assert [line.split()[-1] for line in nothing[1:]] == ["-", "-"]


def test_html_has_every_cell_and_escapes(found: lipfast.Bounds) -> None:
    text = found._repr_html_()
    assert text.count("<tr>") == len(str(found).splitlines()) - 7
    for layer in found.layers:
        assert f">{layer.upper:.8g}<" in text
    assert f"{found.upper.value:.8g}" in text and "jacobian" in text
    hostile = layer_html([bracket(0, "<script>&")], None, "<b>")
    assert "<script>" not in hostile and "<b>" not in hostile
    assert "&lt;script&gt;&amp;" in hostile


def test_records_are_plain(found: lipfast.Bounds) -> None:
    records = layer_records(found.layers, found.upper.sources)
    assert [entry["name"] for entry in records] == ["0", "2"]
    assert records[0]["upper"] == found.layers[0].upper
    assert tuple(entry["log_share"] for entry in records) == found.upper.log_shares
    json.dumps(records)


def test_to_pandas(found: lipfast.Bounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records become a frame; pandas itself is not needed to see which."""
    monkeypatch.setitem(
        sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("frame", rows))
    )
    kind, rows = found.to_pandas()
    assert kind == "frame" and rows == layer_records(found.layers, found.upper.sources)
    assert found.upper.to_pandas() == found.to_pandas()


def test_without_pandas(found: lipfast.Bounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas") as raised:
        found.to_pandas()
    assert isinstance(raised.value, (LipfastError, ImportError))


def test_an_upper_bound_alone_prints_its_table(found: lipfast.Bounds) -> None:
    lines = str(found.upper).splitlines()
    assert lines[0].split()[:3] == ["#", "layer", "kind"]
    assert lines[-1].startswith("upper") and set(lines[-2]) == {"-"}
    assert "certified" in lines[-1]


def test_a_long_reason_is_wrapped() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x) * (x * x)

    text = str(lipfast.upper_bound(Gate(), torch.zeros(1, 4)))
    assert "inf" in text and max(len(line) for line in text.splitlines()) <= 100
