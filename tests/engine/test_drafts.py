"""Tokens are the same with and without drafts, however good the drafts are, for every family and every way to spread a
request, greedy and sampled; and broken ways to accept drafts change them."""

from contextlib import contextmanager

import pytest
from draft_requests import (
    NUM_TOKENS,
    SPREADS,
    STRIPED,
    OddAndEven,
    accept_one_too_many,
    asked,
    name_of,
    options_of,
    params_of,
    prompts_alike,
)
from drafts import SPECULATION, check_all_drafts, scripted
from tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    all_pairs,
    greedy,
    memory_for,
    random_prompt,
    run_all,
    run_requests,
    tiny_engine,
    tiny_model,
)

from longspan.cp import eager
from longspan.types import FinishReason, SamplingParams
from longspan.worker import runner

WRONG = (0.3, 0.0, 1.0)
"""Probability that a draft is wrong."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "ignore_eos": True}

CASES = all_pairs({**SPREADS, "wrong": WRONG, "max_num_batched_tokens": (64, 5, 2048)})


@pytest.fixture(autouse=True)
def all_drafts_are_checked(monkeypatch):
    check_all_drafts(monkeypatch)


@contextmanager
def drafting_engine(model, truths, wrong, **options):
    """An engine whose drafts come from `truths`, outputs by prompt."""
    with tiny_engine(model, speculative_config=SPECULATION, **options) as engine:
        engine.scheduler.drafting.make_proposer = scripted(
            lambda request: [*request.token_ids, *truths.get(tuple(request.token_ids), ())], wrong, VOCAB_SIZE
        )
        yield engine


def check(case):
    model, requests = tiny_model(case["family"]), asked(case["family"], case["temperature"])
    truths = {tuple(prompt): output for prompt, _, output in requests}
    options = options_of(case)
    wrong = options.pop("wrong")
    if options["placement"] == "spill":
        options["kv_cache_memory"] = memory_for(model, 240 // options["context_parallel_size"] + 32)
    with drafting_engine(model, truths, wrong, **options) as engine:
        running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        run_all(engine)
        drafting = engine.scheduler.drafting
    assert [request.output_token_ids for request in running] == [output for _, _, output in requests]
    assert drafting.num_drafted
    assert bool(drafting.num_accepted) == (wrong < 1)
    assert bool(drafting.num_rejected) == (wrong > 0)


@pytest.mark.cover
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tokens_are_those_without_drafts(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("strategy", ["auto", "pass_q", "gather_kv", "pass_kv", "tree"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_without_drafts_for_all(family, strategy, wrong, temperature):
    common = {"placement": "striped", "page_size": 4, "async_scheduling": True, "max_num_batched_tokens": 64}
    case = {"family": family, "strategy": strategy, "wrong": wrong, "temperature": temperature, **common}
    check({**case, "context_parallel_size": 3})


# -- what rows depend on beside their positions ---------------------------------------------------------------------


RULES = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2, "presence_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.4},
    "min_tokens": {"min_tokens": 13, "stop_token_ids": tuple(range(10, 80))},
    "stops": {"stop_token_ids": tuple(range(10, 25))},
    "bias": {"logit_bias": ((7, 4.0), (11, -50.0))},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
    "constraint": {},
    "constraint with penalties": {"presence_penalty": 1.0, "min_tokens": 9, "stop_token_ids": (12, 13)},
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.3},
}


def run_with_rule(rule, engine, prompt):
    params = SamplingParams(**{**SAMPLED, "max_tokens": NUM_TOKENS, "seed": 5, **RULES[rule]})
    constraint = OddAndEven() if rule.startswith("constraint") else None
    request = engine.add_request(prompt, params, constraint=constraint)
    run_all(engine)
    return request


@pytest.mark.parametrize("wrong", [0.3, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES)
def test_rows_behind_drafts_are_sampled_as_if_the_drafts_stood(rule, wrong):
    model, prompt = tiny_model("mistral-window-24"), random_prompt(45, 3)
    with tiny_engine(model) as engine:
        alone = run_with_rule(rule, engine, prompt)
    truths = {tuple(prompt): alone.output_token_ids}
    with drafting_engine(model, truths, wrong, **STRIPED) as engine:
        request = run_with_rule(rule, engine, prompt)
        assert engine.scheduler.drafting.num_accepted > 1
    assert request.output_token_ids == alone.output_token_ids
    assert request.finish_reason is alone.finish_reason
    assert [entry.token_id for entry in request.logprobs] == [entry.token_id for entry in alone.logprobs]
    for entry, expected in zip(request.logprobs, alone.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-3)
    if rule == "stops":
        assert request.finish_reason is FinishReason.STOP


def test_preempted_requests_and_prefix_hits_have_the_same_tokens():
    """Five requests that outgrow the memory, whose prompts begin alike; then the same again, from cached answers."""
    model = tiny_model("llama")
    prompts, alone = prompts_alike()
    truths = {tuple(prompt): output for prompt, output in zip(prompts, alone, strict=True)}
    with drafting_engine(model, truths, 0.3, kv_cache_memory=memory_for(model, 110), **STRIPED) as engine:
        requests = [engine.add_request(prompt, params_of(0.8, i)) for i, prompt in enumerate(prompts)]
        run_all(engine)
        assert [request.output_token_ids for request in requests] == alone
        assert engine.scheduler.num_preemptions
        following = [*prompts[-1], *alone[-1][:30]]
        again = engine.add_request(following, greedy(10))
        run_all(engine)
        assert again.num_cached > len(prompts[-1]), "pages of the answer, accepted drafts among them"
    (expected,) = run_requests(model, [(following, greedy(10))])
    assert again.output_token_ids == expected.output_token_ids


def test_a_request_may_be_cancelled_while_its_drafts_are_checked():
    model = tiny_model("llama")
    requests = asked("llama", 0.0)
    truths = {tuple(prompt): output for prompt, _, output in requests}
    with drafting_engine(model, truths, 0.0, context_parallel_size=2, placement="striped", page_size=4) as engine:
        first, second = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        while not first.drafts:
            engine.take_in([])
            engine.submit_plans()
            if not first.drafts:
                engine.step()
        engine.abort(first)
        run_all(engine)
    assert first.finish_reason is FinishReason.ABORT
    assert second.output_token_ids == requests[1][2]


# -- mutations -------------------------------------------------------------------------------------------------------


def keep_keys_of_wrong_drafts(monkeypatch):
    """What was written of a position once is not written over."""
    original, written = eager.store_runs, set()

    def store_runs(rows, layout):
        kept = {key: row for key, row in rows.items() if not all((key[0], p) in written for p in range(key[1], key[2]))}
        written.update((request_id, p) for request_id, start, end in rows for p in range(start, end))
        return original(kept, layout)

    monkeypatch.setattr(eager, "store_runs", store_runs)
    monkeypatch.setattr(eager, "is_scattered", lambda stores: False)


def reuse_a_random_number(monkeypatch):
    """All rows of a request draw with the number of the first of them."""
    original = runner.sample_all

    def sample_all(logits, rows):
        first = {}
        for row in rows:
            first.setdefault(row.request_id, row.position)
        return original(logits, [_at(row, first[row.request_id]) for row in rows])

    monkeypatch.setattr(runner, "sample_all", sample_all)


def _at(row, position):
    from msgspec import structs

    return structs.replace(row, position=position)


@pytest.mark.parametrize("mutation", [accept_one_too_many, keep_keys_of_wrong_drafts, reuse_a_random_number])
def test_a_mutation_changes_tokens(mutation, monkeypatch):
    requests = asked("llama", 0.8)
    truths = {tuple(prompt): output for prompt, _, output in requests}
    mutation(monkeypatch)
    options = {"context_parallel_size": 2, "placement": "packed", "page_size": 4}
    with drafting_engine(tiny_model("llama"), truths, 0.3, **options) as engine:
        running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        run_all(engine)
    assert [request.output_token_ids for request in running] != [output for _, _, output in requests]
