"""What a sweep trains: the settings of one scale, and one variant, of a study.

Adding a setting means adding a field to `SweepConfig`, whose annotation is its check, and, where it
excludes others, a rule to `experiments.combinations`. `experiments.settings` reads and checks them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

from experiments.checks import Above, AtLeast, Between, NotEmpty, OneOf
from experiments.data.label_noise import KINDS
from experiments.data.registry import DATA_SETS
from experiments.losses import LOSSES
from experiments.models import ACTIVATIONS, MODELS, OUTPUT_ACTIVATIONS, model_arguments
from experiments.optimizers import OPTIMIZERS
from experiments.schedules import SCHEDULES, learning_rate
from experiments.spacing import log_spaced_steps
from lipfast.estimators.options import UpperMethod


@dataclass(frozen=True)
class SweepConfig:
    """All settings of one sweep: what is varied (widths, seeds) and what is held.

    An annotation says what a file may set the key to; a default may stand outside of that, where it
    means "not used" or depends on other settings (`experiments.settings` puts it in).

    Attributes:
        name: of the study, the stem of its file.
        scale: the table of the file that it comes from.
        widths: units per hidden layer ("fcn"), channels of the first layer ("cnn", "resnet"),
            features of a token ("vit"); ascending.
        seeds: of the initial weights, the order of the mini-batches and dropout.
        steps: largest number of updates; 0 for the networks at initialisation.
        lr: peak learning rate.
        checkpoints: the steps at which checkpoints are written, ascending; 0 is the start.
        variant: of the scale; "" where it has none.
        model: "fcn", "cnn", "resnet" or "vit".
        depth: number of hidden layers ("fcn"), of layers ("resnet"), of blocks ("vit").
        bias: whether linear layers and convolutions have biases ("fcn", "cnn").
        activation: after each hidden layer ("fcn").
        output_activation: after the last layer ("fcn").
        patch: height and width of a patch ("vit").
        heads: of the attention ("vit").
        head_features: of each head ("vit").
        dropout: probability.
        data: name of the data set.
        data_folder: of the data's files, where they are the user's.
        image_size: images are averaged down to it ("image_folder": resized).
        classes: number of classes.
        train_size: the first so many training samples are used.
        label_noise: fraction of the training labels that are disturbed.
        label_noise_kind: "redraw", "shuffle" or "swap", see `with_label_noise`.
        data_seed: of the label noise; all networks share one training set.
        loss: "cross_entropy", "mse" (summed over classes) or "nll" (of a softmax output);
            averaged over the samples.
        target_scale: one-hot targets of "mse" are this large.
        optimizer: "sgd", "adam" (weight decay added to the gradient), "adamw" (decoupled).
        momentum: of "sgd".
        weight_decay: as torch.optim defines it for the optimizer.
        schedule: "constant", "cosine" (to zero at the last step), "step25" or "cont".
        schedule_epochs: of "step25" and "cont".
        warmup_steps: linear warm-up of the learning rate over so many steps.
        batch_size: samples per update; the whole training set in the file as "full".
        min_epochs: training is not stopped before.
        stop_gradient_norm: training stops when the gradient of the loss over all training
            samples has at most this norm; 0: never.
        stop_train_loss: training stops when the training loss is at most this; 0: never.
        stop_every: the two are looked at after every so many epochs.
        spectral_constraint: after every update each weight matrix is scaled to at most this
            spectral norm; 0: not.
        lipschitz_penalty: this times the largest Jacobian norm over some samples is added to the
            loss; 0: not.
        penalty_samples: how many, the first of each mini-batch.
        path_length: whether the lengths of all updates are added up.
        log_points: metrics are logged at so many log-spaced steps, beside the checkpoints'.
        upper: method of the upper bounds when checkpoints are scored: "product" of the layers'
            norms, or "quadratic" constraints, tighter. It says nothing of training.
    """

    name: str
    scale: str
    widths: Annotated[tuple[int, ...], AtLeast(1)]
    seeds: Annotated[tuple[int, ...], AtLeast(0)]
    steps: Annotated[int, AtLeast(0)]
    lr: Annotated[float, Above(0)]
    checkpoints: tuple[int, ...]
    variant: str = ""
    model: Annotated[str, OneOf(MODELS)] = "fcn"
    depth: Annotated[int, AtLeast(1)] = 1
    bias: bool = True
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "relu"
    output_activation: Annotated[str, OneOf(OUTPUT_ACTIVATIONS)] = "none"
    patch: Annotated[int, AtLeast(1)] = 8
    heads: Annotated[int, AtLeast(1)] = 6
    head_features: Annotated[int, AtLeast(1)] = 64
    dropout: Annotated[float, Between(0, 0.99)] = 0.0
    data: Annotated[str, OneOf(DATA_SETS)] = "mnist1d"
    data_folder: Annotated[str, NotEmpty()] = ""
    image_size: Annotated[int, AtLeast(1)] = 0
    classes: Annotated[int, AtLeast(2)] = 10
    train_size: Annotated[int, AtLeast(1)] = 4000
    label_noise: Annotated[float, Between(0, 1)] = 0.0
    label_noise_kind: Annotated[str, OneOf(KINDS)] = "redraw"
    data_seed: Annotated[int, AtLeast(0)] = 0
    loss: Annotated[str, OneOf(LOSSES)] = "cross_entropy"
    target_scale: Annotated[float, Above(0)] = 1.0
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "sgd"
    momentum: Annotated[float, Between(0, 1)] = 0.0
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    schedule: Annotated[str, OneOf(SCHEDULES)] = "constant"
    schedule_epochs: Annotated[int, AtLeast(1)] = 0
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    batch_size: int = 4000
    min_epochs: Annotated[int, AtLeast(0)] = 0
    stop_gradient_norm: Annotated[float, AtLeast(0)] = 0.0
    stop_train_loss: Annotated[float, AtLeast(0)] = 0.0
    stop_every: Annotated[int, AtLeast(1)] = 1
    spectral_constraint: Annotated[float, AtLeast(0)] = 0.0
    lipschitz_penalty: Annotated[float, AtLeast(0)] = 0.0
    penalty_samples: Annotated[int, AtLeast(1)] = 16
    path_length: bool = False
    log_points: Annotated[int, AtLeast(0)] = 0
    upper: UpperMethod = "product"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample of the data, averaged down."""
        shape = DATA_SETS[self.data].shape
        return (shape[0], self.image_size, self.image_size) if len(shape) == 3 else shape

    @property
    def logged_steps(self) -> tuple[int, ...]:
        """Steps at which metrics are logged: the checkpoints', and log-spaced ones."""
        spaced = log_spaced_steps(self.steps, self.log_points) if self.log_points > 1 else ()
        return tuple(sorted({*self.checkpoints, *spaced}))

    @property
    def stops_early(self) -> bool:
        """Whether training may end before the last step."""
        return self.stop_gradient_norm > 0 or self.stop_train_loss > 0

    def architecture(self) -> dict[str, Any]:
        """Return the model's arguments but for the width."""
        shape = self.sample_shape
        of_data = {"inputs": math.prod(shape), "channels": shape[0]}
        return {
            name: of_data[name] if name in of_data else getattr(self, name)
            for name in model_arguments(self.model)
        }

    @property
    def steps_per_epoch(self) -> int:
        """Updates per pass over the training set; the last batch may be smaller."""
        return -(-self.train_size // self.batch_size)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update number `step`, counted from 0."""
        return learning_rate(
            step,
            lr=self.lr,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            period=self.schedule_epochs * self.steps_per_epoch,
        )

    def settings(self) -> dict[str, Any]:
        """Every field as JSON values (tuples as lists)."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
