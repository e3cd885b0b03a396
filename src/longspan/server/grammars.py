"""Structured output: conversion of JSON schemas to constraints.

Holds the one `Grammars` of a model, made when it is first asked for. Must not know requests.
Read next: `longspan.models.grammar`.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from longspan.errors import ConfigError
from longspan.models.grammar import GrammarConstraint, Grammars
from longspan.scheduler.request import Constraint
from longspan.server.errors import ApiError
from longspan.types import SamplingParams


class AfterThoughts:
    """Constraint that counts once the model has thought: behind the mark that ends thoughts, if it begins with some."""

    def __init__(self, inner: Constraint, start_id: int, end_id: int, *, is_inside: bool) -> None:
        """Constrain nothing yet.

        Args:
            inner: what the answer must be.
            start_id: token with which thoughts begin.
            end_id: token with which they end.
            is_inside: whether the output begins with thoughts, as the prompt ends with their mark.
        """
        self._inner, self._start_id, self._end_id = inner, start_id, end_id
        self._is_inside, self._is_first = is_inside, True

    def allowed(self) -> bytes | None:
        """Bit mask of the tokens that may come next, or None for all."""
        if self._is_inside:
            return None
        mask = self._inner.allowed()
        if mask is None or not self._is_first:
            return mask
        wider = bytearray(mask)
        wider[self._start_id // 8] |= 1 << self._start_id % 8
        return bytes(wider)

    def copy(self) -> "AfterThoughts":
        """Copy the state."""
        found = AfterThoughts(self._inner.copy(), self._start_id, self._end_id, is_inside=self._is_inside)
        found._is_first = self._is_first
        return found

    def accept(self, token_id: int) -> None:
        """Take the token that came next.

        Raises:
            LongspanError: nothing can follow.
        """
        is_first, self._is_first = self._is_first, False
        if self._is_inside:
            self._is_inside = token_id != self._end_id
        elif is_first and token_id == self._start_id:
            self._is_inside = True
        else:
            self._inner.accept(token_id)


@dataclass(frozen=True, slots=True)
class CallRule:
    """Rule for calls that a model makes by itself."""

    begin: str
    """Text behind which the grammar counts."""
    grammar: str
    """What follows, up to the call's end."""


class InCalls:
    """Constraint that counts inside of calls, from the text with which one begins to its end."""

    def __init__(self, first: GrammarConstraint, begin: bytes, bytes_of: Callable[[int], bytes]) -> None:
        """Constrain nothing yet.

        Args:
            first: what a call must be, at its begin.
            begin: bytes behind which it counts, if a token ends with them: a longer token leaves that call free.
            bytes_of: bytes of a token.
        """
        self._first, self._begin, self._bytes_of = first, begin, bytes_of
        self._inner: GrammarConstraint | None = None
        self._tail = b""

    def allowed(self) -> bytes | None:
        """Bit mask of the tokens that may come next, or None for all."""
        return None if self._inner is None else self._inner.allowed()

    def copy(self) -> "InCalls":
        """Copy the state."""
        found = InCalls(self._first, self._begin, self._bytes_of)
        found._inner, found._tail = None if self._inner is None else self._inner.copy(), self._tail
        return found

    def accept(self, token_id: int) -> None:
        """Take the token that came next.

        Raises:
            LongspanError: nothing can follow.
        """
        if self._inner is not None:
            self._inner.accept(token_id)
            if self._inner.is_complete:
                self._inner, self._tail = None, b""
            return
        self._tail = (self._tail + self._bytes_of(token_id))[-len(self._begin) :]
        if self._tail == self._begin:
            self._inner = self._first.copy()


class LazyGrammars:
    """Compiles schemas in threads. Reading a large vocabulary takes seconds, and many servers never need it."""

    def __init__(self, make: Callable[[], Grammars]) -> None:
        """Compile nothing yet.

        Args:
            make: called once, for the first schema; its ConfigError refuses all structured output.
        """
        self._make = make
        self._lock = threading.Lock()
        self._made: Grammars | ConfigError | None = None

    async def constraints(
        self, params: SamplingParams, field: str = "response_format", calls: CallRule | None = None
    ) -> Callable[[], Constraint | None]:
        """Compile a request's schema once; return a function that gives each answer its own constraint.

        Args:
            params: what the answer must be.
            field: field of the request that says so.
            calls: rule for calls in an answer that is free else.

        Returns:
            A function that returns a new constraint, or None if no schema was asked for.

        Raises:
            ApiError: the schema cannot be followed.
        """
        if calls is not None and not params.is_constrained:
            rule = calls
            inner, bytes_of = await asyncio.to_thread(self._compile_rule, rule, field)
            return lambda: InCalls(inner, rule.begin.encode(), bytes_of)
        if not params.is_constrained:
            return lambda: None
        first = await asyncio.to_thread(self._compile, params, field)
        return first.copy

    def _compile(self, params: SamplingParams, field: str) -> GrammarConstraint:
        try:
            found = self._grammars().constraint(params)
        except ConfigError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None
        assert found is not None
        return found

    def _compile_rule(self, rule: CallRule, field: str) -> tuple[GrammarConstraint, Callable[[int], bytes]]:
        try:
            grammars = self._grammars()
            return grammars.compile_grammar(rule.grammar), grammars.bytes_of
        except ConfigError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None

    def _grammars(self) -> Grammars:
        with self._lock:
            if self._made is None:
                try:
                    self._made = self._make()
                except ConfigError as error:
                    self._made = error
        if isinstance(self._made, ConfigError):
            raise self._made
        return self._made
