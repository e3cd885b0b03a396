"""Choice and start of the executor that the user asked for.

Holds the choice. Must not know how an executor works.
Read next: `longspan.engine.threads`, `longspan.engine.workers`.
"""

import threading
from importlib.util import find_spec

import torch

from longspan.config import EngineConfig
from longspan.engine.executor import Executor
from longspan.engine.external import ExternalLauncher
from longspan.engine.launcher import Launcher
from longspan.engine.processes import LocalLauncher
from longspan.engine.threads import ThreadExecutor
from longspan.engine.workers import WorkerExecutor
from longspan.errors import ConfigError
from longspan.group.messages import Start
from longspan.group.shape import GroupShape


def start_executor(
    start: Start, model: torch.nn.Module | None, launcher: Launcher | None, given_up: threading.Event
) -> Executor:
    """Start all ranks; return their executor when they are ready for plans.

    Args:
        start: what every process is told.
        model: a loaded module, for ranks that are threads; else None.
        launcher: launcher whose processes are starting already; None makes one.
        given_up: event that is set when the caller no longer waits for the ranks.

    Raises:
        ConfigError: something that the user asked for cannot be done.
        WorkerError: a worker could not start.
        LongspanError: the start was given up.
    """
    if start.config.executor == "threads":
        return ThreadExecutor(start, model)
    return WorkerExecutor(start, GroupShape.of(start.config), launcher or _launcher(start.config), given_up)


def _launcher(config: EngineConfig) -> Launcher:
    if config.executor == "external":
        return ExternalLauncher(config)
    if config.executor == "ray":
        if find_spec("ray") is None:
            raise ConfigError("executor: got 'ray', which is not installed, legal is: pip install 'longspan[ray]'")
        from longspan.engine.ray_cluster import RayLauncher

        return RayLauncher(config)
    assert config.executor == "processes"
    return LocalLauncher(config)
