"""Requests of two adapters and of none, in one batch, get the tokens of peft, however they are spread over ranks."""

import pytest
from tiny_models import all_pairs, greedy, memory_for, run_all, tiny_model

pytest.importorskip("peft")

from lora_adapters import adapter_engine, adapter_references, both

NUM_TOKENS = 24
LENGTHS = (31, 97)
CASES = all_pairs(
    {
        "family": ("llama", "qwen2", "gemma2", "qwen3_moe", "gpt_oss"),
        "strategy": ("auto", "pass_q", "gather_kv", "pass_kv", "tree"),
        "placement": ("striped", "packed", "spill", "auto"),
        "context_parallel_size": (2, 1, 3),
        "page_size": (4, 16, 1),
        "async_scheduling": (True, False),
        "max_num_batched_tokens": (64, 7, 2048),
    }
)


def name_of(case):
    return "-".join(str(value) for value in case.values())


def add_all(engine, family, lengths=LENGTHS, num_tokens=NUM_TOKENS):
    """Queue each prompt with `a`, with `b` and with neither; return requests and what peft continues them with."""
    found = []
    for length in lengths:
        for name, reference in adapter_references(family, length, NUM_TOKENS).items():
            adapter = None if name is None else engine.adapters.find(name)
            request = engine.add_request(reference.prompt, greedy(num_tokens), adapter=adapter)
            found.append((request, reference.token_ids[:num_tokens]))
    return found


def run(family, **options):
    with adapter_engine(tiny_model(family).path, both(family), **options) as engine:
        running = add_all(engine, family)
        run_all(engine)
    return [request.output_token_ids for request, _ in running], [wanted for _, wanted in running]


@pytest.mark.cover
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tokens_are_those_of_peft(case):
    options = dict(case)
    family, size = options.pop("family"), options["context_parallel_size"]
    if options["strategy"] == "tree":
        options["nodes"] = tuple(rank * 2 // size for rank in range(size))
    if options["placement"] == "spill":
        options["kv_cache_memory"] = memory_for(tiny_model(family), 600 // size + 32)
    found, wanted = run(family, **options, stripe_size=2 * options["page_size"])
    assert found == wanted
