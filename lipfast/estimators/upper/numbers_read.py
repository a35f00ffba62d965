"""What rules read of parameters besides the layers' norms: from a device in one copy.

Part of the proof: rules get exactly the parameters' numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.upper.sizes import Sizes, SizesLater
from lipfast.estimators.upper.sweep import Sweep
from lipfast.graph.nodes import error_name
from lipfast.norms import Norm
from lipfast.ops.fetched import Fetched
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks


class NumbersRead:
    """Numbers that rules read, on their way to the host from when this is made.

    Args:
        plan: the architecture.
        sweep: one of its graphs.
        networks: with the parameters that are new in the graph.
        norm: 1, 2 or inf.
        domain: that products of activations are bounded on.
    """

    def __init__(
        self,
        plan: Architecture,
        sweep: Sweep,
        networks: ResolvedNetworks,
        norm: Norm,
        domain: Domain | None,
    ) -> None:
        self._networks = networks
        self._sizes: SizesLater | None = None
        if sweep.needs_sizes and networks:
            references = [reference for step in sweep.steps for reference in step.references]
            self._sizes = SizesLater(plan, networks, references, norm, domain)
        names = (
            name
            for step in sweep.steps
            if step.operation.layer is None
            for reference in step.references
            if reference.kind == "parameter"
            for name in (reference.name, error_name(reference.name))
        )
        read = networks.tensors(dict.fromkeys(names)) if networks else {}
        read = {name: tensor for name, tensor in read.items() if not tensor.is_cpu}
        self._names, self._read = list(read), Fetched(list(read.values()))

    def parameters(self) -> Sequence[Mapping[str, Tensor]]:
        """Each network's parameters as its rules read them."""
        if not self._names:
            return self._networks
        rows = zip(*(tensor.unbind() for tensor in self._read.read()), strict=True)
        return [
            {**entry, **dict(zip(self._names, row, strict=True))}
            for entry, row in zip(self._networks, rows, strict=True)
        ]

    def sizes(self) -> Sequence[Sizes | None]:
        """Each network's magnitudes, where a product needs some."""
        return [None] * len(self._networks) if self._sizes is None else self._sizes.read()
