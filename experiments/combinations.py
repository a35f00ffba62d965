"""Which settings of a sweep go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from experiments.config import SweepConfig
from experiments.data.registry import DATA_SETS
from experiments.models import MODELS, model_arguments
from experiments.models.resnet import DEPTHS
from experiments.schedules import SCHEDULE_EPOCHS

# Arguments of some models that say how data are prepared, for the other models as well.
_OF_DATA = ("image_size",)


def _model_errors(config: SweepConfig, given: Iterable[str]) -> Iterator[str]:
    for key in given:
        models = [model for model in MODELS if key in model_arguments(model)]
        if models and config.model not in models and key not in _OF_DATA:
            yield f'{key} is for model = "{models[0]}", not "{config.model}"; remove it'
    flat = len(DATA_SETS[config.data].shape) == 1
    if config.model != "fcn" and flat:
        yield f'model = "{config.model}" needs images; data = "{config.data}" has none'
    if config.model == "resnet" and config.depth not in DEPTHS:
        yield f"depth = {config.depth}: a resnet has one of {', '.join(map(str, DEPTHS))}"
    if config.model == "cnn" and config.image_size < 4:
        yield f"image_size = {config.image_size}: a cnn needs at least 4"
    if config.model == "vit" and config.image_size % config.patch:
        yield f"patch = {config.patch} does not divide image_size ({config.image_size})"
    if config.spectral_constraint and config.model != "fcn":
        yield f'spectral_constraint is for model = "fcn", not "{config.model}"; remove it'
    if config.lipschitz_penalty and config.model == "resnet":
        yield 'lipschitz_penalty is not for model = "resnet"; remove it'


def _data_errors(config: SweepConfig, given: Iterable[str]) -> Iterator[str]:
    known = DATA_SETS[config.data]
    if known.train_samples is not None and config.train_size > known.train_samples:
        yield (
            f"train_size = {config.train_size}: expected an integer from 1 to {known.train_samples}"
        )
    if known.needs_folder and not config.data_folder:
        yield f'data_folder is missing: where the files of data = "{config.data}" are'
    if not known.needs_folder and config.data_folder:
        yield f'data_folder: data = "{config.data}" needs none; remove it'
    if known.classes is not None and config.classes != known.classes:
        yield f'classes = {config.classes}: data = "{config.data}" has {known.classes}'
    size = known.shape[-1]
    if len(known.shape) == 1 and "image_size" in given:
        yield f'image_size: data = "{config.data}" has no images; remove it'
    elif len(known.shape) == 3 and size and size % config.image_size:
        yield f"image_size = {config.image_size}: the images' {size} is no multiple of it"


def combination_errors(config: SweepConfig, given: Iterable[str]) -> Iterator[str]:
    """Say what is wrong with settings together, each of which is right by itself.

    Args:
        config: the settings.
        given: the keys that the file sets.
    """
    yield from _model_errors(config, given)
    yield from _data_errors(config, given)
    if config.momentum and config.optimizer != "sgd":
        yield f'momentum is for optimizer = "sgd", not "{config.optimizer}"; remove one of them'
    if config.target_scale != 1 and config.loss != "mse":
        yield 'target_scale is for loss = "mse"; remove it or change loss'
    if config.loss == "nll" and config.output_activation != "softmax":
        yield 'loss = "nll" needs output_activation = "softmax"'
    if config.warmup_steps >= max(config.steps, 1):
        yield f"warmup_steps ({config.warmup_steps}) must be below steps ({config.steps})"
    if "schedule_epochs" in given and config.schedule not in SCHEDULE_EPOCHS:
        yield f'schedule_epochs is not for schedule = "{config.schedule}"; remove it'
    if config.batch_size > config.train_size:
        yield (
            f"batch_size ({config.batch_size}) exceeds train_size ({config.train_size}); "
            'use "full" for the whole training set'
        )
    if config.checkpoints[-1] > config.steps:
        yield f"checkpoints ask for step {config.checkpoints[-1]}, beyond steps ({config.steps})"
    if config.min_epochs and not config.stops_early:
        yield "min_epochs needs stop_gradient_norm or stop_train_loss"
    if config.min_epochs * config.steps_per_epoch > config.steps:
        yield f"min_epochs ({config.min_epochs}) are more than the steps ({config.steps})"
