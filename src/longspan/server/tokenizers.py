"""Tokenizers for a server: text work runs in threads, so that the event loop always answers.

Holds the threads and their copies of the tokenizer. Must not know requests or engines.
Read next: `longspan.models.detokenizer`.

Note [One copy per thread]
    A fast tokenizer keeps its truncation and padding settings inside the Rust object. Used by two threads at once it
    may raise "Already borrowed". So every thread has a copy, and the event loop has its own for decoding a few tokens.
"""

import asyncio
import copy
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")

LONG_TEXT, VERY_LONG_TEXT = 50_000, 500_000
"""Characters or tokens from which work must not delay shorter work: 50,000 took 30 ms, a million over a second."""

NUM_VERY_LONG_THREADS = 2


class TokenizerPool:
    """A tokenizer for the event loop, and copies of it for threads: work waits only for work of about its length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        """Tokenizer that only the event loop may use."""
        self._local = threading.local()
        self._copies: queue.SimpleQueue[PreTrainedTokenizerBase] = queue.SimpleQueue()
        for _ in range(2 + NUM_VERY_LONG_THREADS):
            self._copies.put(copy.deepcopy(tokenizer))
        self._short = self._threads(1, "longspan-text")
        self._long = self._threads(1, "longspan-long-text")
        self._very_long = self._threads(NUM_VERY_LONG_THREADS, "longspan-very-long-text")

    def _threads(self, count: int, name: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(count, name, initializer=self._take_copy)

    def _take_copy(self) -> None:
        self._local.tokenizer = self._copies.get_nowait()

    async def run(self, work: Callable[[PreTrainedTokenizerBase], Result], size: int) -> Result:
        """Call `work` with a tokenizer of its own, in a thread.

        Args:
            work: function of a tokenizer.
            size: size of the work, in characters or tokens.
        """
        threads = self._short if size < LONG_TEXT else self._long if size < VERY_LONG_TEXT else self._very_long
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: work(self._local.tokenizer))

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        for threads in (self._short, self._long, self._very_long):
            threads.shutdown(wait=False, cancel_futures=True)
