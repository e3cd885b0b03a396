"""Greedy tokens are those of Transformers on one device, for every proven family and every way to spread a request."""

import copy
import itertools
import time
from concurrent.futures import wait

import pytest
from cp_cases import NODE_COUNTS, RANK_COUNTS, spread
from tiny_models import (
    COMMON,
    FAMILIES,
    all_pairs,
    generate_all,
    generate_reference,
    greedy,
    memory_for,
    random_prompt,
    run_all,
    run_requests,
    tiny_engine,
    tiny_model,
)
from transformers import AutoConfig

from longspan.errors import LongspanError
from longspan.models.families import PROVEN_FAMILIES
from longspan.types import FinishReason
from longspan.worker import runner

RANKS = (1, 2, 3, 4)
STRATEGIES = ("auto", "gather_kv", "pass_kv", "pass_q", "tree")
PLACEMENTS = ("striped", "spill", "auto", "packed")
PAGE_SIZES = (4, 16, 64)
PAGES_PER_STRIPE = (1, 2, 5)
BUDGETS = (7, 33, 64, 100, 513, 2048)
STEP_MS = (None, 2)
"""With 2 ms, chunks end wherever the time that the steps before them took says."""

# 7 tokens a step belong to the slow cover.
FAST_CASES = [
    {**case, "pages_per_stripe": PAGES_PER_STRIPE[i % 3], "max_num_batched_tokens": (100, 513, 33, 2048, 64)[i % 5]}
    for i, case in enumerate(
        all_pairs(
            {
                "family": tuple(FAMILIES),
                "context_parallel_size": RANKS,
                "strategy": STRATEGIES,
                "placement": PLACEMENTS,
                "page_size": PAGE_SIZES,
                "max_step_ms": STEP_MS,
                "num_nodes": NODE_COUNTS,
            }
        )
    )
]
SLOW_CASES = all_pairs(
    {
        "family": tuple(FAMILIES),
        "max_num_batched_tokens": BUDGETS,
        "context_parallel_size": RANKS,
        "strategy": STRATEGIES,
        "decode_strategy": (None, "gather_kv", "pass_kv", "pass_q", "tree"),
        "placement": PLACEMENTS,
        "page_size": PAGE_SIZES,
        "pages_per_stripe": PAGES_PER_STRIPE,
        "max_num_seqs": (64, 3, 1),
        "max_step_ms": STEP_MS,
        "num_nodes": NODE_COUNTS,
    }
)


def name_of(case):
    return "-".join(str(value) for value in case.values())


def check(case):
    options = dict(case)
    model = tiny_model(options.pop("family"))
    options["stripe_size"] = options["page_size"] * options.pop("pages_per_stripe")
    options["nodes"] = spread(options["context_parallel_size"], options.pop("num_nodes"))
    if options["placement"] == "spill":
        # The longest prompt must not fit one rank, where there are several.
        num_tokens = 1200 // options["context_parallel_size"] + 2 * options["page_size"]
        options["kv_cache_memory"] = memory_for(model, num_tokens)
    tokens = generate_all(model, **options)
    assert tokens == [reference.token_ids for reference in model.references]


@pytest.mark.cover
@pytest.mark.parametrize("case", FAST_CASES, ids=name_of)
def test_greedy_tokens_are_those_of_transformers(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=name_of)
def test_greedy_tokens_are_those_of_transformers_all_pairs(case):
    check(case)


def test_the_cases_hold_every_pair_of_values():
    for cases, num_factors in ((FAST_CASES, 7), (SLOW_CASES, 11)):
        for a, b in itertools.combinations(list(cases[0])[:num_factors], 2):
            met = {(case[a], case[b]) for case in cases}
            assert met == set(itertools.product({case[a] for case in cases}, {case[b] for case in cases}))


def test_every_family_here_is_proven():
    assert {model_type for model_type, _ in FAMILIES.values()} <= set(PROVEN_FAMILIES)


@pytest.mark.cover
def test_every_head_ratio_occurs():
    ratios = set()
    for name in FAMILIES:
        model_type, options = FAMILIES[name]
        config = AutoConfig.for_model(model_type, **copy.deepcopy({**COMMON, **options}))
        ratios.add(config.num_attention_heads // config.num_key_value_heads)
    assert ratios >= {1, 4, 7, 8}


@pytest.mark.cover
@pytest.mark.parametrize(
    ("family", "strategy", "backend"),
    [
        ("llama", "pass_q", "reference"),
        pytest.param("llama", "pass_q", "triton", marks=pytest.mark.slow),  # minutes in Triton's interpreter
        ("gemma2", "pass_kv", "reference"),
        pytest.param("gemma2", "pass_kv", "triton", marks=pytest.mark.slow),
        ("smollm3-window", "gather_kv", "reference"),
        pytest.param("smollm3-window", "gather_kv", "triton", marks=pytest.mark.slow),
        ("llama4", "pass_kv", "reference"),
        pytest.param("llama4", "pass_q", "triton", marks=pytest.mark.slow),
    ],
)
def test_other_backends_give_the_same_tokens(family, strategy, backend):
    model = tiny_model(family)
    references = model.references[:3]
    requests = run_requests(
        model,
        [(reference.prompt, greedy(12)) for reference in references],
        attention_backend=backend,
        context_parallel_size=3,
        placement="striped",
        page_size=4,
        stripe_size=16,
        strategy=strategy,
        max_num_batched_tokens=50,
    )
    assert [r.output_token_ids for r in requests] == [reference.token_ids[:12] for reference in references]


@pytest.mark.cover
@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
@pytest.mark.parametrize(
    ("strategy", "num_nodes"), [*((s, 1) for s in STRATEGIES[1:-1]), *(("tree", n) for n in NODE_COUNTS)]
)
def test_every_strategy_on_every_number_of_ranks_and_nodes_gives_the_tokens_of_one_rank(strategy, num_nodes, num_ranks):
    model = tiny_model("llama-llama3-rope")
    references = model.references[:3]
    requests = run_requests(
        model,
        [(reference.prompt, greedy(20)) for reference in references],
        context_parallel_size=num_ranks,
        nodes=spread(num_ranks, num_nodes),
        placement="striped",
        page_size=2,
        stripe_size=4,
        strategy=strategy,
        max_num_batched_tokens=9,
    )
    assert [r.output_token_ids for r in requests] == [reference.token_ids[:20] for reference in references]


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_forced_strategy_is_the_one_that_runs(strategy):
    model = tiny_model("llama")
    reference = model.references[2]
    with tiny_engine(
        model, context_parallel_size=3, placement="striped", page_size=4, stripe_size=8, strategy=strategy
    ) as engine:
        request = engine.add_request(reference.prompt, greedy())
        run_all(engine)
        assert set(engine.strategy_counts) == {strategy}
        assert all(stats.tokens_computed and stats.bytes_sent for stats in engine.rank_stats())
    assert request.output_token_ids == reference.token_ids


def test_decode_may_use_another_strategy_than_prefill():
    model = tiny_model("llama")
    reference = model.references[2]
    with tiny_engine(
        model,
        context_parallel_size=2,
        placement="striped",
        page_size=4,
        stripe_size=8,
        strategy="pass_kv",
        decode_strategy="pass_q",
    ) as engine:
        request = engine.add_request(reference.prompt, greedy())
        run_all(engine)
        assert engine.strategy_counts == {"pass_kv": 1, "pass_q": 63}
    assert request.output_token_ids == reference.token_ids


# ------------------------------------------------------------------------------------------------ edges


EDGE_LENS = (3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 47, 48, 49, 95, 96)
"""Around a page of 4, a stripe of 8, a window of 24, and chunks of 2 and 3 ranks."""


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("num_ranks", "strategy", "budget"), [(2, "pass_q", 16), (3, "pass_kv", 16), (3, "auto", 11)])
def test_prompts_that_end_at_page_stripe_and_chunk_edges(family, num_ranks, strategy, budget):
    model = tiny_model(family)
    references = [edge_reference(family, length) for length in EDGE_LENS]
    requests = run_requests(
        model,
        [(reference.prompt, greedy(10)) for reference in references],
        context_parallel_size=num_ranks,
        strategy=strategy,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=budget,
    )
    assert [request.output_token_ids for request in requests] == [reference.token_ids for reference in references]


_edge_references = {}


def edge_reference(family, length):
    if (family, length) not in _edge_references:
        candidates = (generate_reference(tiny_model(family).path, random_prompt(length, seed), 10) for seed in range(9))
        _edge_references[family, length] = next(c for c in candidates if min(c.margins) > 5e-4)
    return _edge_references[family, length]


def test_decode_goes_round_the_ranks():
    model = tiny_model("llama")
    reference = model.references[0]
    with tiny_engine(model, context_parallel_size=3, placement="striped", page_size=4, stripe_size=4) as engine:
        request = engine.add_request(reference.prompt, greedy())
        run_all(engine)
        assert [stats.tokens_computed for stats in engine.rank_stats()] == [24, 20, 20]
    assert request.output_token_ids == reference.token_ids


@pytest.mark.cover
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window-24"])
@pytest.mark.parametrize("strategy", ["gather_kv", "pass_q"])
def test_a_request_that_outgrows_its_rank_in_decode_is_joined_by_another(family, strategy):
    model = tiny_model(family)
    reference = model.references[2]
    with tiny_engine(
        model,
        context_parallel_size=3,
        placement="spill",
        page_size=4,
        stripe_size=4,
        strategy=strategy,
        kv_cache_memory=memory_for(model, 104),
        max_num_batched_tokens=32,
        async_scheduling=False,  # else a step may take in two tokens, and none sees the first alone
    ) as engine:
        request = engine.add_request(reference.prompt, greedy())
        computed_early = None
        while engine.has_requests:
            engine.step()
            if request.num_generated == 1:
                computed_early = [stats.tokens_computed for stats in engine.rank_stats()]
        if family == "llama":
            assert computed_early == [97, 0, 0]
            assert [stats.tokens_computed for stats in engine.rank_stats()][:2] == [104, 56]
    assert request.output_token_ids == reference.token_ids


@pytest.mark.cover
def test_window_pages_are_freed_and_used_again_by_others():
    model = tiny_model("mistral-window-24")
    with tiny_engine(
        model,
        context_parallel_size=2,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=16,
        kv_cache_memory=memory_for(model, 150),
    ) as engine:
        total = sum(stats.kv_pages_total for stats in engine.rank_stats()) * 4
        requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references * 2]
        run_all(engine)
    assert total < len(model.references[3].prompt)
    assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references * 2]


def test_packed_requests_run_side_by_side():
    model = tiny_model("llama")
    with tiny_engine(model, context_parallel_size=3, placement="packed", max_num_batched_tokens=64) as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references * 3]
        most_in_flight = 0
        submit, ranks_of = engine.executor.submit, {}

        def count(plan):
            nonlocal most_in_flight
            most_in_flight = max(most_in_flight, len({ranks_of[future] for future in engine.in_flight} | {plan.ranks}))
            future = submit(plan)
            ranks_of[future] = plan.ranks
            return future

        engine.executor.submit = count
        run_all(engine)
        assert most_in_flight == 3
        assert all(stats.bytes_sent == 0 for stats in engine.rank_stats())
        assert all(stats.tokens_computed for stats in engine.rank_stats())
    assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references * 3]


@pytest.mark.cover
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_requests_that_come_while_others_run_change_nothing(family):
    """Packed and striped requests share ranks (auto), arrive late, and one ends early."""
    model = tiny_model(family)
    references = [*model.references, *model.references[1:]]
    with tiny_engine(
        model, context_parallel_size=3, page_size=4, stripe_size=16, max_num_batched_tokens=48, max_num_seqs=4
    ) as engine:
        requests = [engine.add_request(references[3].prompt, greedy())]
        aborted = engine.add_request(random_prompt(300, 5), greedy())
        waiting = [references[i] for i in (0, 1, 2, 4, 5, 6)]
        done = [references[3], *waiting]
        num_steps = 0
        while engine.has_requests or waiting:
            engine.step()
            num_steps += 1
            if waiting and num_steps % 3 == 0:
                requests.append(engine.add_request(waiting.pop(0).prompt, greedy()))
            if aborted.num_generated > 5 and aborted.finish_reason is None and not aborted.in_flight:
                engine.finish(aborted, FinishReason.STOP)
        assert aborted.num_generated < 64
    assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in done]


@pytest.mark.cover
def test_local_attention_keeps_every_request_on_one_rank():
    model = tiny_model("qwen3")
    with tiny_engine(model, context_parallel_size=2, strategy="local") as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
        run_all(engine)
        assert set(engine.strategy_counts) == {"local"}
    assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]


def test_a_row_that_cannot_be_sampled_ends_its_request_alone_while_the_next_step_runs(monkeypatch):
    """The step behind it has the request in it, and a token that does not exist."""
    model = tiny_model("llama")
    sample_all, prompt = runner.sample_all, model.references[2].prompt
    where, rows_after = len(prompt) + 8, []

    def fail_at(logits, rows):
        rows_after.extend(row for row in rows if row.request_id == 0 and row.position > where)
        found = sample_all(logits, rows)
        is_it = [row.request_id == 0 and row.position == where for row in rows]
        if any(is_it):
            time.sleep(0.3)  # the driver submits the step behind
        return [LongspanError("no number") if it else token for it, token in zip(is_it, found, strict=True)]

    monkeypatch.setattr(runner, "sample_all", fail_at)
    with tiny_engine(model, context_parallel_size=2, placement="packed") as engine:
        broken = engine.add_request(prompt, greedy())
        others = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
        run_all(engine)
    assert (broken.finish_reason, broken.error) == (FinishReason.ERROR, "no number")
    assert broken.output_token_ids == model.references[2].token_ids[:9]
    assert rows_after, "no step stood behind the one that failed"
    assert [other.output_token_ids for other in others] == [reference.token_ids for reference in model.references]


def test_plans_that_are_taken_in_together_advance_a_request_once_in_the_order_submitted():
    model = tiny_model("llama")
    reference = model.references[1]
    with tiny_engine(model, context_parallel_size=2, placement="packed") as engine:
        request = engine.add_request(reference.prompt, greedy())
        num_together = 0
        while engine.has_requests:
            engine.submit_plans()
            done = list(engine.in_flight)
            wait(done)
            known = request.num_generated
            assert engine.take_in(reversed(done)) == [request]
            num_together += request.num_generated == known + 2
        assert num_together > 10
    assert request.output_token_ids == reference.token_ids
