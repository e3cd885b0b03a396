"""A real text of more than 100,000 tokens, split over two ranks, and a question about it.

The text is the source of the installed Python's standard library. A random fact is hidden at a random place. Two worker
processes each compute and hold half of the text's KV cache, and the bundled model `recall` continues the question. The
exit code is 0 only if the answer equals the fact.

    python examples/needle.py [--tokens N] [--context-parallel-size N] [--seed N]

Read next: `longspan.llm`; `longspan needle`, the same at many lengths and places.
"""

import argparse
import random
import secrets
import sys
import time

from longspan import LLM, SamplingParams
from longspan.cli.haystack import standard_library_text
from longspan.cli.progress import ProgressPrinter
from longspan.models.loader import quiet_transformers


def hide(text: str, fact: str, rng: random.Random) -> tuple[str, float]:
    """Put a fact between two lines at a random place; returns the text and the place as a share of its length."""
    lines = text.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    before = "".join(lines[:place])
    return before + fact + "".join(lines[place:]), len(before) / len(text)


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=110_000, help="length of the text (a token is a byte)")
    parser.add_argument("--context-parallel-size", type=int, default=2)
    parser.add_argument("--seed", type=int, help="of the fact and its place; random by default")
    options = parser.parse_args()
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    rng = random.Random(seed)
    answer = f"{rng.randrange(10**9):09d}"
    question = "The number of the safe in the cellar is "
    text, place = hide(standard_library_text(options.tokens)[: options.tokens], f"{question}{answer}.\n", rng)
    prompt = text + question

    quiet_transformers()
    progress = ProgressPrinter(len(answer))
    started = time.perf_counter()
    with LLM("recall", dtype="float32", context_parallel_size=options.context_parallel_size) as llm, progress:
        params = SamplingParams(max_tokens=len(answer) + 1, stop=(".",))
        (output,) = llm.generate(prompt, params, on_progress=progress.update)
        progress.close()
        ranks, strategies = llm.rank_stats(), llm.strategy_counts()
    found = output.outputs[0].text
    print(f"text      {len(output.prompt_token_ids)} tokens of the Python standard library (seed {seed})")
    print(f"question  {question!r}")
    print(f"answer    {found!r}")
    print(f"fact      {answer!r}, at {place:.1%} of the text")
    for rank in ranks:
        print(
            f"rank {rank.rank}    computed {rank.tokens_computed} tokens, holds {rank.kv_bytes / 2**20:.1f} MiB of KV "
            f"({rank.kv_pages_used} pages), sent {rank.bytes_sent / 2**20:.1f} MiB"
        )
    print(
        f"strategy  {', '.join(f'{name} {count}' for name, count in sorted(strategies.items()))} (plan, KV group) pairs"
    )
    assert output.ttft_s is not None
    rate = len(output.prompt_token_ids) / output.ttft_s
    print(f"time      {output.ttft_s:.1f} s to the first token ({rate:.0f} tokens/s), ", end="")
    print(f"{(output.tpot_s or 0) * 1000:.1f} ms per token, {time.perf_counter() - started:.1f} s in all")
    if found != answer:
        print("The answer is wrong.", file=sys.stderr)
        return 1
    print("The answer is right.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
