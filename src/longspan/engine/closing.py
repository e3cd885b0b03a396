"""`with` for objects that have something to end.

Holds one base class. Must not know what is ended.
Read next: `longspan.engine.engine` and `longspan.llm`, which derive from it.
"""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class ClosedAtExit(ABC):
    """An object that a `with` block closes at its end, also after an exception."""

    @abstractmethod
    def close(self) -> None:
        """End what the object holds. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
