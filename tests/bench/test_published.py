"""Networks of others: which are kept here, and how those of a user's folder are read."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.published import FOLDER, VARIABLE, acas

FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_kept_here_has_its_licence_beside_it(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert file.metadata()["licence"] == "MIT"
    (row,) = [line for line in (FOLDER / "README.md").read_text().splitlines() if path.stem in line]
    (licence,) = re.findall(r"MIT, `(LICENSE-\w+)`", row)
    text = (FOLDER / licence).read_text()
    assert text.startswith("MIT License\n\nCopyright (c) ")
    assert "this permission notice shall be included" in text


def test_files_of_a_folder_are_read_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list(range(2, 10))
    generator = torch.Generator().manual_seed(0)
    for name in ("acasxu-1-1", "acasxu-1-2"):
        tensors = {}
        for i, (before, after) in enumerate(pairwise(sizes)):
            shapes = {"weight": (after, before), "bias": (after,)}
            for kind, shape in shapes.items():
                own = torch.randn(shape, generator=generator, dtype=torch.float64)
                tensors[f"{2 * i}.{kind}"] = own
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    found = acas()
    assert found is not None
    assert len(found.state_dicts) == 2
    assert [weight.shape[1] for weight in found.weights(1)] == sizes[:-1]
    assert all(bound.certified for bound in found.plan.upper(found.state_dicts))


@pytest.mark.parametrize("folder", [None, "", "nothing-here"])
def test_without_a_folder_there_are_none(
    folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(VARIABLE, folder)
    assert acas() is None
