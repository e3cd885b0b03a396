"""`longspan generate`: continue one prompt.

Holds options, prompt files and output. Must not know how anything runs.
Read next: `longspan.llm`.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from longspan.cli.adapters import adapter_option, check_chosen
from longspan.cli.explain import choices_text, shares_text, states_text
from longspan.cli.help import GroupedCommand
from longspan.cli.options import Later, engine_config, options_of, take
from longspan.cli.progress import Counts, ProgressPrinter, loading, say_counts
from longspan.config import EngineConfig
from longspan.errors import ConfigError, LongspanError
from longspan.imports import quick_imports
from longspan.types import SamplingParams

if TYPE_CHECKING:
    from longspan.llm import LLM, Progress, RequestOutput

MAX_TOKENS = 128
"""Default of `max_tokens`, where so many fit."""


EXAMPLES = """longspan generate smollm2 --prompt "The capital of France is" --max-tokens 5
cat report.txt question.txt | longspan generate recall --context-parallel-size 2
longspan generate recall --prompt-file book.txt --explain --context-parallel-size 2 --json"""


@click.command(cls=GroupedCommand, examples=EXAMPLES)
@click.argument("model")
@click.argument("stdin", metavar="[-]", required=False)
@click.option("--prompt", help="The prompt's text, used raw.")
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a UTF-8 file; a lone - reads standard input.")
@click.option("--strip-newline", is_flag=True, help="Drop one line break at the prompt's end, as echo writes it.")
@click.option("--explain", is_flag=True, help="Say on standard error which strategies were chosen, and why.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--quiet", is_flag=True, help="No hints, and no last line with tokens and times.")
@adapter_option()
@options_of(SamplingParams, {"max_tokens": Later(f"{MAX_TOKENS}, or what fits")})
@options_of(EngineConfig, serves=False)
def generate(
    model: str,
    stdin: str | None,
    prompt: str | None,
    prompt_file: str | None,
    strip_newline: bool,
    explain: bool,
    as_json: bool,
    quiet: bool,
    adapter: str | None,
    **options: Any,
) -> None:
    """Continue one prompt with MODEL: a directory, a .gguf file, `recall`, `smollm2`, or a Hub id.

    The text goes to standard output as it comes, progress and times to standard error. Without --prompt and
    --prompt-file, the prompt is standard input.
    """
    is_default = options["max_tokens"] is None
    if is_default:
        options["max_tokens"] = max(MAX_TOKENS, options["min_tokens"])
    params = SamplingParams(**take(SamplingParams, options))
    config = engine_config(model, options)  # refuse illegal values before anything is read or imported
    assert not options
    check_chosen(config, adapter)
    text = read_prompt(prompt, prompt_file, stdin)
    if strip_newline:
        text = _stripped(text)

    with loading(model), quick_imports(for_good=True):
        from longspan.llm import LLM

        opened = LLM(**msgspec.structs.asdict(config))
    with opened as llm:
        if not quiet and not as_json:
            _hint(llm, model, text)
        started = time.perf_counter()
        with _Shown(params.max_tokens, streams=not as_json) as shown:
            (output,) = llm.generate(text, params, lora=adapter, on_progress=shown.update, clamps_max_tokens=is_default)
        total_s = time.perf_counter() - started
        if explain:
            for line in (shares_text(llm.rank_stats()), states_text(llm.engine.spec, llm.engine.state_parts)):
                if line is not None:
                    click.echo(line, err=True)
            click.echo(choices_text(llm.explain()), err=True)
        completion = output.outputs[0]
        if completion.error is not None:
            raise LongspanError(completion.error)
        if as_json:
            click.echo(msgspec.json.encode(_report(llm, model, output)))
            return
    click.echo(completion.text[len(shown.text) :])
    if not quiet:
        num_prompt, num_generated = len(output.prompt_token_ids), len(completion.token_ids)
        say_counts(Counts(num_prompt, output.num_cached_tokens, num_generated, output.ttft_s, total_s))


class _Shown:
    """Display of a request: a bar, and, where text is streamed, the text as it comes."""

    def __init__(self, max_tokens: int, *, streams: bool) -> None:
        self._printer, self._streams = ProgressPrinter(max_tokens), streams
        self.text = ""
        """Text that was written."""

    def update(self, progress: "Progress") -> None:
        """Show how far the request is, and its new text."""
        takes_place = self._streams and sys.stdout.isatty()  # on a terminal, text takes the bar's place
        if not takes_place or not (self.text or progress.new_text):
            self._printer.update(progress)
        if self._streams and progress.new_text:
            if takes_place:
                self._printer.close()
            self.text += progress.new_text
            click.echo(progress.new_text, nl=False)
            sys.stdout.flush()

    def __enter__(self) -> "_Shown":
        self._printer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._printer.close()


def _report(llm: "LLM", model: str, output: "RequestOutput") -> dict[str, Any]:
    """The object of `--json`."""
    completion = output.outputs[0]
    return {
        "model": model,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
            "cached_tokens": output.num_cached_tokens,
        },
        "timing": {"load_s": llm.load_s, "ttft_s": output.ttft_s, "tpot_s": output.tpot_s},
        "ranks": llm.rank_stats(),
        "strategies": llm.strategy_counts(),
    }


def _hint(llm: "LLM", model: str, text: str) -> None:
    """Say what a newcomer may not expect of a raw prompt."""
    from longspan.models.chat_template import misses_template

    if misses_template(llm.tokenizer, text):
        click.echo(f"longspan: {model} is made for chats, and this prompt is raw: try longspan chat {model}", err=True)
    if text.endswith("\n") and sys.stderr.isatty():
        click.echo("longspan: the prompt ends with a line break; --strip-newline drops it", err=True)


def _stripped(text: str) -> str:
    """A prompt without the line break at its end.

    Raises:
        ConfigError: nothing is left.
    """
    for line_break in ("\r\n", "\n"):
        if text.endswith(line_break):
            text = text[: -len(line_break)]
            break
    if not text:
        raise ConfigError("prompt: got a lone line break, legal is at least one character more with --strip-newline")
    return text


def read_prompt(prompt: str | None, prompt_file: str | None, stdin: str | None) -> str:
    """The prompt, from exactly one of its three sources.

    Raises:
        ConfigError: none or several sources, an unreadable file, or bytes that are not UTF-8.
    """
    if (prompt, prompt_file, stdin) == (None, None, None) and is_piped():
        stdin = "-"
    if stdin not in (None, "-"):
        raise ConfigError(f"prompt: got {stdin!r} behind the model, legal is - for standard input, or --prompt TEXT")
    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("-", stdin))
        if value is not None
    ]
    if len(given) != 1:
        raise ConfigError(
            f"prompt: got {' and '.join(given) or 'none'}, legal is exactly one of --prompt TEXT, --prompt-file FILE, "
            "- or a pipe"
        )
    source, data = _prompt_bytes(prompt, prompt_file)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte offset {error.start}, legal is UTF-8 text") from error
    if not text:
        raise ConfigError(f"{source}: got an empty text, legal is at least one character")
    return text


def is_piped() -> bool:
    """Whether standard input is something else than a terminal."""
    return sys.stdin is not None and not sys.stdin.isatty()


def _prompt_bytes(prompt: str | None, prompt_file: str | None) -> tuple[str, bytes]:
    """Source of the prompt in words, and the prompt's bytes."""
    if prompt is not None:
        return "prompt", os.fsencode(prompt)  # the command line's bytes, also those that are not UTF-8
    if prompt_file not in (None, "-"):
        try:
            return f"prompt-file {prompt_file!r}", Path(prompt_file).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"prompt-file: got {prompt_file!r}, legal is a file that can be read: {error.strerror}"
            ) from error
    if sys.stdin is None:
        raise ConfigError("prompt: got - with standard input closed, legal is an open one")
    return "prompt from standard input", sys.stdin.buffer.read()
