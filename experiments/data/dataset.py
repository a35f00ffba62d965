"""A labelled training and test set, as one `.safetensors` file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from experiments.files import write_whole
from lipfast.errors import CheckpointError

_TENSORS = ("x_train", "y_train", "x_test", "y_test")
_OPTIONAL = "y_train_true"


@dataclass(frozen=True)
class ClassificationData:
    """A training set and a test set of labelled samples.

    Attributes:
        x_train: float32 (samples, inputs) or (samples, channels, height, width).
        y_train: int64 (samples,), with label noise where there is any.
        x_test: float32, as `x_train`.
        y_test: int64 (test samples,), always the true labels.
        y_train_true: int64 (samples,), the training labels without noise, where they are known.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    y_train_true: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write the tensors under their names; a reader never sees half a file."""
        tensors = {name: getattr(self, name) for name in (*_TENSORS, _OPTIONAL)}
        present = {name: t.contiguous() for name, t in tensors.items() if t is not None}
        write_whole(path, save(present))

    @staticmethod
    def load(path: Path) -> ClassificationData:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is damaged or holds other tensors.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a data file ({error}); delete it") from None
        if set(tensors) - {_OPTIONAL} != set(_TENSORS):
            raise CheckpointError(
                f"{path}: holds {sorted(tensors)}, expected {sorted(_TENSORS)}; delete it"
            )
        return ClassificationData(**tensors)
