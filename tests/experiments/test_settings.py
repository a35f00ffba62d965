from __future__ import annotations

from typing import Any

import pytest

from experiments.errors import ConfigError
from experiments.settings import parse_settings

BASIC: dict[str, Any] = {"widths": [8, 4], "seeds": [0], "steps": 10, "lr": 1, "checkpoints": 3}


def test_values_are_normalised() -> None:
    config = parse_settings("s", "t", {**BASIC, "train_size": 100, "batch_size": "full"})
    assert config.widths == (4, 8)
    assert config.batch_size == 100
    assert config.steps_per_epoch == 1
    assert isinstance(config.lr, float)
    assert parse_settings("s", "t", {**BASIC, "batch_size": 512}).steps_per_epoch == 8
    assert parse_settings("s", "t", {**BASIC, "checkpoints": [10, 0]}).checkpoints == (0, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": "adam"}, r"unknown key 'optimiser'; did you mean 'optimizer'\? allowed: "),
        ({"widths": 4}, "widths = 4: expected a list of distinct integers, at least 1"),
        ({"widths": [4, 4]}, "widths = .*: expected a list of distinct integers"),
        ({"seeds": []}, "seeds = .*not empty"),
        ({"steps": 10.5}, "steps = 10.5: expected an integer at least 0"),
        ({"steps": True}, "steps = True: expected an integer"),
        ({"lr": 0}, "lr = 0: expected a finite number above 0"),
        ({"lr": float("nan")}, "lr = nan: expected a finite number"),
        ({"lr": float("inf")}, "lr = inf: expected a finite number"),
        ({"loss": "hinge"}, 'loss = .*one of "cross_entropy", "mse", "nll"'),
        ({"bias": 1}, "bias = 1: expected true or false"),
        ({"label_noise": 1.1}, "label_noise = 1.1: .* at most 1"),
        ({"train_size": 5000}, "train_size = 5000: .* to 4000"),
        ({"checkpoints": 1}, "checkpoints = 1: expected a number of log-spaced checkpoints"),
        ({"checkpoints": [0, 11]}, r"checkpoints ask for step 11, beyond steps \(10\)"),
        ({"batch_size": "half"}, 'batch_size = .*"full" or an integer'),
        ({"batch_size": 64, "train_size": 32}, r"batch_size \(64\) exceeds train_size \(32\)"),
        ({"momentum": 0.9, "optimizer": "adam"}, 'momentum is for optimizer = "sgd"'),
        ({"target_scale": 10.0}, 'target_scale is for loss = "mse"'),
        ({"upper": "sdp"}, 'upper = .*one of "product", "quadratic"'),
        ({"warmup_steps": 10}, r"warmup_steps \(10\) must be below steps \(10\)"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings("s", "t", {**BASIC, **change})


IMAGES: dict[str, Any] = {**BASIC, "data": "digits", "model": "cnn"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "mlp"}, 'model = .*one of "fcn", "cnn", "resnet", "vit"'),
        ({"data": "mnist1d"}, 'model = "cnn" needs images; data = "mnist1d" has none'),
        ({"data": "mnist"}, 'data_folder is missing: where the files of data = "mnist" are'),
        ({"data_folder": "x"}, 'data_folder: data = "digits" needs none'),
        ({"image_size": 5}, "image_size = 5: the images' 8 is no multiple of it"),
        ({"image_size": 2}, "image_size = 2: a cnn needs at least 4"),
        ({"classes": 3}, 'classes = 3: data = "digits" has 10'),
        ({"output_activation": "relu"}, 'output_activation is for model = "fcn", not "cnn"'),
        ({"patch": 4}, 'patch is for model = "vit", not "cnn"'),
        ({"model": "resnet", "depth": 19}, "depth = 19: a resnet has one of 18, 20, 50, 56"),
        ({"model": "vit", "patch": 3}, r"patch = 3 does not divide image_size \(8\)"),
        ({"spectral_constraint": 1.0}, 'spectral_constraint is for model = "fcn"'),
        ({"model": "resnet", "lipschitz_penalty": 1.0}, "lipschitz_penalty is not for"),
        ({"loss": "nll"}, 'loss = "nll" needs output_activation = "softmax"'),
        ({"schedule_epochs": 3}, 'schedule_epochs is not for schedule = "constant"'),
        ({"min_epochs": 3}, "min_epochs needs stop_gradient_norm or stop_train_loss"),
        ({"min_epochs": 30, "stop_train_loss": 1}, r"min_epochs \(30\) are more than the steps"),
        ({"epochs": 3}, "steps and epochs exclude one another"),
        ({"dropout": 1}, "dropout = 1: expected a finite number"),
        ({"label_noise_kind": "flip"}, "label_noise_kind = .*redraw"),
        ({"path_length": 1}, "path_length = 1: expected true or false"),
    ],
)
def test_errors_of_image_models_and_options_name_the_key(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings("s", "t", {**IMAGES, **change})


def test_epochs_are_steps() -> None:
    settings = {key: value for key, value in BASIC.items() if key != "steps"}
    config = parse_settings("s", "t", {**settings, "epochs": 3, "batch_size": 512})
    assert config.steps == 24


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ConfigError, match="missing steps, lr"):
        parse_settings("s", "t", {"widths": [4], "seeds": [0], "checkpoints": 3})
