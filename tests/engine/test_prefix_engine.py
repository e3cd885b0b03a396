"""Requests that go on from cached KV, or are computed again, get the tokens that Transformers gives them.

Real tiny models on ranks that are threads. What one placement wrote another reads; pages travel between ranks; memory
is so tight that requests are preempted and pages evicted. What is computed is counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tiny_models import (
    NUM_TOKENS,
    PROMPT_LENS,
    Reference,
    TinyModel,
    greedy,
    memory_for,
    random_prompt,
    run_all,
    tiny_engine,
    tiny_model,
)

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.plan.types import Plan
from longspan.scheduler.request import Request
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

FULL, WINDOW, MIXED, CHUNKED, LATENT = "llama", "mistral-window-24", "gemma3", "llama4", "youtu"
FAMILIES = (FULL, WINDOW, MIXED, CHUNKED, LATENT)
PAGE = 16
OPTIONS = {"page_size": PAGE, "stripe_size": 64, "max_num_batched_tokens": 200}
"""With these a prompt of fewer than 128 tokens per rank is packed."""


def reference(model: TinyModel, length: int) -> Reference:
    return model.references[PROMPT_LENS.index(length)]


class Watched:
    """An engine, and the plans that it ran."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.plans = engine, list[Plan]()
        schedule = engine.scheduler.schedule

        def schedule_and_note() -> Plan | None:
            plan = schedule()
            if plan is not None:
                self.plans.append(plan)
            return plan

        engine.scheduler.schedule = schedule_and_note

    def serve(self, *prompts: list[int], max_tokens: int = NUM_TOKENS) -> list[Request]:
        """Run some prompts at once, to their ends."""
        requests = [self.engine.add_request(prompt, greedy(max_tokens)) for prompt in prompts]
        run_all(self.engine)
        return requests

    def tokens_computed(self) -> int:
        return sum(stats.tokens_computed for stats in self.engine.rank_stats())

    def copied_pages(self) -> list[tuple[int, int]]:
        """(from, to) per page that went to another rank."""
        return [
            (copy.source.rank, copy.target.rank)
            for plan in self.plans
            for copy in plan.page_copies
            for _ in range(copy.source.num_pages)
            if copy.source.rank != copy.target.rank
        ]


@contextmanager
def watched_engine(model: TinyModel, num_ranks: int, **options: object) -> Iterator[Watched]:
    with tiny_engine(model, context_parallel_size=num_ranks, **{**OPTIONS, **options}) as engine:
        yield Watched(engine)


def ranks_of(request: Request) -> set[int]:
    return request.allocation.ranks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_prompt_that_comes_again_computes_only_its_tail(family, num_ranks):
    model = tiny_model(family)
    expected = reference(model, 1025)
    with watched_engine(model, num_ranks) as watched:
        (first,) = watched.serve(expected.prompt)
        assert watched.tokens_computed() == 1025 + NUM_TOKENS - 1
        (second,) = watched.serve(expected.prompt)
        assert watched.tokens_computed() == 1025 + 1 + 2 * (NUM_TOKENS - 1)
        (longer,) = watched.serve(second.token_ids[:-10], max_tokens=10)
        assert watched.tokens_computed() == 1025 + 1 + 2 * (NUM_TOKENS - 1) + (1079 - 1072) + 9
        assert ranks_of(first) == set(range(num_ranks))
    assert (first.num_cached, second.num_cached, longer.num_cached) == (0, 1024, 1072)
    assert first.output_token_ids == second.output_token_ids == expected.token_ids
    assert longer.output_token_ids == expected.token_ids[-10:]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_prefix_caching_everything_is_computed_again(family):
    model = tiny_model(family)
    expected = reference(model, 97)
    with watched_engine(model, 2, enable_prefix_caching=False) as watched:
        for i in (1, 2):
            (request,) = watched.serve(expected.prompt)
            assert request.output_token_ids == expected.token_ids
            assert request.num_cached == 0
            assert watched.tokens_computed() == i * (97 + NUM_TOKENS - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["gather_kv", "pass_kv", "pass_q"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_prefix_written_packed_is_read_striped(family, num_ranks, strategy):
    model = tiny_model(family)
    expected = reference(model, 1025)
    with watched_engine(model, num_ranks, strategy=strategy) as watched:
        (short,) = watched.serve(expected.prompt[:200], max_tokens=1)
        (long,) = watched.serve(expected.prompt)
        assert len(ranks_of(short)) == 1
        assert ranks_of(long) == set(range(num_ranks))
    assert long.num_cached == 192
    assert long.output_token_ids == expected.token_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_prefix_written_striped_is_read_packed(family, num_ranks):
    """Its pages lie on all ranks: those that tokens still see are copied to one."""
    model = tiny_model(family)
    expected = reference(model, 97)
    with watched_engine(model, num_ranks, stripe_size=32) as watched:
        (long,) = watched.serve(expected.prompt[:96] + random_prompt(700, 9), max_tokens=1)
        (short,) = watched.serve(expected.prompt)
        assert ranks_of(long) == set(range(num_ranks))
        assert len(ranks_of(short)) == 1
        (home,) = ranks_of(short)
        assert all(target == home for _, target in watched.copied_pages())
        if family != WINDOW:  # the two pages of a window may lie on one rank
            assert watched.copied_pages()
    assert short.num_cached == 96
    assert short.output_token_ids == expected.token_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_copies_of_a_popular_prompt_are_exact_on_every_rank(family, num_ranks):
    model = tiny_model(family)
    expected = reference(model, 97)
    with watched_engine(model, num_ranks) as watched:
        watched.serve(expected.prompt, max_tokens=1)
        before = watched.tokens_computed()
        requests = watched.serve(*[expected.prompt] * (2 * num_ranks))
        assert watched.tokens_computed() - before == 2 * num_ranks * (1 + NUM_TOKENS - 1)
        assert {rank for request in requests for rank in ranks_of(request)} == set(range(num_ranks))
        assert {target for _, target in watched.copied_pages()} == set(range(1, num_ranks))
        copied = len(watched.copied_pages())
        again = watched.serve(*[expected.prompt] * num_ranks)
        assert len(watched.copied_pages()) == copied, "every rank has it now"
    assert all(request.output_token_ids == expected.token_ids for request in (*requests, *again))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_prefix_that_spilled_over_ranks_is_read_where_it_lies(family, num_ranks):
    model = tiny_model(family)
    expected = reference(model, 1025)
    memory = memory_for(model, 1200 // num_ranks + 100)
    with watched_engine(model, num_ranks, placement="spill", kv_cache_memory=memory) as watched:
        (first,) = watched.serve(expected.prompt)
        (second,) = watched.serve(expected.prompt)
        if family == FULL:
            assert ranks_of(first) == set(range(num_ranks))
    assert first.output_token_ids == second.output_token_ids == expected.token_ids
    assert second.num_cached == 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_page_behind_another_beginning_is_not_taken_for_it(family):
    model = tiny_model(family)
    expected = reference(model, 97)
    with watched_engine(model, 1) as watched:
        watched.serve(random_prompt(PAGE, 5) + expected.prompt[PAGE:], max_tokens=1)
        (request,) = watched.serve(expected.prompt)
    assert request.num_cached == 0
    assert request.output_token_ids == expected.token_ids


# -- tight memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_requests_that_are_preempted_get_the_same_tokens(family, num_ranks, caching):
    model = tiny_model(family)
    expected = [reference(model, length) for length in (31, 97, 1, 31, 97, 1, 31, 97)]
    options = {"max_num_batched_tokens": 32, "enable_prefix_caching": caching}
    memory = memory_for(model, 176 + 60 * (num_ranks == 1))
    with watched_engine(model, num_ranks, kv_cache_memory=memory, **options) as watched:
        requests = watched.serve(*[one.prompt for one in expected])
        assert watched.engine.scheduler.num_preemptions > 0
    assert [request.output_token_ids for request in requests] == [one.token_ids for one in expected]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_preemption_changes_neither_random_numbers_nor_logprobs(num_ranks):
    model = tiny_model(MIXED)
    kinds = [
        (
            random_prompt(20 + 7 * i, i),
            SamplingParams(
                max_tokens=60,
                temperature=1.0,
                top_p=0.9,
                seed=i,
                ignore_eos=True,
                logprobs=2,
                prompt_logprobs=1 if i % 2 else None,
                presence_penalty=0.3,
                repetition_penalty=1.1,
            ),
        )
        for i in range(7)
    ]
    outputs: list[list[Request]] = []
    for num_tokens in (200, 2000):
        memory = memory_for(model, num_tokens)
        with watched_engine(model, num_ranks, kv_cache_memory=memory, max_num_batched_tokens=32) as watched:
            requests = [watched.engine.add_request(*kind) for kind in kinds]
            run_all(watched.engine)
            assert (watched.engine.scheduler.num_preemptions > 0) == (num_tokens == 200)
        outputs.append(requests)
    assert any(request.num_preemptions for request in outputs[0] if request.params.prompt_logprobs is not None)
    for tight, ample in zip(*outputs, strict=True):
        assert tight.output_token_ids == ample.output_token_ids
        for name in ("logprobs", "prompt_logprobs"):
            found, known = getattr(tight, name), getattr(ample, name)
            assert [entry.token_id for entry in found] == [entry.token_id for entry in known]
            assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in known], abs=1e-4)
        if tight.params.prompt_logprobs is not None:
            assert [entry.token_id for entry in tight.prompt_logprobs] == tight.token_ids[1 : tight.prompt_len]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_left_of_a_prefix_after_eviction_is_still_exact(family, num_ranks):
    """Other prompts come between, of other lengths, so that each time another part of the prefix is gone."""
    model = tiny_model(family)
    expected = reference(model, 97)
    num_tokens = 1000 if family == MIXED else 500 if num_ranks == 1 else 260  # a window's pool is a quarter of this
    memory = memory_for(model, num_tokens)
    hits = []
    with watched_engine(model, num_ranks, kv_cache_memory=memory, max_num_batched_tokens=64) as watched:
        for i, length in enumerate((30, 100, 60, 170, 200, 190, 200)):
            watched.serve(*[random_prompt(length, 1000 + 10 * i + j) for j in range(num_ranks)], max_tokens=2)
            (request,) = watched.serve(expected.prompt)
            assert request.output_token_ids == expected.token_ids
            hits.append(request.num_cached)
        allocators = [a for rank in watched.engine.scheduler.memory.allocators for a in rank]
        assert sum(allocator.num_evicted for allocator in allocators) > 0
    assert max(hits) == 96, hits
    assert min(hits) < 96


# -- real processes --------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_pages_travel_between_processes():
    model = tiny_model(MIXED)
    expected = reference(model, 97)
    config = EngineConfig(
        model=model.path, context_parallel_size=2, threads_per_rank=1, kv_cache_memory=2**24, **OPTIONS
    )
    with Engine(config) as engine:
        watched = Watched(engine)
        watched.serve(expected.prompt, max_tokens=1)
        assert [stats.bytes_sent for stats in engine.rank_stats()] == [0, 0]
        requests = watched.serve(*[expected.prompt] * 4)
        num_bytes = sum(
            copy.source.num_pages * PAGE * engine.spec.kv_groups[copy.group_idx].token_bytes
            for plan in watched.plans
            for copy in plan.page_copies
        )
        assert num_bytes > 0
        assert [stats.bytes_sent for stats in engine.rank_stats()] == [num_bytes, 0], "whole pages, and nothing else"
    assert {rank for request in requests for rank in ranks_of(request)} == {0, 1}
    assert all(request.output_token_ids == expected.token_ids for request in requests)
    assert all(request.num_cached == 96 for request in requests)
