"""Lower bounds of many convolutions at their true size that nobody waits for.

As many passes of Lanczos' process as a schedule says, of all networks at once: convolutions side by
side are groups of channels of one. What is proved is the value of the last vector (`_conv_lower`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.ops._conv_lower import lower_of_sizes, sizes_of_many
from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._conv_queued import SymbolPeaks
from lipfast.ops._conv_search import plane_waves
from lipfast.ops._conv_symbols import batches
from lipfast.ops.fetched import Fetched
from lipfast.ops.scaling import powers_of_two
from lipfast.ops.small_tops import top_of_small

# From a wave, norms are found to 1e-3 in ten to twenty passes.
_PASSES = 24
_LEAST_EXPONENT, _LARGEST_EXPONENT = -1000, 1022


class QueuedLower:
    """Proved lower bounds of N convolutions of one kind, on their way.

    Args:
        conv: one of them.
        weights: (N, *kernel), float32 or float64.
        peaks: where their symbols are largest.
        rtol: of the symbols' suprema.
        memory: bytes.

    Attributes:
        right: (N, C_in, *input_size), vectors at which the bounds are attained.
        images: (N, C_out, *output_size), of these under the scaled kernels.
        sizes: (N, 2), of both.
        passes: of Lanczos' process.
    """

    def __init__(
        self,
        conv: ConvOperator,
        weights: Tensor,
        peaks: SymbolPeaks,
        *,
        rtol: float,
        memory: int,
    ) -> None:
        self._conv = conv
        largest = weights.flatten(1).abs().amax(1).double()
        exponents = torch.frexp(largest).exponent.clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT)
        scales = powers_of_two(-exponents).reshape(-1, *[1] * (weights.dim() - 1))
        scaled = weights.double() * scales
        # Single precision leaves about 1e-6 of the value.
        single = weights.dtype == torch.float32 and rtol > 1e-4
        self._dtype = torch.float32 if single else torch.float64
        size = conv.channels[1] * math.prod(conv.input_size)
        # A basis, and vectors in float64 beside it.
        self.passes = max(3, min(_PASSES, size, memory // (16 * size)))
        at_once = max(1, memory // (8 * size * (self.passes + 8)))
        parts = []
        for part in batches(len(weights), at_once):
            own = scaled[part]
            start = self._starts(len(own), peaks.some(part), weights.device)
            vectors = self._vectors(own, start)
            many = conv.side_by_side(own)
            parts.append((vectors, *sizes_of_many(many, own, vectors, memory)))
        self.right, sizes, self.images = (torch.cat(own) for own in zip(*parts, strict=True))
        self.sizes = sizes[:, :2]
        self._read = Fetched([sizes, exponents])

    def bounds(self) -> list[float]:
        """One for each convolution."""
        sizes, exponents = (values.tolist() for values in self._read.read())
        pairs = zip(sizes, exponents, strict=True)
        return [lower_of_sizes(self._conv, *pair) or 0.0 for pair in pairs]

    def _starts(self, count: int, peaks: SymbolPeaks, device: torch.device) -> Tensor:
        """(N, size): the symbol's waves, and as much noise."""
        conv = self._conv
        noise = hashed_noise((conv.channels[1], *conv.input_size), device).reshape(1, -1)
        noise /= torch.linalg.vector_norm(noise)
        waves = _waves_in_channels(conv, peaks)
        if waves is None:
            return noise.expand(count, -1)
        waves = waves.flatten(1)
        sizes = torch.linalg.vector_norm(waves, dim=1, keepdim=True)
        waves /= sizes.clamp_min(1e-300)
        # Of few entries the two might cancel.
        sign = torch.where((waves * noise).sum(1, keepdim=True) < 0, -1.0, 1.0)
        return waves + sign * noise

    def _vectors(self, weights: Tensor, start: Tensor) -> Tensor:
        """Right singular vectors of the largest singular values, about: (N, C_in, *input_size)."""
        count, (_, channels) = len(weights), self._conv.channels
        weights = weights.to(self._dtype)
        many = self._conv.side_by_side(weights)
        shape = 1, count * channels, *self._conv.input_size
        vector = (start / start.norm(dim=1, keepdim=True)).to(self._dtype)
        basis = vector.new_zeros(count, self.passes, vector.shape[1])
        diagonal, off = [], []
        for step in range(self.passes):
            basis[:, step] = vector
            image = many.forward(vector.reshape(shape), many.weight)
            image = many.adjoint(image, many.weight).reshape(count, -1, 1)
            before = image.norm(dim=1)
            known = basis[:, : step + 1]
            for again in range(2):
                shares = torch.bmm(known, image)
                image = torch.baddbmm(image, known.mT, shares, alpha=-1)
                if not again:
                    diagonal.append(shares[:, step, 0])
            size = image.norm(dim=1)
            alive = size > torch.finfo(self._dtype).eps * before
            off.append(torch.where(alive, size, 0.0)[:, 0])
            vector = torch.where(alive, image[:, :, 0] / size.clamp_min(1e-30), 0.0)
        beside = torch.stack(off[:-1], 1).double()
        projected = torch.diag_embed(torch.stack(diagonal, 1).double())
        projected = projected + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        _, top = top_of_small(projected)
        found = torch.bmm(top[:, None].to(self._dtype), basis).double()
        return found.reshape(count, channels, *self._conv.input_size)


def _waves_in_channels(conv: ConvOperator, peaks: SymbolPeaks) -> Tensor | None:
    """(N, C_in, *input_size): in the channels of the groups with the maxima, zero elsewhere."""
    axes = conv.tap_axes()
    places = [axes.index(axis) for axis in range(conv.axes)]
    theta = torch.stack([peaks.frequencies[:, place] for place in places], 1) * (2 * math.pi)
    vectors = peaks.left.conj() if conv.transposes_taps() else peaks.right
    found = plane_waves(conv, theta, vectors)
    if found is None:
        return None
    groups = torch.arange(conv.groups, device=theta.device)
    chosen = (peaks.groups[:, None] == groups).double()
    waves = found[:, None] * chosen.reshape(*chosen.shape, *[1] * (found.dim() - 1))
    return waves.flatten(1, 2)


def hashed_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers in [-1, 1) without a pattern, the same every time; made on the device.

    Example:
        >>> hashed_noise((3,), torch.device("cpu"))
        tensor([...], dtype=torch.float64)
    """
    x = torch.arange(1, math.prod(shape) + 1, device=device)
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = x * factor  # modulo 2^64
        x = x ^ (x >> 29)
    return (x & (2**52 - 1)).double().mul_(2.0**-51).sub_(1).reshape(shape)
