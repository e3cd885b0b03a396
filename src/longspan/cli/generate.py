"""`longspan generate`: continue one prompt.

Holds options, prompt files and output. Must not know how anything runs.
Read next: `longspan.llm`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from longspan.cli.explain import choices_text, shares_text, states_text
from longspan.cli.options import GroupedCommand, Later, engine_config, options_of, take
from longspan.cli.progress import ProgressPrinter
from longspan.config import EngineConfig
from longspan.errors import ConfigError, LongspanError
from longspan.imports import quick_imports
from longspan.types import SamplingParams

MAX_TOKENS = 128
"""Default of `max_tokens`, where so many fit."""


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.argument("stdin", metavar="[-]", required=False)
@click.option("--prompt", help="The prompt's text, used raw.")
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a UTF-8 file; a lone - reads standard input.")
@options_of(SamplingParams, {"max_tokens": Later(f"{MAX_TOKENS}, or what fits")})
@options_of(EngineConfig, serves=False)
@click.option("--explain", is_flag=True, help="Say on standard error which strategies were chosen, and why.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def generate(
    model: str,
    stdin: str | None,
    prompt: str | None,
    prompt_file: str | None,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue one prompt with MODEL: a directory, a .gguf file, `recall`, `smollm2`, or a Hub id.

    The text goes to standard output, progress to standard error.
    """
    is_default = options["max_tokens"] is None
    if is_default:
        options["max_tokens"] = max(MAX_TOKENS, options["min_tokens"])
    params = SamplingParams(**take(SamplingParams, options))
    config = engine_config(model, options)  # refuse illegal values before anything is read or imported
    assert not options
    text = read_prompt(prompt, prompt_file, stdin)

    with quick_imports(for_good=True):
        from longspan.llm import LLM

        opened = LLM(**msgspec.structs.asdict(config))
    progress = ProgressPrinter(params.max_tokens)
    with opened as llm, progress:
        (output,) = llm.generate(text, params, on_progress=progress.update, clamps_max_tokens=is_default)
        progress.close()
        if explain:
            for line in (shares_text(llm.rank_stats()), states_text(llm.engine.spec)):
                if line is not None:
                    click.echo(line, err=True)
            click.echo(choices_text(llm.explain()), err=True)
        completion = output.outputs[0]
        if completion.error is not None:
            raise LongspanError(completion.error)
        if not as_json:
            click.echo(completion.text)
            return
        report = {
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
        click.echo(msgspec.json.encode(report))


def read_prompt(prompt: str | None, prompt_file: str | None, stdin: str | None) -> str:
    """The prompt, from exactly one of its three sources.

    Raises:
        ConfigError: none or several sources, an unreadable file, or bytes that are not UTF-8.
    """
    if stdin not in (None, "-"):
        raise ConfigError(f"prompt: got {stdin!r} behind the model, legal is - for standard input, or --prompt TEXT")
    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("-", stdin))
        if value is not None
    ]
    if len(given) != 1:
        raise ConfigError(
            f"prompt: got {' and '.join(given) or 'none'}, legal is exactly one of --prompt TEXT, --prompt-file FILE, -"
        )
    source, data = _prompt_bytes(prompt, prompt_file)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte offset {error.start}, legal is UTF-8 text") from error
    if not text:
        raise ConfigError(f"{source}: got an empty text, legal is at least one character")
    return text


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
