"""`longspan chat`: talk with a model, or with one behind a server's address.

Holds options, and where lines come from. Must not know how anything runs.
Read next: `longspan.cli.chat_session`.
"""

import re
import sys
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from longspan.cli.adapters import adapter_option, check_chosen
from longspan.cli.chat_models import ChatModel, LoadedModel, ServedModel
from longspan.cli.chat_session import ChatSession, ReadLine
from longspan.cli.help import GroupedCommand
from longspan.cli.options import Later, engine_config, options_of, take
from longspan.cli.progress import loading
from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.imports import quick_imports
from longspan.types import SamplingParams

MAX_TOKENS = 1024
"""Most tokens of an answer of a model that runs here by default, where so many fit."""

PROMPT = ">>> "


EXAMPLES = """longspan chat smollm2
longspan chat ./model --context-parallel-size 2 --system "Answer in one sentence." --file report.txt
longspan chat http://127.0.0.1:8000
echo "What is context parallelism?" | longspan chat smollm2 --quiet"""


@click.command(cls=GroupedCommand, examples=EXAMPLES)
@click.argument("model", metavar="MODEL|URL")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--file", "files", metavar="FILE", multiple=True, help="Text in front of the first message; several times."
)
@click.option("--api-key", envvar="LONGSPAN_API_KEY", help="Key of the server; better in LONGSPAN_API_KEY.")
@click.option("--quiet", is_flag=True, help="No line with tokens and times behind an answer.")
@adapter_option(", or a name of the server's")
@options_of(SamplingParams, {"max_tokens": Later(f"{MAX_TOKENS}, or what fits; of a server its own")})
@options_of(EngineConfig, serves=False)
def chat(
    model: str,
    system: str | None,
    files: tuple[str, ...],
    api_key: str | None,
    quiet: bool,
    adapter: str | None,
    **options: Any,
) -> None:
    """Talk with MODEL (a directory, a .gguf file, `smollm2`, or a Hub id), or with the one behind a server's URL.

    Lines are messages; /help lists commands. Ctrl-C ends an answer, Ctrl-D the chat. If standard input is no terminal,
    all of it is one message.
    """
    source_of = click.get_current_context().get_parameter_source
    given = [name for name in options if source_of(name) is not ParameterSource.DEFAULT]
    is_default = options["max_tokens"] is None
    if is_default:
        options["max_tokens"] = max(MAX_TOKENS, options["min_tokens"])
    params = SamplingParams(**take(SamplingParams, options))
    session = ChatSession(system=system, max_tokens=None if is_default else params.max_tokens, is_quiet=quiet)
    for file in files:
        session.attach(file)
    if re.match(r"https?://", model):
        if wrong := [name for name in given if name in options]:
            raise ConfigError(f"{wrong[0]}: got it with a server's address, legal is with a model that runs here")
        _talk(session, ServedModel(model, api_key, {name: getattr(params, name) for name in given}, adapter))
        return
    if source_of("api_key") is ParameterSource.COMMANDLINE:
        raise ConfigError("api_key: got one with a model that runs here, legal is with a server's address")
    config = engine_config(model, options)
    assert not options
    check_chosen(config, adapter)
    with loading(model), quick_imports(for_good=True):
        from longspan.llm import LLM

        opened = LLM(**msgspec.structs.asdict(config))
    with opened as llm:
        _talk(session, LoadedModel(llm, model, params, clamps_max_tokens=is_default, adapter=adapter))


def _talk(session: ChatSession, model: ChatModel) -> None:
    """Answer the lines of a terminal, or all of standard input at once."""
    if sys.stdin.isatty():
        click.echo(f"Chatting with {model.name}. /help lists commands, Ctrl-D ends.", err=True)
        session.run(model, _terminal_lines())
    else:
        session.say(model, _standard_input())


def _terminal_lines() -> ReadLine:
    """Return a reader of lines that can be edited, with the earlier ones behind the arrow keys."""
    import readline  # noqa: F401  # `input` then edits

    def read() -> str | None:
        try:
            return input(PROMPT)
        except EOFError:
            click.echo(err=True)
            return None

    return read


def _standard_input() -> str:
    """Return all of standard input.

    Raises:
        ConfigError: it is empty, or no UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"message: not UTF-8 at byte offset {error.start}, legal is UTF-8 text") from None
    if not text.strip():
        raise ConfigError("message: got an empty standard input, legal is a text, or a terminal")
    return text
