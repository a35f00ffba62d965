from __future__ import annotations

import pytest
import torch

from experiments.data import with_label_noise
from lipfast.errors import ArgumentError


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_label_noise_changes_the_expected_fraction(fraction: float) -> None:
    labels = torch.arange(20_000) % 10
    noisy = with_label_noise(labels, fraction, seed=3)
    # A tenth of the redrawn labels keep their value; five standard deviations of that count.
    expected, spread = 0.9 * fraction, (0.09 * fraction / 20_000) ** 0.5
    assert abs((noisy != labels).double().mean().item() - expected) <= 5 * spread
    assert labels.equal(torch.arange(20_000) % 10)
    assert int(noisy.min()) >= 0
    assert int(noisy.max()) <= 9


def test_label_noise_is_seeded_and_nested() -> None:
    labels = torch.zeros(500, dtype=torch.int64)
    assert torch.equal(with_label_noise(labels, 0.3, 1), with_label_noise(labels, 0.3, 1))
    assert not torch.equal(with_label_noise(labels, 0.3, 1), with_label_noise(labels, 0.3, 2))
    less, more = with_label_noise(labels, 0.2, 1), with_label_noise(labels, 0.6, 1)
    assert torch.equal(less[less != 0], more[less != 0])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_swapped_pairs_are_nested_and_keep_the_classes(fraction: float) -> None:
    labels = torch.arange(1000)
    noisy = with_label_noise(labels, fraction, 4, kind="swap")
    moved = (noisy != labels).nonzero().flatten()
    assert len(moved) == 1000 * fraction
    assert torch.equal(noisy[noisy], labels)
    more = with_label_noise(labels, min(1.0, fraction + 0.3), 4, kind="swap")
    assert torch.equal(more[moved], noisy[moved])


def test_shuffled_labels_are_a_permutation_of_the_chosen_ones() -> None:
    labels = torch.arange(1000)
    noisy = with_label_noise(labels, 0.3, 1, kind="shuffle")
    assert torch.equal(noisy.sort().values, labels)
    assert 280 < int((noisy != labels).sum()) <= 300
    with pytest.raises(ArgumentError, match="label_noise_kind is 'flip'"):
        with_label_noise(labels, 0.3, 1, kind="flip")


def test_a_wrong_fraction_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"label_noise is 1\.5"):
        with_label_noise(torch.zeros(3, dtype=torch.int64), 1.5, 0)
