"""Time per output token with n-gram drafts against none, and what the index of n-grams costs.

    python benchmarks/speculation.py [--length 4096] [--tokens 200] [--ranks 2] [--links TEXT] [--repeats 3] [--save]

`recall` copies its prompt. SmolLM2 is asked to repeat a text of Python's licence and documentation, to repeat it with
another name in it, and to go on sampling at temperature 1 from a prompt of random tokens, where nothing repeats. Two
engines with real worker processes, one with drafts, take the same requests in turns; their tokens must be the same.
`--links` simulates links between ranks, such as `nodes=0,1 latency_us=1000`.
"""

import argparse
import pydoc_data.topics
import random
import time
from typing import Any

from common import median, parser, report
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.models.loader import load_tokenizer
from longspan.scheduler.ngrams import NgramProposer
from longspan.types import SamplingParams

DRAFTS = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
INDEX_TOKENS = 1_000_000


def prose(length: int) -> str:
    """Text without code blocks, that SmolLM2 is unlikely to know by heart."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[: 8 * length]


def requests_of(model: str, length: int, num_tokens: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Prompts and parameters by name."""
    tokenizer = load_tokenizer(model)
    greedy = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    text = tokenizer.encode(prose(length), add_special_tokens=False)[:length]
    if model == "recall":
        return {"repeat": (text + text[:64], greedy)}
    random.seed(1)
    noise = [random.randrange(100, 40_000) for _ in range(length)]
    found = {"nothing repeats": (noise, SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=1, seed=1))}
    for name, task in (
        ("repeat", "Repeat this text word for word."),
        ("edit", "Repeat this text, with Monty for Python."),
    ):
        asked = f"<|im_start|>user\n{task}\n\n{tokenizer.decode(text)}<|im_end|>\n<|im_start|>assistant\n"
        found[name] = (tokenizer.encode(asked, add_special_tokens=False) + text[:16], greedy)
    return found


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[float, Any]:
    """Seconds per token after the first, and the request."""
    request = engine.add_request(prompt, params)
    while not request.num_generated:
        engine.step()
    first, started = request.num_generated, time.perf_counter()
    while engine.has_requests:
        engine.step()
    return (time.perf_counter() - started) / max(1, request.num_generated - first), request


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model."""
    common = {"context_parallel_size": options.ranks, "threads_per_rank": 1, "placement": "striped"}
    common |= {"kv_cache_memory": 2**29, "simulated_links": options.links}
    rows: list[dict[str, Any]] = []
    with (
        Engine(EngineConfig(model=model, **common)) as plain,
        Engine(EngineConfig(model=model, speculative_config=DRAFTS, **common)) as drafting,
    ):
        for name, (prompt, params) in requests_of(model, options.length, options.tokens).items():
            times: dict[Engine, list[float]] = {plain: [], drafting: []}
            outputs, drafter = [], None
            for i in range(options.repeats + 1):  # the first time is thrown away
                for engine in times if i % 2 else reversed(times):
                    token_s, request = run(engine, prompt, params)
                    times[engine] += [token_s] * (i > 0)
                    outputs.append(request.output_token_ids)
                    drafter = request.drafter or drafter
            assert drafter is not None
            without, with_drafts = (median(found) for found in times.values())
            row = {"model": model, "text": name, "none ms": without * 1e3, "drafts ms": with_drafts * 1e3}
            row |= {"ratio": with_drafts / without, "accepted": drafter.num_accepted, "rejected": drafter.num_rejected}
            rows.append(row | {"same tokens": all(output == outputs[0] for output in outputs)})
    return rows


def index_facts() -> dict[str, Any]:
    """What the index costs at a million tokens."""
    random.seed(0)
    tokens = [random.randrange(50_000) for _ in range(INDEX_TOKENS + 1000)]
    proposer = NgramProposer(4, 2)
    started = time.perf_counter()
    for end in range(4096, INDEX_TOKENS + 4096, 4096):
        proposer.read(tokens, min(end, INDEX_TOKENS))
    read_s = time.perf_counter() - started
    text = tokens[:INDEX_TOKENS]
    started = time.perf_counter()
    for token in tokens[INDEX_TOKENS:]:
        text.append(token)
        proposer.propose(text, 8)
    token_s = (time.perf_counter() - started) / 1000
    return {
        "index, us per prompt token at 1M": f"{read_s / INDEX_TOKENS * 1e6:.2f}",
        "index, us per output token at 1M": f"{token_s * 1e6:.2f}",
        "index, bytes per token at 1M": f"{proposer.num_bytes / INDEX_TOKENS:.1f}",
    }


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(length=4096)
    options.add_argument("--tokens", type=int, default=200, help="tokens of an answer")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--links", help="simulated links between ranks")
    options.add_argument("--models", default="recall,smollm2")
    parsed = options.parse_args()
    rows = [row for model in parsed.models.split(",") for row in measure(model, parsed)]
    report(
        "speculation",
        rows,
        index_facts() | {"drafts": str(DRAFTS), "ranks": parsed.ranks, "links": parsed.links},
        parsed,
    )


if __name__ == "__main__":
    main()
