"""Structured output: conversion of JSON schemas to constraints.

Holds the one `Grammars` of a model, made when it is first asked for. Must not know requests.
Read next: `longspan.models.grammar`.
"""

import asyncio
import threading
from collections.abc import Callable

from longspan.errors import ConfigError
from longspan.models.grammar import GrammarConstraint, Grammars
from longspan.scheduler.request import Constraint
from longspan.server.errors import ApiError
from longspan.types import SamplingParams


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

    async def constraints(self, params: SamplingParams) -> Callable[[], Constraint | None]:
        """Compile a request's schema once; return a function that gives each answer its own constraint.

        The function returns None if no schema was asked for.

        Raises:
            ApiError: the schema cannot be followed.
        """
        if params.json_schema is None:
            return lambda: None
        first = await asyncio.to_thread(self._compile, params.json_schema)
        return first.copy

    def _compile(self, schema: str) -> GrammarConstraint:
        try:
            return self._grammars().compile(schema)
        except ConfigError as error:
            raise ApiError(400, f"response_format: {error}", param="response_format") from None

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
