"""The `longspan` command.

Holds the command group, and how errors become exit codes: 2 for bad input, 1 for failure, 130 for Ctrl-C. Must not
import torch before a command needs it: `longspan --help` answers at once.
Read next: `longspan.cli.generate`.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from longspan import __version__
from longspan.cli.generate import generate
from longspan.errors import ConfigError, LongspanError


@click.group()
@click.version_option(__version__, prog_name="longspan")
def cli() -> None:
    """Exact context parallelism for LLM inference."""


cli.add_command(generate)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def main() -> NoReturn:
    """Entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = bool(os.environ.get("LONGSPAN_DEBUG"))
    try:
        cli(standalone_mode=False)
        sys.exit(0)
    except click.ClickException as error:
        _say(error.format_message())
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        sys.exit(130)
    except ConfigError as error:
        if debug:
            raise
        _say(str(error))
        sys.exit(2)
    except LongspanError as error:
        if debug:
            raise
        _say(str(error))
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: no second error at exit
        sys.exit(1)


def _say(text: str) -> None:
    print(f"longspan: {' '.join(text.split())}", file=sys.stderr)
