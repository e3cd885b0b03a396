"""Progress of one request on standard error, and what is said of it at its end.

Holds the display. Must not know engines.
Read next: `longspan.cli.generate`.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from longspan.llm import Progress

LINE_EVERY_S = 5.0
"""Seconds between two lines where standard error is no terminal."""


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Say on a terminal that a model is being loaded, for as long as the context lasts."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"loading {model} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class ProgressPrinter:
    """Display of tokens prefilled, rate and time left, then of tokens generated: a bar on a terminal, else lines."""

    def __init__(self, max_tokens: int | None) -> None:
        """Show nothing yet.

        Args:
            max_tokens: most tokens that can come; None if nobody knows.
        """
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._max_tokens = max_tokens
        self._last_line_s = time.perf_counter()
        self._first: tuple[int, float] | None = None  # tokens and seconds when the first token came
        self._is_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
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
            first_tokens, first_s = self._first = self._first or (p.generated_tokens, p.elapsed_s)
            status = f"{p.generated_tokens}" + ("" if self._max_tokens is None else f"/{self._max_tokens}") + " tokens"
            num_later, later_s = p.generated_tokens - first_tokens, p.elapsed_s - first_s
            if num_later and later_s > 0:
                status += f", {num_later / later_s:.1f} tokens/s"
            self._show("decode", p.generated_tokens, self._max_tokens, status)

    def _show(self, phase: str, done: int, total: int | None, status: str) -> None:
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
            try:
                self._bar.start()
            except BaseException:  # Ctrl-C: `__exit__` is not called, and the bar would be drawn for ever
                self._bar.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens and times of one request that has ended."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    generated_tokens: int
    first_token_s: float | None
    """Seconds until the first token; None if there was none."""
    total_s: float
    """Seconds until the last token."""


def counts_text(counts: Counts) -> str:
    """One line with a request's tokens, times and rates."""
    c = counts
    prompt = f"{c.prompt_tokens:,} prompt tokens" + f" ({c.cached_tokens:,} cached)" * bool(c.cached_tokens)
    if c.first_token_s is None:
        return f"{prompt}; no token in {c.total_s:.2f} s"
    num_new = c.prompt_tokens - c.cached_tokens
    prompt += f" in {c.first_token_s:.2f} s ({num_new / max(c.first_token_s, 1e-9):,.0f} tokens/s)"
    later_s = c.total_s - c.first_token_s
    answer = f"{c.generated_tokens:,} generated in {c.total_s:.2f} s"
    if c.generated_tokens > 1 and later_s > 0:
        answer += f" ({(c.generated_tokens - 1) / later_s:.1f} tokens/s)"
    return f"{prompt}; {answer}"


def say_counts(counts: Counts) -> None:
    """Write the line to standard error, dimmed on a terminal."""
    click.echo(click.style(f"longspan: {counts_text(counts)}", dim=True), err=True)
