"""A conversation in the terminal: lines come in, answers are written as they come.

Holds messages, commands and what Ctrl-C means. Must not know what answers.
Read next: `longspan.cli.chat_models`.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from longspan.cli.chat_models import ChatModel, Message
from longspan.cli.progress import ProgressPrinter, say_counts
from longspan.errors import ConfigError, LongspanError, WorkerError
from longspan.llm import Progress

HELP = """/reset         forget the conversation
/system TEXT   set the system prompt, and forget the conversation
/file PATH     put a text file in front of the next message
/exit          end; so does Ctrl-D
Ctrl-C         ends the answer that is being written, and not the chat"""

ReadLine = Callable[[], str | None]
"""Function that returns the next line, or None at the end; it may raise KeyboardInterrupt."""


class ChatSession:
    """One conversation, and the commands that change it."""

    def __init__(self, *, system: str | None, max_tokens: int | None, is_quiet: bool) -> None:
        """Begin without a message.

        Args:
            system: system prompt, or None.
            max_tokens: most tokens of an answer, for the display; None if nobody set it.
            is_quiet: whether an answer ends without a line of its times.
        """
        self._system, self._max_tokens, self._is_quiet = system, max_tokens, is_quiet
        self._messages: list[Message] = []
        self._files: list[str] = []  # texts that go in front of the next message

    def attach(self, path: str) -> None:
        """Put a text file in front of the next message.

        Raises:
            ConfigError: it cannot be read as UTF-8.
        """
        try:
            self._files.append(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"file: got {path!r}, legal is a file of UTF-8 text: {reason}") from None

    def run(self, model: ChatModel, read_line: ReadLine) -> None:
        """Answer line after line until the input ends. Ctrl-C ends an answer; at the prompt it says how to end."""
        with _interrupts():
            goes_on = True
            while goes_on:
                try:
                    goes_on = self._take_line(model, read_line)
                except KeyboardInterrupt:  # also just before the prompt, or behind it
                    click.echo("\n(Ctrl-D or /exit ends the chat)", err=True)

    def _take_line(self, model: ChatModel, read_line: ReadLine) -> bool:
        """Answer one line; return whether more may come."""
        line = read_line()
        if line is None or line.strip() == "/exit":
            return False
        if line.startswith("/"):
            self._command(line)
        elif line.strip():
            self._answer_or_say(model, line)
        return True

    def say(self, model: ChatModel, text: str) -> None:
        """Send one message, and write the answer to standard output.

        Raises:
            LongspanError: there is no answer; the conversation is as before.
            KeyboardInterrupt: Ctrl-C; what was written so far is part of the conversation.
        """
        content = "\n\n".join([*self._files, text])
        messages = [*self._messages, {"role": "user", "content": content}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        with _Answer(self._max_tokens) as display:
            try:
                counts = model.answer([*system, *messages], display)
            finally:
                if display.text or not isinstance(sys.exception(), LongspanError):
                    self._messages = [*messages, {"role": "assistant", "content": display.text}]
                    self._files = []
        click.echo()
        if not self._is_quiet:
            say_counts(counts)

    def _answer_or_say(self, model: ChatModel, line: str) -> None:
        try:
            self.say(model, line)
        except KeyboardInterrupt:
            click.echo("\n(stopped)", err=True)
        except WorkerError:
            raise  # the ranks are lost
        except LongspanError as error:
            click.echo(f"longspan: {error}", err=True)

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        match name:
            case "/reset":
                self._messages, self._files = [], []
                click.echo("(the conversation is forgotten)", err=True)
            case "/system":
                self._system, self._messages = rest.strip() or None, []
                click.echo("(new system prompt)" if self._system else "(no system prompt)", err=True)
            case "/file":
                try:
                    self.attach(rest.strip())
                except ConfigError as error:
                    click.echo(f"longspan: {error}", err=True)
                else:
                    click.echo(f"({len(self._files[-1]):,} characters go in front of your next message)", err=True)
            case "/help" | "/?":
                click.echo(HELP, err=True)
            case _:
                click.echo(f"longspan: {name} is no command; /help lists them", err=True)


class _Answer:
    """Display of one answer: a bar until the first text comes, then the text as it comes."""

    def __init__(self, max_tokens: int | None) -> None:
        self._printer = ProgressPrinter(max_tokens)
        self._is_thinking = False
        self.text = ""
        """Text so far."""

    def progress(self, progress: Progress) -> None:
        if not progress.new_text:
            if not self.text and not self._is_thinking:
                self._printer.update(progress)
            return
        self._printer.close()
        if self._is_thinking:
            self._is_thinking = False
            click.echo("\n", err=True)
        self.text += progress.new_text
        click.echo(progress.new_text, nl=False)
        sys.stdout.flush()

    def thought(self, text: str) -> None:
        self._printer.close()
        self._is_thinking = True
        click.echo(click.style(text, dim=True), err=True, nl=False)

    def __enter__(self) -> "_Answer":
        self._printer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._printer.close()


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block, unless a shell has this process ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
