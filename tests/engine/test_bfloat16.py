"""bfloat16 costs what it costs on one device: the error does not grow with ranks, strategies or pages."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from cp_cases import spread
from tiny_models import VOCAB_SIZE, load_reference, random_prompt, run_requests, tiny_model

from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

PROMPT = tuple(random_prompt(300, 11))
FAMILIES = ("llama", "qwen3", "gemma2", "smollm3-window", "youtu")


@functools.cache
def eager(family, dtype):
    """The same weights, rounded to bfloat16, computed in `dtype`."""
    model = load_reference(tiny_model(family).path, torch.bfloat16)
    return copy.deepcopy(model).to(dtype)


@torch.inference_mode()
def eager_logprobs(family, dtype, token_ids):
    """[len(token_ids) - 1, VOCAB_SIZE] float64."""
    return eager(family, dtype)(torch.tensor([token_ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)


@functools.cache
def bfloat16_model(family):
    return replace(tiny_model(family), dtype=torch.bfloat16)


def run(family, params, prompt=PROMPT, **options):
    layout = {"placement": "striped", "page_size": 4, "stripe_size": 16, "max_num_batched_tokens": 64}
    (request,) = run_requests(bfloat16_model(family), [(prompt, params)], dtype="bfloat16", **layout, **options)
    return request


def as_tensor(logprobs):
    """[positions, VOCAB_SIZE] float64 of positions that report the whole vocabulary."""
    found = torch.empty(len(logprobs), VOCAB_SIZE, dtype=torch.float64)
    for row, position in zip(found, logprobs, strict=True):
        ids, values = zip(*position.top, strict=True)
        row[list(ids)] = torch.tensor(values, dtype=torch.float64)
    return found


def root_mean_square(error):
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize(
    ("family", "strategy"),
    [*((family, "pass_q") for family in FAMILIES), ("llama", "gather_kv"), ("gemma2", "pass_kv"), ("qwen3", "tree")],
)
def test_the_error_is_at_most_twice_that_of_eager_and_flat_in_the_ranks(family, strategy):
    exact = eager_logprobs(family, torch.float64, PROMPT)
    eager_error = eager_logprobs(family, torch.bfloat16, PROMPT) - exact
    errors = []
    for num_ranks in (1, 2, 3, 4):
        params = SamplingParams(max_tokens=1, prompt_logprobs=VOCAB_SIZE)
        nodes = spread(num_ranks, 2)
        request = run(family, params, context_parallel_size=num_ranks, strategy=strategy, nodes=nodes)
        error = as_tensor(request.prompt_logprobs) - exact
        assert error.abs().max() <= 2 * eager_error.abs().max()
        errors.append(root_mean_square(error))
    assert max(errors) <= 2 * root_mean_square(eager_error)
    assert max(errors) <= 1.25 * errors[0]


@pytest.mark.parametrize(("family", "strategy"), [("qwen3_moe", "pass_q"), ("gpt_oss", "gather_kv")])
def test_the_typical_error_of_a_mixture_is_that_of_eager_for_any_number_of_ranks(family, strategy):
    """A rounded number may choose another expert, in Transformers too, so the largest error of a mixture is luck."""
    exact = eager_logprobs(family, torch.float64, PROMPT)
    eager_error = eager_logprobs(family, torch.bfloat16, PROMPT) - exact
    for num_ranks in (1, 2, 3):
        params = SamplingParams(max_tokens=1, prompt_logprobs=VOCAB_SIZE)
        request = run(family, params, context_parallel_size=num_ranks, strategy=strategy)
        error = as_tensor(request.prompt_logprobs) - exact
        assert error.abs().median() <= 1.5 * eager_error.abs().median()
        assert root_mean_square(error) <= 2 * root_mean_square(eager_error)


@pytest.mark.parametrize(
    ("family", "shape"), [("llama", (1, 2)), ("llama", (1, 4)), ("qwen3", (2, 2)), ("gemma2", (2, 2))]
)
def test_the_error_of_ranks_of_several_processes_is_at_most_twice_that_of_eager(family, shape):
    exact = eager_logprobs(family, torch.float64, PROMPT)
    eager_error = eager_logprobs(family, torch.bfloat16, PROMPT) - exact
    params = SamplingParams(max_tokens=1, prompt_logprobs=VOCAB_SIZE)
    request = run(family, params, context_parallel_size=shape[0], tensor_parallel_size=shape[1])
    error = as_tensor(request.prompt_logprobs) - exact
    assert error.abs().max() <= 2 * eager_error.abs().max()
    assert root_mean_square(error) <= 2 * root_mean_square(eager_error)


def test_float32_partials_are_nearer_to_one_rank_than_rounded_ones():
    """Four ranks, keys and values in bfloat16: what partials lose on the wire is all the difference to one rank.

    The reference backend rounds nothing inside; kernels of some CPUs round each block of keys to bfloat16.
    """
    params = SamplingParams(max_tokens=1, prompt_logprobs=VOCAB_SIZE)
    alone = as_tensor(run("llama", params, PROMPT[:100], attention_backend="reference").prompt_logprobs)

    def distance(**options):
        options |= {"context_parallel_size": 4, "strategy": "pass_q", "attention_backend": "reference"}
        request = run("llama", params, PROMPT[:100], **options)
        return root_mean_square(as_tensor(request.prompt_logprobs) - alone)

    assert distance(partial_dtype="float32") < distance()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_in_decode_is_at_most_twice_that_of_eager(family):
    params = SamplingParams(max_tokens=48, ignore_eos=True, logprobs=VOCAB_SIZE)
    request = run(family, params, context_parallel_size=3, strategy="pass_q")
    rows = slice(len(PROMPT) - 1, None)
    exact = eager_logprobs(family, torch.float64, request.token_ids)[rows]
    eager_error = eager_logprobs(family, torch.bfloat16, request.token_ids)[rows] - exact
    error = as_tensor(request.logprobs) - exact
    assert error.abs().max() <= 2 * eager_error.abs().max()
    assert root_mean_square(error) <= 2 * root_mean_square(eager_error)
