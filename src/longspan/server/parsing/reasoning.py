"""Parser of thoughts between marks, such as `<think>` and `</think>`; the rest goes to the next parser.

Holds the split. Must not know which models have which marks.
Read next: `longspan.server.parsing.base`; `longspan.server.parsing.select`, which knows the marks.
"""

from collections.abc import Sequence

from longspan.server.parsing.base import Parser, Piece, Thought, held_back


class Thoughts:
    """Parser that hands on what stands outside of the marks, the white space around the marks left out."""

    def __init__(self, start: str, end: str, rest: Parser, *, is_inside: bool) -> None:
        """Read nothing yet.

        Args:
            start: mark where thoughts begin.
            end: mark where they end.
            rest: parser of the answer.
            is_inside: whether the prompt ended behind a start mark, so that the output begins with thoughts.
        """
        self._start, self._end, self._rest = start, end, rest
        self._is_inside, self._is_over = is_inside, False
        self._strips = True  # white space at the beginning of thoughts, or of the answer, is dropped
        self._kept = ""

    @property
    def is_inside(self) -> bool:
        """Whether the output so far ends among thoughts."""
        return self._is_inside

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next text; return what is certain now."""
        if not self._kept and not self._strips:  # as most are
            if self._is_over:
                return self._rest.feed(text)
            if self._is_inside and text and self._end[0] not in text and not text[-1].isspace():
                return [Thought(text)]
        self._kept += text
        found: list[Piece] = []
        while self._kept and not self._is_over:
            if not self._is_inside and not self._opens(found):
                return found
            if self._is_inside and not self._think(found):
                return found
        return [*found, *self._answer()]

    def finish(self) -> Sequence[Piece]:
        """Return what was held back; the output ends here."""
        kept, self._kept = self._kept, ""
        found: list[Piece] = []
        if kept:
            found = [Thought(kept)] if self._is_inside else [*self._rest.feed(kept)]
        return [*found, *self._rest.finish()]

    def _opens(self, found: list[Piece]) -> bool:
        """Enter the thoughts if the output begins with their mark; return False while that is open."""
        begin = self._kept.lstrip()
        if begin.startswith(self._start):
            self._kept, self._is_inside, self._strips = begin[len(self._start) :], True, True
            return True
        if self._start.startswith(begin):
            return False
        self._is_over, self._strips = True, False
        return True

    def _think(self, found: list[Piece]) -> bool:
        """Read thoughts; return whether they are over."""
        if self._strips:
            self._kept = self._kept.lstrip()
            self._strips = not self._kept
        thoughts, mark, rest = self._kept.partition(self._end)
        if mark:
            if thoughts := thoughts.rstrip():
                found.append(Thought(thoughts))
            self._kept, self._is_inside, self._is_over, self._strips = rest, False, True, True
            return True
        keep = held_back(self._kept, [self._end])
        sure = self._kept[: len(self._kept) - keep].rstrip()  # white space in front of the mark is no thought
        if sure:
            found.append(Thought(sure))
        self._kept = self._kept[len(sure) :]
        return False

    def _answer(self) -> Sequence[Piece]:
        kept, self._kept = self._kept, ""
        if self._strips:
            kept = kept.lstrip()
            self._strips = not kept
        return self._rest.feed(kept) if kept else []
