"""Greedy tokens of vLLM's V2 model runner with `prefill_context_parallel_size` are those of Transformers.

On a CPU, in Triton's interpreter: what differs on a GPU are the kernels of attention and the library that moves rows.
"""

import pytest
from engines import random_prompts, reference
from v2 import greedy, tokens_of

NUM_TOKENS = 8
SEEDED = {"temperature": 0.8, "seed": 11}  # top-p and top-k have a kernel that the interpreter does not run


def prompts():
    """Short and long ones, and two that start as others do: packed on a striped start, striped on a packed start."""
    found = random_prompts((1, 31, 97, 700, 450))
    return [*found, found[3][:320] + found[1], found[2] + found[4]]


@pytest.fixture(scope="module")
def expected(models):
    return {kind: reference(model, prompts(), NUM_TOKENS) for kind, model in models.items()}


@pytest.fixture(scope="module")
def stock(v2, models, tmp_path_factory):
    """vLLM alone, on its V2 runner: KV blocks of one rank, and what is sampled with a seed."""
    return v2.run(
        tmp_path_factory.mktemp("stock"), models["llama"], 1, [greedy(prompts()[:5], max_tokens=NUM_TOKENS, **SEEDED)]
    )


@pytest.mark.parametrize(
    ("kind", "num_ranks", "is_async", "options"),
    [
        ("llama", 2, False, {}),
        ("qwen3", 3, True, {}),
        ("llama", 2, True, {"tensor_parallel_size": 2, "longspan": {"placement": "striped", "stripe_size": 32}}),
    ],
    ids=["2", "3-async", "2x2-async-striped"],
)
def test_tokens_equal_transformers(v2, models, expected, request, tmp_path, kind, num_ranks, is_async, options):
    asked = prompts()
    runs = [
        greedy(asked, max_tokens=NUM_TOKENS),  # all at once, in chunks of 256 tokens
        greedy(asked[2:], max_tokens=NUM_TOKENS, one_by_one=True),  # again, from the prefix cache
    ]
    if kind == "llama":
        runs.append(greedy(asked[:5], max_tokens=NUM_TOKENS, **SEEDED))
    found = v2.run(tmp_path, models[kind], num_ranks, runs, is_async=is_async, **options)
    at_once, again, *seeded = found["runs"]
    assert tokens_of(at_once) == expected[kind]
    assert tokens_of(again) == expected[kind][2:]
    assert found["hits"] > 0
    assert all(moved > 0 for moved in found["num_bytes"])
    assert len(found["num_bytes"]) == num_ranks * options.get("tensor_parallel_size", 1)
    if kind == "llama":
        stock = request.getfixturevalue("stock")
        assert tokens_of(seeded[0]) == tokens_of(stock["runs"][0])
        if "tensor_parallel_size" not in options:
            assert found["num_blocks"] >= 1.98 * stock["num_blocks"]


@pytest.mark.parametrize("is_async", [pytest.param(False, marks=pytest.mark.slow), True])
def test_preempted_requests_start_again(v2, models, tmp_path, is_async):
    asked = random_prompts((300, 400, 500) * 2, seed=5)
    options = {"num_gpu_blocks_override": 52, "max_model_len": 1024}  # four prompts fit, and not all they generate
    found = v2.run(tmp_path, models["llama"], 2, [greedy(asked, max_tokens=60)], is_async=is_async, **options)
    assert found["preemptions"] > 0
    assert tokens_of(found["runs"][0]) == reference(models["llama"], asked, 60)


def test_packed_requests_move_nothing(v2, models, expected, tmp_path):
    found = v2.run(
        tmp_path, models["llama"], 2, [greedy(prompts()[:5], max_tokens=NUM_TOKENS)], longspan={"placement": "packed"}
    )
    assert tokens_of(found["runs"][0]) == expected["llama"][:5]
    assert found["num_bytes"] == [0, 0]
