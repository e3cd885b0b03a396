"""Reaction of a process to its own failure in a step.

Holds one context manager. Must not know what a step does.
Read next: `longspan.integrations.vllm.worker`.

Note [Who fails]
    vLLM reads the answers of process 0 alone. Another process that fails leaves its tensor parallel peers in a
    collective, so it ends: vLLM's monitor of processes then ends the engine. It ends by SIGTERM, which vLLM's workers
    expect at any time and in any thread; no exception has to find its way through vLLM's loop.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from longspan.comm.base import Communicator

logger = logging.getLogger(__name__)


@contextmanager
def telling_peers(comm: Communicator, process: int) -> Iterator[None]:
    """Let no process wait for one that failed. See Note [Who fails].

    Args:
        comm: the process's communicator, which is closed on failure.
        process: number of the process; process 0 raises the error, the others end.
    """
    try:
        yield
    except Exception:
        comm.close()  # ranks that wait for this one learn of it at once
        if process != 0:
            logger.exception("process %d failed, and ends", process)
            os.kill(os.getpid(), signal.SIGTERM)
        raise
