"""Batches on their way to a device: packed, copied at once, read as views."""

from __future__ import annotations

import itertools

import pytest
import torch

from lipfast.scoring import feed
from lipfast.scoring.feed import Feed, UnlikeError, regions_of
from tests.support.pretended_device import CUDA, pretended_device


def networks(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "weight": torch.randn(3, 5, generator=generator),
            "scale": torch.randn((), generator=generator, dtype=torch.float64),
            "bias": torch.randn(3, generator=generator).bfloat16(),
            "steps": torch.tensor(seed + index),
        }
        for index in range(count)
    ]


def test_a_batch_arrives_as_it_was_in_one_copy() -> None:
    batches = [networks(count, count) for count in (4, 1, 7, 7, 2)]
    with pretended_device() as counts:
        there = Feed(CUDA)
        packing = there.pack(batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            later = None if following is None else there.pack(following)
            sent = there.send(packing)
            packing = later
            for found, expected in zip(sent.state_dicts(), batch, strict=True):
                assert list(found) == list(expected)
                for name, tensor in found.items():
                    assert tensor.device == CUDA
                    assert tensor.dtype == expected[name].dtype
                    assert torch.equal(tensor.inner, expected[name])
        assert (counts.copies, counts.blocking) == (5, 0)
        there.close()


def test_regions_do_not_meet_and_are_aligned() -> None:
    regions = list(regions_of(networks(1)[0], 7).values())
    for region, following in itertools.pairwise(regions):
        assert region.start + region.size <= following.start
        assert following.start % feed._GRANULE == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("bias"),
        lambda entry: entry.update(other=torch.ones(1)),
        lambda entry: entry.update(bias=torch.ones(3)),
        lambda entry: entry.update(weight=torch.ones(5, 3)),
        lambda entry: entry.update(weight=torch.ones(3, 5).to_sparse()),
    ],
    ids=["missing", "further", "dtype", "shape", "sparse"],
)
@pytest.mark.parametrize("which", [1, 2])
def test_state_dicts_that_differ_are_not_packed(change, which: int) -> None:
    batch = networks(3)
    change(batch[which])
    with pretended_device():
        there = Feed(CUDA)
        packing = there.pack(batch)
        with pytest.raises(UnlikeError):
            there.send(packing)
        there.close()


def test_tensors_that_have_no_strides_go_by_themselves() -> None:
    assert regions_of({"weight": torch.ones(3, 5).to_sparse()}, 2) is None


def test_a_buffer_is_not_written_while_it_is_copied() -> None:
    class Copy:
        waited = 0

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            self.waited += 1

    buffer = feed.PinnedBuffer(torch.empty(8, dtype=torch.uint8), Copy())
    assert len(buffer.take(5)) == 5
    assert buffer.copied.waited == 1
