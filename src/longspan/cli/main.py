"""The `longspan` command.

Holds the command group, and how errors become exit codes: 2 for bad input, 1 for failure, 130 for Ctrl-C. Must not
import torch before a command needs it: `longspan --help` answers at once.
Read next: `longspan.cli.generate`.
"""

import contextlib
import io
import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import get_completion_class

from longspan import __version__
from longspan.cli.cache import cache
from longspan.cli.chat import chat
from longspan.cli.generate import generate
from longspan.cli.models import models
from longspan.cli.needle import needle
from longspan.cli.options import as_typed
from longspan.cli.plan import plan
from longspan.cli.serve import serve
from longspan.cli.topology import topology
from longspan.errors import ConfigError, LongspanError

DEBUG = "LONGSPAN_DEBUG"
"""Environment variable that, if set, shows tracebacks and the libraries' warnings."""


@click.group(no_args_is_help=False, invoke_without_command=True)
@click.version_option(__version__, prog_name="longspan")
@click.option(
    "--completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    is_eager=True,
    expose_value=False,
    callback=lambda context, _option, shell: _complete(context, shell),
    help='Print what completes commands and options in a shell: eval "$(longspan --completion bash)".',
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Exact context parallelism for LLM inference."""
    if context.invoked_subcommand is None:
        raise ConfigError(f"command: got none, legal is {', '.join(cli.commands)}; see longspan --help")


def _complete(context: click.Context, shell: str | None) -> None:
    """Print a shell's completion script, and end."""
    if shell is None or context.resilient_parsing:
        return
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, "longspan", "_LONGSPAN_COMPLETE")
    click.echo(script.source_template % script.source_vars())  # `source` would start the shell to ask its version
    context.exit()


cli.add_command(cache)
cli.add_command(chat)
cli.add_command(generate)
cli.add_command(models)
cli.add_command(needle)
cli.add_command(plan)
cli.add_command(serve)
cli.add_command(topology)


class _Signalled(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt, on which click writes an empty line."""

    def __init__(self, number: int) -> None:
        self.number = number


def _raise_signalled(number: int, frame: FrameType | None) -> NoReturn:
    # The ranks end in much less than two seconds: a second Ctrl-C meanwhile must not leave some of them running.
    for deaf_to in (signal.SIGINT, signal.SIGTERM):
        signal.signal(deaf_to, signal.SIG_IGN)
    if _is_importing(frame):  # torch, which tries to import numpy, would swallow what is raised there
        _end_signalled(number)  # the ranks notice within half a second
    raise _Signalled(number)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an import is under way."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end(code: int) -> NoReturn:
    """End at once. Python would first take torch apart: 0.9 s on an idle 2-core machine, up to 2.8 s on a busy one."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _end_signalled(number: int) -> NoReturn:
    if number == signal.SIGINT:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has written ^C
        _say("interrupted")
    _end(128 + number)


def main() -> NoReturn:
    """Entry point of the process."""
    try:
        run_command()
    except SystemExit as ended:
        _end(ended.code if isinstance(ended.code, int) else 1)


def run_command() -> NoReturn:
    """Run the command line.

    Raises:
        SystemExit: always, except on a signal, which ends the process.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell runs this in the background
        signal.signal(signal.SIGINT, _raise_signalled)
    signal.signal(signal.SIGTERM, _raise_signalled)
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may hold what a terminal of Latin-1 cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = bool(os.environ.get(DEBUG))
    if not debug:
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # read when they are imported
            os.environ.setdefault(name, "error")
    try:
        cli(prog_name="longspan", standalone_mode=False)
        sys.exit(0)
    except click.ClickException as error:
        _say(error.format_message())
        sys.exit(2)
    except _Signalled as signalled:
        _end_signalled(signalled.number)
    except (KeyboardInterrupt, click.Abort):
        _end_signalled(signal.SIGINT)
    except (LongspanError, OSError) as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError):  # the reader is gone: no second error at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            _say(as_typed(str(error)) if isinstance(error, ConfigError) else str(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _say(text: str) -> None:
    print(f"longspan: {' '.join(text.split())}", file=sys.stderr)
