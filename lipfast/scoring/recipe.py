"""What makes a scorer, in this process or in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lipfast.checkpoints.metadata import Scalar
from lipfast.scoring.architectures import ArchSource, ModelFamily
from lipfast.scoring.data import Samples
from lipfast.scoring.device import find_device
from lipfast.scoring.options import Options
from lipfast.scoring.scorer import Scorer


@dataclass(frozen=True)
class Recipe:
    """What makes a scorer, here or in another process.

    Attributes:
        arch: what makes the models.
        arch_args: keyword arguments that go before the metadata.
        samples: where lower bounds are evaluated.
        options: norm, seed, batch size.
        device: where bounds are computed, see `find_device`.
    """

    arch: ArchSource
    arch_args: Mapping[str, Scalar] | None
    samples: Samples
    options: Options
    device: str = "cpu"

    def scorer(self, *, bounds: bool = True) -> Scorer:
        """Make a scorer.

        Raises:
            ArgumentError: the architecture cannot be imported or read, or there is no such device.
        """
        device = find_device(self.device)
        architecture = ModelFamily(self.arch, self.arch_args)
        return Scorer(architecture, self.samples, self.options, bounds, device)
