"""A Ray cluster: to reach it, what its machines can see, to run a function there."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from typing import Any

from lipfast.errors import ArgumentError


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import ray  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ArgumentError(
            f"engine 'ray' needs the package ray: pip install 'lipfast[ray]' ({error})"
        ) from error
    return ray


def connect(ray: Any) -> None:
    """Join the cluster that RAY_ADDRESS names, or one on this machine, or start one.

    Raises:
        ArgumentError: it cannot be reached or started.
    """
    options = {"log_to_driver": False, "include_dashboard": False, "logging_level": "error"}
    try:
        try:
            address = os.environ.get("RAY_ADDRESS", "auto")
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except ConnectionError:
            if "RAY_ADDRESS" in os.environ:
                raise
            ray.init(**options)
    except Exception as error:  # a cluster can fail in many ways
        raise ArgumentError(
            f"the Ray cluster cannot be reached or started: {type(error).__name__}: {error}"
        ) from error


def unseen(ray: Any, paths: Sequence[str]) -> list[tuple[str, int]]:
    """Ask every other machine of the cluster for some local files.

    Args:
        ray: the module.
        paths: of the files.

    Returns:
        Pairs of a machine and the index of a path that is missing there, or another file.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != here]
    if not others or not paths:
        return []
    from ray.util.scheduling_strategies import (  # noqa: PLC0415 (an extra)
        NodeAffinitySchedulingStrategy,
    )

    seen_here = _stamps(paths)
    asked = [
        ray.remote(num_cpus=0)(_stamps)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(list(paths))
        for node in others
    ]
    return [
        (str(node["NodeManagerHostname"]), index)
        for node, stamps in zip(others, ray.get(asked), strict=True)
        for index, (there, mine) in enumerate(zip(stamps, seen_here, strict=True))
        if there != mine
    ]


def call_from(folder: str, pickled: bytes) -> Any:
    """On a worker: call a function of a package that lies in a folder, not among the installed.

    Args:
        folder: from which the package is imported.
        pickled: the function and the tuple of its arguments.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    function, arguments = pickle.loads(pickled)  # of the driver, as every task is
    return function(*arguments)


def _stamps(paths: Sequence[str]) -> list[tuple[int, float] | None]:
    return [_stamp(path) for path in paths]


def _stamp(path: str) -> tuple[int, float] | None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_size, status.st_mtime
