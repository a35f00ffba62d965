"""Training: many small networks together, checkpoints, logs, exact resumption."""

from experiments.train.engine import train_group
from experiments.train.groups import group_networks
from experiments.train.networks import LogRow, Metrics, Network, Snapshot
from experiments.train.resume import ResumeFile
from experiments.train.stacked import StackedNetworks, initial_state

__all__ = [
    "LogRow",
    "Metrics",
    "Network",
    "ResumeFile",
    "Snapshot",
    "StackedNetworks",
    "group_networks",
    "initial_state",
    "train_group",
]
