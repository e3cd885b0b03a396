"""Chooses and starts the executor that the user asked for.

Holds the choice. Must not know how any of them works.
Read next: `longspan.engine.threads`, `longspan.engine.workers`.
"""

from collections.abc import Callable

import torch

from longspan.config import EngineConfig
from longspan.engine.executor import Executor
from longspan.engine.external import ExternalLauncher
from longspan.engine.launcher import Launcher
from longspan.engine.processes import LocalLauncher
from longspan.engine.threads import ThreadExecutor
from longspan.engine.workers import WorkerExecutor
from longspan.worker.messages import Start


def start_executor(start: Start, model: torch.nn.Module | None) -> Executor:
    """All ranks, ready for plans.

    Args:
        start: what every rank is told.
        model: a loaded module, for ranks that are threads; else None.

    Raises:
        ConfigError: something that the user asked for cannot be done.
        WorkerError: a worker could not start.
    """
    if start.config.executor == "threads":
        return ThreadExecutor(start, model)
    launchers: dict[str, Callable[[EngineConfig], Launcher]] = {
        "processes": LocalLauncher,
        "external": ExternalLauncher,
    }
    return WorkerExecutor(start, launchers[start.config.executor](start.config))
