"""longspan: exact context parallelism for LLM inference.

One long request's tokens and KV cache are split over several devices along the sequence. Start with `LLM`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.errors import ConfigError, LongspanError, WorkerError
    from longspan.llm import LLM, CompletionOutput, RequestOutput
    from longspan.types import FinishReason, SamplingParams

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "longspan.llm",
    "CompletionOutput": "longspan.llm",
    "ConfigError": "longspan.errors",
    "FinishReason": "longspan.types",
    "LongspanError": "longspan.errors",
    "RequestOutput": "longspan.llm",
    "SamplingParams": "longspan.types",
    "WorkerError": "longspan.errors",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "FinishReason",
    "LongspanError",
    "RequestOutput",
    "SamplingParams",
    "WorkerError",
]


def __getattr__(name: str) -> object:
    """Import on first use: `import longspan` alone must not import torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
