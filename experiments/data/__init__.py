"""Labelled data: generated, from installed packages, or read from files of the user."""

from experiments.data.dataset import ClassificationData
from experiments.data.generated import CLASSES, INPUTS, TRAIN_SAMPLES, mnist1d, training_data
from experiments.data.label_noise import with_label_noise
from experiments.data.registry import DATA_SETS, DataSet, load_data

__all__ = [
    "CLASSES",
    "DATA_SETS",
    "INPUTS",
    "TRAIN_SAMPLES",
    "ClassificationData",
    "DataSet",
    "load_data",
    "mnist1d",
    "training_data",
    "with_label_noise",
]
