"""Progress of one request on standard error.

Holds the display. Must not know engines.
Read next: `longspan.cli.generate`.
"""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.llm import Progress

LINE_EVERY_S = 5.0
"""Seconds between two lines where standard error is no terminal."""


class ProgressPrinter:
    """Display of tokens prefilled, rate and time left, then of tokens generated: a bar on a terminal, else lines."""

    def __init__(self, max_tokens: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._max_tokens = max_tokens
        self._last_line_s = time.perf_counter()
        self._is_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task("prefill", total=None, status="")

    def update(self, progress: "Progress") -> None:
        """Show how far the request is."""
        p = progress
        if p.generated_tokens == 0:
            status = f"{p.prefilled_tokens}/{p.prompt_tokens} tokens"
            if p.prefill_left_s is not None:
                status += f", {p.prefilled_tokens / p.elapsed_s:.0f} tokens/s, {p.prefill_left_s:.0f} s left"
            self._show("prefill", p.prefilled_tokens, p.prompt_tokens, status)
        else:
            status = f"{p.generated_tokens}/{self._max_tokens} tokens"
            self._show("decode", p.generated_tokens, self._max_tokens, status)

    def _show(self, phase: str, done: int, total: int, status: str) -> None:
        if self._is_terminal:
            self._bar.update(self._task, description=phase, completed=done, total=total, status=status)
        elif time.perf_counter() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.perf_counter()
            print(f"{phase}: {status}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._is_terminal:  # else it would write an empty line
            self._bar.stop()

    def __enter__(self) -> "ProgressPrinter":
        self._last_line_s = time.perf_counter()
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
