"""Sampling parameters: distributions, seeds, ends of requests, log-probabilities."""

import itertools
import math
from collections import Counter

import pytest
import torch

from longspan.errors import ConfigError, LongspanError
from longspan.plan.types import SampleRow
from longspan.types import FinishReason, SamplingParams
from longspan.worker.sampler import sample, token_logprobs, uniform
from tiny_models import VOCAB_SIZE, greedy, load_reference, random_prompt, run_requests, tiny_model

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 1.0, 0.0, 0.4])


def row(position=0, **changes):
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 1}
    return SampleRow(
        request_id=0, position=position, num_logprobs=None, **{**values, "banned_token_ids": (), **changes}
    )


def expected_probabilities(logits, temperature, top_k, top_p, min_p, banned=()):
    """Brute force: drop tokens one rule after the other, renormalise before the next."""
    weights = {i: math.exp(logit / temperature) for i, logit in enumerate(logits.tolist()) if i not in banned}

    def normalised(weights):
        total = sum(weights.values())
        return dict(sorted(((i, w / total) for i, w in weights.items()), key=lambda item: -item[1]))

    probs = normalised(weights)
    probs = normalised({i: p for i, p in probs.items() if p >= min_p * max(probs.values())})
    probs = normalised(dict(list(probs.items())[: top_k or None]))
    kept, total = {}, 0.0
    for i, p in probs.items():
        if total >= top_p:
            break
        kept[i] = p
        total += p
    return normalised(kept)


# ------------------------------------------------------------------------------------------------ one row


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.05},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.7, "min_p": 0.1},
        {"banned_token_ids": (0, 3)},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    """The share of each token is within 5 standard deviations; what was dropped is never drawn."""
    num_draws = 4000
    counts = Counter(sample(LOGITS, row(position, **params)) for position in range(num_draws))
    probs = expected_probabilities(
        LOGITS,
        params.get("temperature", 1.0),
        params.get("top_k", 0),
        params.get("top_p", 1.0),
        params.get("min_p", 0.0),
        params.get("banned_token_ids", ()),
    )
    assert set(counts) <= set(probs)
    for token, prob in probs.items():
        assert abs(counts[token] - num_draws * prob) <= 5 * math.sqrt(num_draws * prob * (1 - prob)) + 1e-6


def test_the_draw_is_the_inverse_of_the_distribution_at_the_position_of_the_new_token():
    probs = expected_probabilities(LOGITS, 1.0, 0, 1.0, 0.0)
    for position in range(50):
        drawn = uniform(7, position + 1)
        ends = itertools.accumulate(probs.values())
        expected = next(token for token, end in zip(probs, ends, strict=True) if drawn < end)
        assert sample(LOGITS, row(position, seed=7)) == expected


def test_random_numbers_depend_on_seed_and_position():
    numbers = {uniform(seed, position) for seed in (0, 1, 2**63 - 1) for position in range(100)}
    assert len(numbers) == 300
    assert all(0 <= number < 1 for number in numbers)


@pytest.mark.parametrize("scale", [1.0, 1e30])
@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature, scale):
    assert {sample(LOGITS * scale, row(position, temperature=temperature)) for position in range(50)} == {0}


def test_a_huge_temperature_is_uniform():
    assert {sample(LOGITS, row(position, temperature=1e300)) for position in range(200)} == set(range(8))


def test_greedy_takes_the_most_probable_token_that_is_allowed():
    assert sample(LOGITS, row(temperature=0.0)) == 0
    assert sample(LOGITS, row(temperature=0.0, banned_token_ids=(0, 3))) == 5


def test_logits_of_minus_infinity_are_never_drawn():
    logits = LOGITS.clone()
    logits[[0, 3, 5]] = -torch.inf
    assert {sample(logits, row(position)) for position in range(500)} == {1, 2, 4, 6, 7}


def test_rejects_logits_that_are_not_numbers():
    logits = LOGITS.clone()
    logits[3] = torch.nan
    with pytest.raises(LongspanError, match="request 0: the model's logits at position 4 hold NaN"):
        sample(logits, row(4))


def test_logprobs_name_the_token_its_rank_and_the_best():
    (found,) = token_logprobs(LOGITS[None], torch.tensor([5]), 3)
    expected = LOGITS.double().log_softmax(-1)
    assert (found.token_id, found.rank, [token for token, _ in found.top]) == (5, 3, [0, 3, 5])
    assert found.logprob == pytest.approx(expected[5].item(), abs=1e-6)
    (none,) = token_logprobs(LOGITS[None], torch.tensor([5]), 0)
    assert none.top == ()
    (everything,) = token_logprobs(LOGITS[None], torch.tensor([5]), 1000)
    assert len(everything.top) == 8


# ------------------------------------------------------------------------------------------------ through the engine


SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, top_k=50, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def outputs(model, prompts, params, **options):
    params = params if isinstance(params, list) else [params] * len(prompts)
    requests = run_requests(model, list(zip(prompts, params, strict=True)), **options)
    return [request.output_token_ids for request in requests]


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it_and_wherever(model):
    prompts = [reference.prompt for reference in model.references]
    alone = [outputs(model, [prompt], SAMPLED)[0] for prompt in prompts]
    assert len({tuple(tokens[:5]) for tokens in alone}) == 4
    assert alone != [reference.token_ids[:40] for reference in model.references]
    layout = {"page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 100}
    for options in (
        {},
        {"context_parallel_size": 2, "placement": "striped", "strategy": "pass_q", **layout},
        {"context_parallel_size": 3, "placement": "striped", "strategy": "pass_kv", **layout},
        {"context_parallel_size": 3, "placement": "packed", **layout},
        {"context_parallel_size": 4, "max_num_seqs": 2, **layout},
    ):
        assert outputs(model, prompts, SAMPLED, **options) == alone


def test_another_seed_gives_other_tokens_and_no_seed_gives_others_each_time(model):
    prompt = model.references[1].prompt
    seeds = [SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True, seed=seed) for seed in (1, 2, None, None)]
    tokens = outputs(model, [prompt] * 4, seeds)
    assert len({tuple(ids) for ids in tokens}) == 4


def test_top_k_of_one_is_greedy(model):
    params = SamplingParams(max_tokens=40, temperature=5.0, top_k=1, ignore_eos=True)
    assert outputs(model, [model.references[2].prompt], params) == [model.references[2].token_ids[:40]]


def test_max_tokens_ends_with_length(model):
    for max_tokens in (1, 2, 33):
        (request,) = run_requests(model, [(model.references[1].prompt, greedy(max_tokens))])
        assert request.output_token_ids == model.references[1].token_ids[:max_tokens]
        assert request.finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_the_request_at_its_first_occurrence(model):
    reference = model.references[1]
    stop = reference.token_ids[9]
    first = reference.token_ids.index(stop)
    params = SamplingParams(max_tokens=64, ignore_eos=True, stop_token_ids=[stop])
    (request,) = run_requests(model, [(reference.prompt, params)], context_parallel_size=2, placement="striped")
    assert request.output_token_ids == reference.token_ids[: first + 1]
    assert request.finish_reason is FinishReason.STOP


def test_a_stop_token_as_the_last_allowed_token_still_ends_with_stop(model):
    reference = model.references[1]
    first = reference.token_ids.index(reference.token_ids[9])
    params = SamplingParams(max_tokens=first + 1, ignore_eos=True, stop_token_ids=[reference.token_ids[9]])
    (request,) = run_requests(model, [(reference.prompt, params)])
    assert request.finish_reason is FinishReason.STOP


def test_min_tokens_bans_what_would_end_the_request(model):
    """The banned token is not sampled at all before min_tokens, and may be from then on."""
    reference = model.references[1]
    stop = reference.token_ids[5]
    params = SamplingParams(max_tokens=64, min_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    (request,) = run_requests(model, [(reference.prompt, params)])
    assert stop not in request.output_token_ids[:20]
    assert (
        request.output_token_ids[: reference.token_ids.index(stop)]
        == (reference.token_ids[: reference.token_ids.index(stop)])
    )
    assert request.num_generated >= 20


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_logprobs_are_those_of_transformers(model, num_ranks):
    prompt = random_prompt(90, 3)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, logprobs=5, prompt_logprobs=3)
    other = SamplingParams(max_tokens=5, prompt_logprobs=0)
    request, short = run_requests(
        model,
        [(prompt, params), (prompt[:40], other)],
        context_parallel_size=num_ranks,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=24,
    )
    with torch.inference_mode():
        logits = load_reference(model.path)(torch.tensor([request.token_ids])).logits[0]
    expected = logits.double().log_softmax(-1)
    assert len(request.prompt_logprobs) == 89
    assert len(request.logprobs) == 20
    for position, found in enumerate([*request.prompt_logprobs, *request.logprobs], start=1):
        num_top = 3 if position < len(prompt) else 5
        before = expected[position - 1]
        assert found.token_id == request.token_ids[position]
        assert found.logprob == pytest.approx(before[found.token_id].item(), abs=1e-4)
        assert abs(int((before > before[found.token_id]).sum()) + 1 - found.rank) <= 1
        values = before.topk(num_top).values.tolist()
        assert [value for _, value in found.top] == pytest.approx(values, abs=1e-4)
        assert [before[token].item() for token, _ in found.top] == pytest.approx(values, abs=1e-4)
    assert [found.token_id for found in short.prompt_logprobs] == prompt[1:40]
    assert [found.top for found in short.prompt_logprobs] == [()] * 39
    assert short.logprobs == []


def test_prompt_logprobs_of_one_token_are_none_at_all(model):
    (request,) = run_requests(model, [([5], SamplingParams(max_tokens=2, prompt_logprobs=2))])
    assert request.prompt_logprobs == []


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("max_tokens", 0, "a whole number from 1"),
        ("max_tokens", True, "a whole number from 1"),
        ("max_tokens", 2.0, "a whole number from 1"),
        ("max_tokens", "5", "a whole number from 1"),
        ("min_tokens", -1, "a whole number from 0 to max_tokens (16)"),
        ("min_tokens", 17, "a whole number from 0 to max_tokens (16)"),
        ("temperature", math.nan, "a finite number from 0"),
        ("temperature", math.inf, "a finite number from 0"),
        ("temperature", -0.1, "a finite number from 0"),
        ("temperature", True, "a finite number from 0"),
        ("temperature", None, "a finite number from 0"),
        ("top_p", 0, "a number above 0 and up to 1"),
        ("top_p", 1.01, "a number above 0 and up to 1"),
        ("top_p", math.nan, "a number above 0 and up to 1"),
        ("top_k", -1, "a whole number from 0 (0 keeps all)"),
        ("top_k", 1.5, "a whole number from 0 (0 keeps all)"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("min_p", -0.5, "a number from 0 to 1"),
        ("seed", -1, "None or a whole number from 0 to 2**63 - 1"),
        ("seed", 2**63, "None or a whole number from 0 to 2**63 - 1"),
        ("seed", True, "None or a whole number from 0 to 2**63 - 1"),
        ("stop", "", "strings that are not empty"),
        ("stop", ["a", ""], "strings that are not empty"),
        ("stop", [1], "strings that are not empty"),
        ("stop", 1, "strings that are not empty"),
        ("stop_token_ids", [-1], "whole numbers from 0"),
        ("stop_token_ids", ["a"], "whole numbers from 0"),
        ("stop_token_ids", 5, "whole numbers from 0"),
        ("ignore_eos", 1, "true or false"),
        ("logprobs", -1, "None or a whole number from 0 to 1000"),
        ("logprobs", True, "None or a whole number from 0 to 1000"),
        ("prompt_logprobs", 1001, "None or a whole number from 0 to 1000"),
    ],
)
def test_rejects_illegal_values_with_field_value_and_range(field, value, legal):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{field: value})
    received = (value,) if field == "stop" and isinstance(value, str) else value
    received = tuple(received) if isinstance(received, list) else received
    assert str(caught.value) == f"{field}: got {received!r}, legal is {legal}"


def test_rejects_stop_tokens_outside_the_vocabulary(model):
    with pytest.raises(ConfigError, match=f"token id: got {VOCAB_SIZE}, legal is 0 to {VOCAB_SIZE - 1}"):
        run_requests(model, [([5], SamplingParams(stop_token_ids=[VOCAB_SIZE]))])


def test_lists_are_taken_for_tuples():
    params = SamplingParams(stop="a", stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("a",), (1, 2))
