"""Starts vLLM's processes as copies of this one, which has imported vLLM: importing takes most of an engine's start.

On CPUs vLLM starts new interpreters. `test_server.py` leaves it at that, `test_failure.py` in part.
"""

import importlib
import multiprocessing
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

STARTS = ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor")
"""Modules that start processes."""
IMPORTED_LATER = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.adapters",
    "vllm.v1.engine.core",
    "longspan.integrations.vllm.worker",
)
"""Modules that would be imported in every process."""


@contextmanager
def starting_by(method):
    """Inside, engines start processes by this method of `multiprocessing`."""
    context = multiprocessing.get_context(method)
    with ExitStack() as stack:
        for module in STARTS:
            stack.enter_context(patch(f"{module}.get_mp_context", lambda: context))
        yield


@contextmanager
def forking():
    """Inside, engines fork, and classes of models are looked at in this process instead of in one for each."""
    for module in IMPORTED_LATER:
        importlib.import_module(module)
    inspect = patch("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())
    with starting_by("fork"), inspect:
        yield
