"""Text that repeats itself, a schema, and engines of `recall` with and without drafts, for tests of text."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan import LLM

TEXT = Path(argparse.__file__).read_text()[:700]
STRIPED = {"context_parallel_size": 2, "placement": "striped", "page_size": 16, "stripe_size": 32}
THREADS = {"executor": "threads", "threads_per_rank": 1, "kv_cache_memory": 2**26, **STRIPED}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "digits": {"type": "array", "items": {"type": "integer"}}},
        "required": ["city", "digits"],
    }
)
VALUE = '{"city": "Lima", "digits": [1, 2, 3, 4, 5, 6, 7, 8, 9]}'
"""Text that follows `SCHEMA`."""


@contextmanager
def plain_and_drafting(drafts: dict[str, Any]) -> Iterator[tuple[LLM, LLM]]:
    """An engine without drafts, and one with them."""
    with LLM("recall", **THREADS) as plain, LLM("recall", speculative_config=drafts, **THREADS) as drafting:
        yield plain, drafting
