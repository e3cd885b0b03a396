"""Sampling parameters: distributions, seeds, ends of requests, log-probabilities."""

import itertools
import math
from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    NEAR_TIE,
    VOCAB_SIZE,
    greedy,
    load_reference,
    random_prompt,
    run_all,
    run_requests,
    tiny_engine,
    tiny_model,
)

from longspan.errors import ConfigError, LongspanError
from longspan.plan.types import SampleRow
from longspan.scheduler.request import Request
from longspan.scheduler.sampling import sample_row
from longspan.types import FinishReason, SamplingParams
from longspan.worker import runner, sampler
from longspan.worker.sampler import sample, sample_all, token_logprobs, uniform

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
    num_draws = 1500
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


# ------------------------------------------------------------------------------------------------ biases and penalties


def bits(token_ids, size=0):
    """Bit i % 8 of byte i // 8, in as many bytes as needed for `size` tokens."""
    mask = bytearray(max([size, *(i + 1 for i in token_ids)]) + 7 >> 3)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)


def naive_logits(logits, row):
    """One rule after the other, token by token, in float64."""
    changed = np.array([float(logit) for logit in logits])
    for i in range(len(changed)):
        if row.allowed is not None and not (i // 8 < len(row.allowed) and row.allowed[i // 8] >> i % 8 & 1):
            changed[i] = -np.inf
        if i in row.banned_token_ids:
            changed[i] = -np.inf
        changed[i] += dict(row.logit_bias).get(i, 0.0)
        if row.seen is not None and i // 8 < len(row.seen) and row.seen[i // 8] >> i % 8 & 1:
            positive = changed[i] > 0
            changed[i] = changed[i] / row.repetition_penalty if positive else changed[i] * row.repetition_penalty
        if i in row.generated_token_ids:
            count = row.generated_counts[row.generated_token_ids.index(i)]
            changed[i] -= row.frequency_penalty * count + row.presence_penalty
    return changed


NUM_TOKENS = 21
TOKEN_IDS = st.lists(st.integers(0, NUM_TOKENS - 1), unique=True, max_size=NUM_TOKENS)


@st.composite
def rows_with_rules(draw):
    """A row in which every rule may or may not be used, and something is allowed."""
    generated = draw(TOKEN_IDS)
    allowed = draw(st.none() | TOKEN_IDS.filter(bool))
    banned = draw(TOKEN_IDS.filter(lambda ids: set(range(NUM_TOKENS) if allowed is None else allowed) - set(ids)))
    uses_repetition = draw(st.booleans())
    return row(
        draw(st.integers(0, 1000)),
        banned_token_ids=tuple(banned),
        allowed=None if allowed is None else bits(allowed, draw(st.sampled_from([0, NUM_TOKENS, 32]))),
        logit_bias=tuple((i, draw(st.floats(-100, 100))) for i in draw(TOKEN_IDS)),
        repetition_penalty=draw(st.floats(0.1, 10)) if uses_repetition else 1.0,
        seen=bits(draw(TOKEN_IDS)) if uses_repetition else None,
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        generated_token_ids=tuple(generated),
        generated_counts=tuple(draw(st.integers(1, 50)) for _ in generated),
    )


@given(row=rows_with_rules(), seed=st.integers(0, 2**32 - 1))
def test_every_rule_is_that_of_a_naive_model(row, seed):
    """Greedy takes the best changed logit, a draw follows the changed distribution; the logits stay as they are."""
    logits = np.random.default_rng(seed).normal(0, 5, NUM_TOKENS)
    given_logits = torch.tensor(logits)
    expected = naive_logits(logits, row)
    taken = sample(given_logits, msgspec.structs.replace(row, temperature=0.0))
    assert expected[taken] >= expected.max() - 1e-9 * max(1, abs(expected.max()))
    weights = np.exp(expected - expected.max())
    order = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order] / weights.sum())
    drawn = uniform(row.seed, row.position + 1)
    if abs(cumulative - drawn).min() > 1e-9:
        assert sample(given_logits, row) == order[np.searchsorted(cumulative, drawn, side="right")]
    assert given_logits.tolist() == logits.tolist()


def test_rules_come_in_the_documented_order():
    """The sign is looked at after the bias and before counts; nothing brings a forbidden token back."""
    bias_first = row(temperature=0.0, logit_bias=((1, -0.9),), repetition_penalty=10.0, seen=bits([1]))
    assert sample(torch.tensor([-1.0, 0.4]), bias_first) == 0  # (0.4 - 0.9) * 10 = -5, not 0.4 / 10 - 0.9 = -0.86
    counts_last = row(
        temperature=0.0,
        repetition_penalty=4.0,
        seen=bits([1]),
        presence_penalty=0.5,
        generated_token_ids=(1,),
        generated_counts=(1,),
    )
    assert sample(torch.tensor([0.0, 1.0]), counts_last) == 0  # 1 / 4 - 0.5 = -0.25, not (1 - 0.5) / 4 = 0.125
    for forbidden in ({"allowed": bits([3])}, {"banned_token_ids": (0, 1, 2, 4, 5, 6, 7)}):
        assert sample(LOGITS, row(temperature=0.0, logit_bias=((0, 100.0),), **forbidden)) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "rules",
    [
        {"allowed": bytes(1)},
        {"allowed": b""},
        {"banned_token_ids": tuple(range(8))},
        {"allowed": bits([1, 2]), "banned_token_ids": (1, 2), "logit_bias": ((1, 100.0),)},
    ],
    ids=str,
)
def test_rejects_a_row_in_which_everything_is_forbidden(rules, temperature):
    with pytest.raises(LongspanError, match="request 0: no token is allowed after position 9"):
        sample(LOGITS, row(9, temperature=temperature, **rules))


def test_rejects_a_row_whose_allowed_tokens_all_have_logits_of_minus_infinity():
    logits = LOGITS.clone()
    logits[[1, 2]] = -torch.inf
    with pytest.raises(LongspanError, match="no token is allowed"):
        sample(logits, row(allowed=bits([1, 2])))


@pytest.mark.parametrize("penalty", [5e-324, 1e-200, 1e308])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5e-324])
def test_an_extreme_repetition_penalty_gives_a_token_all_the_same(penalty, temperature):
    logits = LOGITS.clone()
    logits[7] = -torch.inf
    penalised = row(temperature=temperature, repetition_penalty=penalty, seen=bits(range(8)))
    assert {sample(logits, msgspec.structs.replace(penalised, position=i)) for i in range(20)} <= set(range(7))


def request_of(prompt, **params):
    return Request(0, SamplingParams(max_tokens=1000, **params), 1, list(prompt), len(prompt), ())


@given(
    prompt=st.lists(st.integers(0, 300), min_size=1),
    output=st.lists(st.integers(0, 300)),
    asked_from=st.integers(0, 10),
)
def test_counts_are_kept_up_to_date_whenever_they_are_first_asked_for(prompt, output, asked_from):
    request = request_of(prompt, presence_penalty=1.0, repetition_penalty=2.0)
    for i, token_id in enumerate([*output, 0]):
        if i >= asked_from:
            row = sample_row(request, len(request.token_ids) - 1)
            counts = dict(zip(row.generated_token_ids, row.generated_counts, strict=True))
            assert counts == Counter(request.output_token_ids)
            assert row.seen == bits(request.token_ids)
        request.add_token(token_id, None)


def test_a_long_prompt_is_read_once_and_only_for_a_repetition_penalty():
    class Watched(list):
        num_reads = 0

        def __iter__(self):
            Watched.num_reads += 1
            return super().__iter__()

    for params, num_reads in (({}, 0), ({"presence_penalty": 1.0}, 0), ({"repetition_penalty": 1.5}, 2)):
        Watched.num_reads = 0
        request = request_of(range(200), **params)
        request.token_ids = Watched(request.token_ids)
        for token_id in range(20):
            sample_row(request, len(request.token_ids) - 1)
            request.add_token(token_id, None)
        assert Watched.num_reads == num_reads


def test_a_row_without_rules_is_small_and_any_row_survives_its_message():
    plain = sample_row(request_of([1, 2, 3]), 2)
    assert (plain.allowed, plain.seen, plain.generated_token_ids, plain.logit_bias) == (None, None, (), ())
    request = request_of(
        [1, 2, 3], presence_penalty=1, frequency_penalty=-1, repetition_penalty=2, logit_bias={5: 1, 6: -2.5}
    )
    request.add_token(9, None)
    full = sample_row(request, 3)
    assert full.generated_token_ids == (9,)
    for sent in (plain, full, msgspec.structs.replace(plain, allowed=b"\xff\x00\x80")):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=SampleRow) == sent


class OnlyThese:
    """A constraint that allows given tokens, one set after the other, and breaks after the last."""

    def __init__(self, *allowed):
        self.left = list(allowed)
        self.accepted = []

    def allowed(self):
        return bits(self.left[0])

    def accept(self, token_id):
        self.accepted.append(token_id)
        self.left.pop(0)
        if not self.left:
            raise LongspanError("nothing can follow")


def test_min_tokens_yields_where_the_constraint_allows_nothing_but_an_end():
    for allowed, banned in (({3}, ()), ({3, 4}, ()), ({3, 5}, (3, 4)), ({5}, (3, 4))):
        request = request_of([1], min_tokens=5, stop_token_ids=[4])
        request.eos_token_ids, request.constraint = (3,), OnlyThese(allowed)
        row = sample_row(request, 0)
        assert (row.banned_token_ids, row.allowed) == (banned, bits(allowed))


# ------------------------------------------------------------------------------------------------ through the engine


SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, top_k=50, seed=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def outputs(model, prompts, params, **options):
    params = params if isinstance(params, list) else [params] * len(prompts)
    requests = run_requests(model, list(zip(prompts, params, strict=True)), **options)
    return [request.output_token_ids for request in requests]


@pytest.mark.cover
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


LAYOUT = {"placement": "striped", "page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 24}


@torch.inference_mode()
def test_the_repetition_penalty_is_that_of_transformers_on_any_number_of_ranks(model):
    def reference(seed):
        prompt = random_prompt(61, seed)
        output = load_reference(model.path).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.4,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.scores).topk(2).values
        return prompt, output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min()

    prompt, expected, _ = next(found for found in map(reference, range(8)) if found[2] > NEAR_TIE)
    plain = SamplingParams(max_tokens=40, ignore_eos=True)
    penalised = msgspec.structs.replace(plain, repetition_penalty=1.4)
    for options in ({}, {"context_parallel_size": 2, **LAYOUT}, {"context_parallel_size": 3, **LAYOUT}):
        assert outputs(model, [prompt, prompt], [penalised, plain], **options)[0] == expected
    assert outputs(model, [prompt], plain)[0] != expected


@torch.inference_mode()
def test_bias_and_penalties_are_those_of_a_naive_loop_on_any_number_of_ranks(model):
    values = {"presence_penalty": 1.5, "frequency_penalty": 0.75, "repetition_penalty": 1.2}
    bias = {7: 1.5, 8: 1.5, 299: -100}
    reference = load_reference(model.path)

    def naive(seed):
        token_ids, margin = random_prompt(31, seed), math.inf
        for _ in range(25):
            logits = reference(torch.tensor([token_ids])).logits[0, -1]
            counts = Counter(token_ids[31:])
            changed = naive_logits(
                logits,
                row(
                    logit_bias=tuple(bias.items()),
                    seen=bits(token_ids),
                    generated_token_ids=tuple(counts),
                    generated_counts=tuple(counts.values()),
                    **values,
                ),
            )
            second, best = np.sort(changed)[-2:]
            margin = min(margin, best - second)
            token_ids.append(int(changed.argmax()))
        return token_ids, margin

    token_ids, _ = next(found for found in map(naive, range(8)) if found[1] > NEAR_TIE)
    params = SamplingParams(max_tokens=25, ignore_eos=True, logit_bias=bias, **values)
    sampled = msgspec.structs.replace(params, temperature=1.0, seed=3)
    alone = outputs(model, [token_ids[:31]] * 2, [params, sampled])
    assert alone[0] == token_ids[31:]
    assert outputs(model, [token_ids[:31]] * 2, [params, sampled], context_parallel_size=2, **LAYOUT) == alone


def test_a_large_bias_decides_and_leaves_logprobs_alone(model):
    prompt = random_prompt(20, 1)
    params = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias=[[17, 100]], logprobs=0)
    (request,) = run_requests(model, [(prompt, params)])
    assert request.output_token_ids == [17, 17, 17]
    assert all(found.logprob < -0.5 and found.rank > 1 for found in request.logprobs)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_constraint_decides_and_one_that_breaks_ends_its_request_alone(model, num_ranks):
    prompt = model.references[1].prompt
    broken, whole = OnlyThese({5, 6}, {7}, {8}), OnlyThese({5, 6}, {7}, {8}, {9}, {2})
    with tiny_engine(model, context_parallel_size=num_ranks, **LAYOUT) as engine:
        requests = [
            engine.add_request(prompt, greedy(10), constraint=broken),
            engine.add_request(prompt, SamplingParams(max_tokens=10), constraint=whole),
            engine.add_request(prompt, greedy(10)),
        ]
        run_all(engine)
    first = requests[0].output_token_ids[0]
    assert first in (5, 6)
    assert [request.output_token_ids for request in requests] == [
        [first, 7, 8],
        [first, 7, 8, 9, 2],
        model.references[1].token_ids[:10],
    ]
    assert [request.finish_reason for request in requests] == ["error", "stop", "length"]
    assert [request.error for request in requests] == ["nothing can follow", None, None]
    assert whole.accepted == [first, 7, 8, 9]  # the request does not go on after the end token


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("max_tokens", 0, "a whole number from 1"),
        ("max_tokens", True, "a whole number from 1"),
        ("max_tokens", 2.0, "a whole number from 1"),
        ("max_tokens", "5", "a whole number from 1"),
        ("min_tokens", -1, "a whole number from 0"),
        ("min_tokens", 17, "a whole number from 0 to max_tokens (16)"),
        ("temperature", math.nan, "a finite number from 0"),
        ("temperature", math.inf, "a finite number from 0"),
        ("temperature", -0.1, "a finite number from 0"),
        ("temperature", True, "a finite number from 0"),
        ("temperature", None, "a finite number from 0"),
        ("top_p", 0, "a number above 0 and up to 1"),
        ("top_p", 1.01, "a number above 0 and up to 1"),
        ("top_p", math.nan, "a number above 0 and up to 1"),
        ("top_k", -1, "a whole number from 0 to 2147483647 (0: all)"),
        ("top_k", 2**64, "a whole number from 0 to 2147483647 (0: all)"),
        ("top_k", 1.5, "a whole number from 0 to 2147483647 (0: all)"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("min_p", -0.5, "a number from 0 to 1"),
        *(
            (field, value, "a number from -2 to 2")
            for field in ("presence_penalty", "frequency_penalty")
            for value in (-2.1, 2.5, math.nan, math.inf, True, None, "1")
        ),
        *(
            ("repetition_penalty", value, "a finite number above 0 (1 changes nothing)")
            for value in (0, -1.0, math.nan, math.inf, True, None, "1")
        ),
        *(
            ("logit_bias", value, "pairs of a token id, each at most once, and a number from -100 to 100")
            for value in (
                {-1: 0.0},
                {1.0: 0.0},
                {True: 0.0},
                {"1": 0.0},
                {1: 100.5},
                {1: -101},
                {1: math.nan},
                {1: True},
                {1: None},
                ((1, 0.0), (1, 0.0)),
                ((1, 0.0, 0.0),),
                ((1,),),
                (1, 0.0),
                5,
                None,
                "1",
            )
        ),
        *(
            ("json_schema", value, "None or JSON text of an object")
            for value in ("", "{", "{'a': 1}", "[]", "true", "5", "null", '{"minimum": NaN}', "[" * 5000, {}, b"{}", 5)
        ),
        ("seed", -1, "a whole number from 0 to 2**63 - 1"),
        ("seed", 2**63, "a whole number from 0 to 2**63 - 1"),
        ("seed", True, "a whole number from 0 to 2**63 - 1"),
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
    received = tuple(received.items()) if field == "logit_bias" and isinstance(received, dict) else received
    shown = repr(received) if len(repr(received)) <= 200 else f"{received!r:.200}..."
    assert str(caught.value) == f"{field}: got {shown}, legal is {legal}"


def test_rejects_to_ignore_the_end_of_a_complete_output():
    with pytest.raises(ConfigError, match="ignore_eos: got True, legal is false with json_schema: only an end token"):
        SamplingParams(ignore_eos=True, json_schema="{}")


def test_rejects_biases_outside_the_vocabulary(model):
    with pytest.raises(ConfigError, match=f"token id: got {VOCAB_SIZE}, legal is 0 to {VOCAB_SIZE - 1}"):
        run_requests(model, [([5], SamplingParams(logit_bias={VOCAB_SIZE: 1}))])


def test_rejects_to_ban_all_tokens(model):
    everything = list(range(VOCAB_SIZE))
    with pytest.raises(ConfigError, match="stop_token_ids: got all tokens of the model"):
        run_requests(model, [([5], SamplingParams(stop_token_ids=everything, min_tokens=1))])
    (request,) = run_requests(model, [([5], SamplingParams(stop_token_ids=everything))])
    assert request.finish_reason is FinishReason.STOP


def test_rejects_a_schema_without_its_constraint(model):
    with pytest.raises(ConfigError, match="json_schema: got no constraint with it"):
        run_requests(model, [([5], SamplingParams(json_schema="{}"))])


def test_rejects_stop_tokens_outside_the_vocabulary(model):
    with pytest.raises(ConfigError, match=f"token id: got {VOCAB_SIZE}, legal is 0 to {VOCAB_SIZE - 1}"):
        run_requests(model, [([5], SamplingParams(stop_token_ids=[VOCAB_SIZE]))])


def test_lists_are_taken_for_tuples():
    params = SamplingParams(stop="a", stop_token_ids=[1, 2], logit_bias=[[3, 1.5], (4, 0)])
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (1, 2), ((3, 1.5), (4, 0)))
    assert SamplingParams(logit_bias={3: 1.5}) == SamplingParams(logit_bias=((3, 1.5),))


def test_a_batch_of_rows_gets_what_each_row_gets_alone():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 50, generator=generator)
    logits[2, 7] = logits[2, 9] = 9.0  # a tie: the first one wins in either way
    plain = row(temperature=0)
    rows = [plain, row(temperature=1.0, seed=5), plain, row(temperature=0, banned_token_ids=(int(logits[3].argmax()),))]
    rows += [plain, row(temperature=0, logit_bias=((4, 50.0),)), plain]
    assert sample_all(logits, rows) == [sample(row_logits, one) for row_logits, one in zip(logits, rows, strict=True)]


def test_rows_with_different_rules_are_sampled_together_as_alone(monkeypatch):
    """On a GPU many rows share every launch; whatever rules the others have, a row's token is its own."""
    mask = bytes([0b10110110]) * 7
    rules = [
        {"temperature": 0.0, "banned_token_ids": (3, 4)},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.5, "min_p": 0.1},
        {"allowed": mask, "temperature": 2.0},
        {"seen": mask, "repetition_penalty": 1.7, "logit_bias": ((5, 2.0), (7, -9.0))},
        {"generated_token_ids": (1, 2), "generated_counts": (3, 1), "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"allowed": b"", "temperature": 0.0},
        {"temperature": 0.0},
        {},
    ]
    rows = [row(position, seed=seed, **one) for position, seed in ((3, 1), (4, 2), (900, 3)) for one in rules]
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[9, 7] = torch.nan
    alone = sample_all(logits, rows)
    monkeypatch.setitem(sampler.ROWS_AT_ONCE, "cpu", 16)
    together = sample_all(logits, rows)
    assert [str(one) for one in together] == [str(one) for one in alone]
    assert sum(isinstance(one, LongspanError) for one in together) == 4
    assert len({one for one in together if isinstance(one, int)}) > 5


def test_a_row_that_is_not_a_number_is_an_error_of_that_row_alone():
    logits = torch.zeros(3, 50)
    logits[1, 4] = torch.nan
    first, second, third = sample_all(logits, [row(3, temperature=0)] * 3)
    assert (first, third) == (0, 0)
    assert str(second) == "request 0: the model's logits at position 3 hold NaN"


@pytest.mark.parametrize("rules", [{"top_p": 5e-324, "top_k": 1, "min_p": 0.5}, {"top_p": 5e-324}, {"min_p": 1.0}])
@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1000.0])
def test_extreme_rules_keep_the_most_probable_token(rules, temperature):
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, row(**{"temperature": temperature, **rules})) in ((1,) if "top_p" in rules else (0, 1, 2))


def test_a_row_that_fails_ends_its_request_and_no_other(model, monkeypatch):
    """As with NaN logits: the request says why, its pages are free, the others go on."""
    bad = {"left": 3}

    def sample_or_fail(logits, rows):
        found = sample_all(logits, rows)
        if 77 in (seeds := [one.seed for one in rows]):
            bad["left"] -= 1
            if not bad["left"]:
                found[seeds.index(77)] = LongspanError("the model's logits hold NaN")
        return found

    monkeypatch.setattr(runner, "sample_all", sample_or_fail)
    several = [SamplingParams(max_tokens=6, temperature=1.0, seed=seed, ignore_eos=True) for seed in (76, 77, 78)]
    good, failed, other = run_requests(model, [([5, 6, 7], one) for one in several], context_parallel_size=2)
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "the model's logits hold NaN"
    assert failed.num_generated == 2
    assert [one.num_generated for one in (good, other)] == [6, 6]
