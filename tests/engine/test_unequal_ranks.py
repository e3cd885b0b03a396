"""Ranks of unequal weights get the tokens that Transformers gives, and work and memory in proportion.

Ranks are threads. Prompts are cut, found in the prefix cache, preempted; what each rank holds and computes is counted.
"""

import pytest
from tiny_models import NUM_TOKENS, greedy, memory_for, run_all, tiny_engine, tiny_model

from longspan.cli.explain import shares_text
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.engine.recovery import fewer_ranks
from longspan.errors import CapacityError, ConfigError
from longspan.types import SamplingParams

OPTIONS = {"page_size": 4, "stripe_size": 16, "max_num_batched_tokens": 64, "placement": "striped"}


@pytest.mark.cover
@pytest.mark.parametrize(
    ("family", "weights", "options"),
    [
        ("llama", (2, 1), {"strategy": "pass_kv", "decode_strategy": "pass_q"}),
        ("gemma3", (1, 3), {}),
        ("llama", (2, 1, 1), {"strategy": "gather_kv"}),
        ("mistral-window-24", (1, 2.5, 1.2), {"page_size": 1, "stripe_size": 24}),
        ("llama", (3, 1, 2, 1, 1.5), {"strategy": "pass_q"}),
        ("llama", (1, 1, 4, 2, 1), {"placement": "auto", "stripe_size": 8, "page_size": 8}),
        ("llama4", (2, 1), {"placement": "spill", "kv_cache_memory": 2**19}),
    ],
)
def test_tokens_are_those_of_transformers_for_any_weights(family, weights, options):
    model = tiny_model(family)
    with tiny_engine(
        model, context_parallel_size=len(weights), rank_weights=weights, **{**OPTIONS, **options}
    ) as engine:
        for _ in range(2):  # the second time from the prefix cache
            requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
            run_all(engine)
            assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]
        assert requests[-1].num_cached > 0


@pytest.mark.cover
def test_requests_are_preempted_where_unequal_pools_are_full():
    model = tiny_model("llama")
    options = {**OPTIONS, "kv_cache_memory": memory_for(model, 700), "enable_prefix_caching": False}
    with tiny_engine(model, context_parallel_size=3, rank_weights=(4, 2, 1), **options) as engine:
        assert engine.capacity().pages_per_rank == (175, 87, 43)
        requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
        run_all(engine)
        assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]
        assert engine.stats().num_preemptions > 0


@pytest.mark.cover
def test_a_long_prompt_is_held_and_computed_in_proportion_and_the_numbers_say_so():
    model = tiny_model("llama")
    longest = model.references[-1]
    with tiny_engine(model, context_parallel_size=3, rank_weights=[2, 1, 1], **OPTIONS) as engine:
        engine.add_request(longest.prompt, greedy(1))
        run_all(engine)
        stats, ranks = engine.stats(), engine.rank_stats()
    total = sum(stats.tokens_computed)
    for rank, share in zip(ranks, (0.5, 0.25, 0.25), strict=True):
        assert rank.tokens_computed == pytest.approx(share * total, abs=4)
        assert rank.kv_pages_total == pytest.approx(2 * share * ranks[0].kv_pages_total, abs=1)
        assert rank.share == share
    assert stats.rank_shares == (0.5, 0.25, 0.25)
    assert shares_text(ranks).startswith("unequal ranks: rank 0 50.0 % of a striped prompt, ")


def test_equal_weights_are_no_weights():
    model = tiny_model("llama")
    with tiny_engine(model, context_parallel_size=2, rank_weights=(3, 3), **OPTIONS) as engine:
        with tiny_engine(model, context_parallel_size=2, **OPTIONS) as other:
            assert engine.scheduler.memory.placer.geometry == other.scheduler.memory.placer.geometry
            assert engine.ranks.told.num_pages == other.ranks.told.num_pages
        assert shares_text(engine.rank_stats()) is None


def test_a_request_that_unequal_pools_cannot_hold_is_refused_with_what_would_fit_it():
    model = tiny_model("llama")
    memory = memory_for(model, 40)
    with tiny_engine(
        model, context_parallel_size=2, rank_weights=(2, 1), **{**OPTIONS, "kv_cache_memory": memory}
    ) as engine:
        engine.check_fits(58, 3)
        with pytest.raises(CapacityError) as caught:
            engine.check_fits(59, 3)
    text = str(caught.value)
    assert "legal is at most 61 (ranks with 10, 5 pages x 4 tokens, and one that needs no page)" in text
    assert "context_parallel_size" not in text
    needed = int(text.partition("kv_cache_memory of at least ")[2].split()[0])
    assert memory < needed <= 1.2 * memory


def test_fewer_ranks_keep_their_weights():
    config = EngineConfig(model="x", context_parallel_size=3, rank_weights=(2, 1, 5), max_restarts=1)
    assert fewer_ranks(config).rank_weights == (2, 1)
    auto = EngineConfig(model="x", context_parallel_size=3, rank_weights="auto", max_restarts=1)
    assert fewer_ranks(auto).rank_weights == "auto"


@pytest.mark.parametrize(
    ("weights", "shown"),
    [((2, 0), "(2, 0)"), ((1, -1), "(1, -1)"), ((1,), "(1,)"), ((1, float("inf")), "(1, inf)")],
)
def test_rejects_weights_that_are_no_numbers_above_zero_for_every_rank(weights, shown):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="x", context_parallel_size=2, rank_weights=weights)
    assert str(caught.value) == f"rank_weights: got {shown}, legal is auto, or one number above 0 for each of 2 ranks"


def test_rejects_a_text_that_names_no_weights():
    with pytest.raises(ConfigError, match="rank_weights: got '2:1', legal is auto, or a number per rank such as 2,1,1"):
        EngineConfig(model="x", context_parallel_size=2, rank_weights="2:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_weights": (1000, 1)}, r"rank_weights: got 1000, 1, which leaves rank 1 without a page: a chunk has"),
        (
            {"rank_weights": (9, 1), "kv_cache_memory": 20000},
            r"rank_weights: they leave rank 1 without a page: kv_cache_memory: got 2222 bytes per rank",
        ),
    ],
)
def test_rejects_weights_that_leave_a_rank_without_a_page(options, message):
    model = tiny_model("llama")
    config = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 2**25, **OPTIONS, **options}
    with pytest.raises(ConfigError, match=f"^{message}"):
        Engine(EngineConfig(model=model.path, context_parallel_size=2, executor="threads", **config), model.module)


def test_a_lone_token_of_a_light_rank_counts():
    """More ranks than pages: some weights round to nothing in a short prompt, and it is computed all the same."""
    model = tiny_model("llama")
    reference = model.references[0]
    with tiny_engine(model, context_parallel_size=5, rank_weights=(5, 4, 3, 2, 1), **OPTIONS) as engine:
        request = engine.add_request(reference.prompt, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
        run_all(engine)
    assert request.output_token_ids == reference.token_ids
