"""Drafts from a request's own tokens: what followed when its newest tokens stood there before.

Holds an index of all n-grams of one sequence. Must not know requests, or how many drafts pay.
Read next: `longspan.scheduler.drafting`, which asks for drafts.

Note [The index]
    A table of slots per length of n-grams: the slot of an n-gram's hash holds the position behind its latest
    occurrence. Another n-gram with the same slot replaces it, and tokens are compared before an occurrence counts: so a
    collision costs a match and never finds a wrong one. Tables have two to four slots of 4 bytes per token, so that an
    n-gram is lost with probability 0.4 at most, and then the one a token further is mostly there. With n = 3:

        position     0   1   2   3   4   5   6   7   8
        token        a   b   c   d   x   a   b   c          slot of "a b c": 3, then 8
                                 ^                   ^
        At position 8 the slot says 3: drafts are d x a ..., and the slot says 8 from now on.

    A match is followed as long as it tells the truth, without being looked up again.
"""

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FACTOR = 0x9E3779B97F4A7C15
"""Odd 64-bit factor of the hash: the fractional part of the golden ratio."""

_BITS = 64
_MASK = (1 << _BITS) - 1
_FIRST_BITS = 10
BULK_TOKENS = 64
"""Tokens from which on they are hashed all at once."""


class NgramProposer:
    """Index of the n-grams of one sequence, which only grows at its end."""

    num_coming = 0

    def __init__(self, longest: int, shortest: int) -> None:
        """Begin without tokens.

        Args:
            longest: length of the n-grams that are looked up first.
            shortest: length of those that are looked up else.
        """
        self._lengths = tuple(sorted({longest, shortest}, reverse=True))
        self._bits = _FIRST_BITS
        self._tables = self._empty_tables()
        self._num_read = 0
        self._match: int | None = None  # position of the token that is expected next

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.itemsize * len(table) for table in self._tables)

    def read(self, token_ids: Sequence[int], end: int) -> None:
        """Take in the tokens of the sequence before position `end`."""
        if end > 1 << (self._bits - 1):
            self._bits = max(self._bits + 1, end.bit_length() + 1)
            self._tables = self._empty_tables()
            self._read_all(token_ids, 0, self._num_read)
        if end - self._num_read >= BULK_TOKENS:
            self._read_all(token_ids, self._num_read, end - 1)
            self._num_read, self._match = end - 1, None
        for position in range(self._num_read, end):
            self._read_one(token_ids, position)
        self._num_read = max(self._num_read, end)

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Drafts of the tokens that follow the whole sequence; none where its end did not occur before."""
        self.read(token_ids, len(token_ids))
        if self._match is None:
            return []
        found = list(token_ids[self._match : self._match + most])
        period = len(token_ids) - self._match
        while len(found) < most:  # the sequence goes on with the drafts themselves
            found.append(found[len(found) - period])
        return found

    def end(self) -> None:
        """Do nothing: the tables go with the request."""

    def _empty_tables(self) -> list["array[int]"]:
        return [array("i", bytes(4 << self._bits)) for _ in self._lengths]

    def _read_one(self, token_ids: Sequence[int], position: int) -> None:
        match, end = self._match, position + 1
        if match is not None:
            match = match + 1 if token_ids[match] == token_ids[position] else None
        for length, table in zip(self._lengths, self._tables, strict=True):
            if end < length:
                continue
            ngram = token_ids[end - length : end]
            hashed = 0
            for token_id in ngram:
                hashed = (hashed + token_id + 1) * FACTOR & _MASK
            slot = hashed >> (_BITS - self._bits)
            before, table[slot] = table[slot], end
            if match is None and before and token_ids[before - length : before] == ngram:
                match = before
        self._match = match

    def _read_all(self, token_ids: Sequence[int], start: int, end: int) -> None:
        """Put the n-grams that end behind positions `[start, end)` into the tables."""
        for length, table in zip(self._lengths, self._tables, strict=True):
            first = max(0, start - length + 1)
            tokens: NDArray[np.uint64] = np.array(token_ids[first:end], dtype=np.uint64)
            num_ngrams = len(tokens) - length + 1
            if num_ngrams <= 0:
                continue
            hashed = np.zeros(num_ngrams, dtype=np.uint64)
            for i in range(length):
                hashed = (hashed + tokens[i : i + num_ngrams] + np.uint64(1)) * np.uint64(FACTOR)
            slots = hashed >> np.uint64(_BITS - self._bits)
            ends = np.arange(first + length, end + 1, dtype=np.int32)
            np.frombuffer(table, dtype=np.int32)[slots] = ends  # of equal slots the last one counts
