"""`longspan needle`: whether a model finds a fact, by the length of the text and the fact's place in it.

Holds options and the table. Must not know how a prompt is made or run.
Read next: `longspan.cli.haystack`; `longspan.cli.needle_plot`, the heat map.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from longspan.cli.adapters import adapter_option, check_chosen
from longspan.cli.help import GroupedCommand
from longspan.cli.options import engine_config, options_of
from longspan.cli.pictures import check_plot
from longspan.cli.progress import ProgressPrinter, loading
from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.imports import quick_imports
from longspan.quantities import parse_tokens
from longspan.types import SamplingParams

if TYPE_CHECKING:
    from longspan.cli.haystack import Haystack
    from longspan.llm import LLM

DEFAULT_LENGTHS, DEFAULT_DEPTHS = "1k,2k,4k,8k", "0,25,50,75,100"


class Found(msgspec.Struct, frozen=True):
    """Answer to one prompt."""

    length: int
    """Tokens of the prompt."""
    depth: float
    """Place of the fact in percent: 0 is first, 100 last."""
    number: str
    """The fact."""
    verdict: str
    """`right`, `wrong number` or `no number`."""
    answered: str
    """First number of the answer; empty if there is none."""
    text: str
    """The answer."""
    ttft_s: float | None
    """Seconds to the first token."""


EXAMPLES = """longspan needle recall --context-parallel-size 2 --lengths 1k,16k,64k
longspan needle smollm2 --lengths 1k,4k,8000 --plot needle.png"""


@click.command(cls=GroupedCommand, examples=EXAMPLES)
@click.argument("model")
@click.option("--lengths", default=DEFAULT_LENGTHS, show_default=True, help="Tokens of the prompts; k is 1024.")
@click.option("--depths", default=DEFAULT_DEPTHS, show_default=True, help="Places of the fact, in percent.")
@click.option("--max-tokens", type=int, default=32, show_default=True, help="Most tokens of an answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the facts.")
@click.option("--plot", metavar="FILE.png", help="Write a heat map of depth and length.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@adapter_option()
@options_of(EngineConfig, serves=False)
def needle(
    model: str,
    lengths: str,
    depths: str,
    max_tokens: int,
    seed: int,
    plot: str | None,
    as_json: bool,
    adapter: str | None,
    **options: Any,
) -> None:
    """Hide a random number in Python's standard library, and ask MODEL for it: at every length and every depth.

    MODEL is a directory, a .gguf file, `recall`, `smollm2`, or a Hub id. Answers are greedy.
    """
    token_counts = sorted({parse_tokens(text, "lengths") for text in lengths.split(",")})
    percents = sorted({_percent(text) for text in depths.split(",")})
    params = SamplingParams(max_tokens=max_tokens)
    config = engine_config(model, options)
    assert not options
    check_chosen(config, adapter)
    if plot is not None:
        check_plot(plot)
    with loading(model), quick_imports(for_good=True):
        from longspan.cli.haystack import Haystack
        from longspan.llm import LLM

        opened = LLM(**msgspec.structs.asdict(config))
    with opened as llm:
        haystack = Haystack(llm.tokenizer, token_counts[-1])
        rng = random.Random(seed)
        found = [
            _ask(llm, haystack, length, depth, rng, params, adapter) for length in token_counts for depth in percents
        ]
    if plot is not None:
        from longspan.cli.needle_plot import write_heat_map

        num_ranks = config.context_parallel_size
        write_heat_map(found, f"{model} on {num_ranks} rank{'s' * (num_ranks > 1)}", plot)
    if as_json:
        click.echo(msgspec.json.encode({"model": model, "answers": found}))
    else:
        click.echo(table(found))


def _ask(
    llm: "LLM",
    haystack: "Haystack",
    length: int,
    depth: float,
    rng: random.Random,
    params: SamplingParams,
    adapter: str | None,
) -> Found:
    """Ask one question, and show how far it is."""
    from longspan.cli.haystack import random_number, verdict

    number = random_number(rng)
    prompt = haystack.prompt(length, depth / 100, number)
    with ProgressPrinter(params.max_tokens) as progress:
        (output,) = llm.generate(prompt, params, lora=adapter, on_progress=progress.update)
    text = output.outputs[0].text
    found, answered = verdict(text, number)
    return Found(length, depth, number, found.value, answered, text, output.ttft_s)


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ConfigError(f"depths: got {text!r}, legal are percents from 0 to 100, with commas between them")
    return value


def tokens_text(num_tokens: int) -> str:
    """A length as people write it."""
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else f"{num_tokens}"


def table(found: Sequence[Found]) -> str:
    """Lines of depths and lengths with verdicts, and a last line with the sum."""
    lengths, depths = sorted({one.length for one in found}), sorted({one.depth for one in found})
    of = {(one.length, one.depth): one for one in found}
    rows = [["depth", *map(tokens_text, lengths)]]
    rows += [[f"{depth:g} %", *(_cell(of[length, depth]) for length in lengths)] for depth in depths]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    num_right = sum(one.verdict == "right" for one in found)
    return "\n".join([*lines, f"{num_right} of {len(found)} right"])


def _cell(one: Found) -> str:
    if one.verdict == "right":
        return "right"
    return f"{one.answered[:12]} for {one.number}" if one.answered else "no number"
