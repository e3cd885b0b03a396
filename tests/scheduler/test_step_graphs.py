"""Which steps are captured and replayed: one decision for all ranks, whatever the traffic; no GPU is needed."""

import random
import re
from collections import Counter

import pytest
from fake_ranks import VOCAB, FakeRanks, assert_all_free, make_config, make_model, pools_of, tokens_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.plan import fixed_shape
from longspan.plan.types import Plan
from longspan.scheduler import step_graphs
from longspan.scheduler.scheduler import Scheduler
from longspan.types import SamplingParams

TEXTS = tuple([[random.Random(f"{i} {j}").randrange(VOCAB) for j in range(100)] for i in range(2)])


def ranks_of(num_ranks: int, pages: int = 60, seed: int = 0, **options) -> FakeRanks:
    config = make_config(num_ranks, device="cuda", executor="processes", async_scheduling=True, **options)
    return FakeRanks(Scheduler(make_model(None, 6), config, pools_of(config, (pages, pages))), random.Random(seed))


def say(ranks: FakeRanks, prompt: list[int], num_tokens: int, seed: int = 0):
    return ranks.scheduler.add_request(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed))


def how(plan: Plan) -> str | None:
    return None if plan.graph is None else plan.graph.run


def serve_traffic(num_ranks, placement, pages, requests, seed) -> FakeRanks:
    """Prefixes are shared, pages evicted, requests preempted and shapes forgotten; `FakeRanks` checks every plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_graphs, "MAX_SHAPES", 3)
        ranks = ranks_of(num_ranks, pages, seed, placement=placement, strategy="pass_q")
        running = []
        for text, length, num_tokens, pause in requests:
            running.append(say(ranks, TEXTS[text][:length], num_tokens, seed=len(running)))
            for _ in range(pause):
                if ranks.scheduler.has_requests:
                    ranks.step()
        ranks.run_to_the_end()
    for request in running:
        assert request.output_token_ids == tokens_alone(request)
    assert_all_free(ranks.scheduler)
    return ranks


@pytest.mark.cover
@settings(max_examples=25, deadline=None)
@given(
    num_ranks=st.sampled_from([8, 3, 1]),
    placement=st.sampled_from(["auto", "striped", "packed", "spill"]),
    pages=st.sampled_from([30, 200]),
    requests=st.lists(
        st.tuples(
            st.integers(0, 1), st.sampled_from([1, 5, 16, 33, 64, 90]), st.sampled_from([2, 9, 30]), st.integers(0, 9)
        ),
        min_size=6,
        max_size=14,
    ),
    seed=st.integers(0, 99),
)
def test_ranks_replay_one_capture_whatever_the_traffic(num_ranks, placement, pages, requests, seed):
    serve_traffic(num_ranks, placement, pages, requests, seed)


def test_traffic_reaches_every_way_to_run_a_step():
    ranks = serve_traffic(3, "striped", 30, [(i % 2, 16 * (1 + i % 5), 30, 3) for i in range(10)], 0)
    assert set(map(how, ranks.plans)) == {"launch", "capture", "replay", None}


def test_a_shape_is_launched_then_captured_and_replayed_when_all_ranks_have_it():
    ranks = ranks_of(2, placement="striped", strategy="pass_q")
    say(ranks, [5] * 40, 30)
    ranks.run_to_the_end()
    by_slot: dict[int, str] = {}
    for plan in ranks.plans:
        if plan.graph is not None:
            by_slot[plan.graph.slot] = by_slot.get(plan.graph.slot, "") + plan.graph.run[0]
    assert all(re.fullmatch("l(c(l?r*))?", runs) for runs in by_slot.values()), by_slot
    assert any("clr" in runs for runs in by_slot.values()), "a step runs ahead of the answers to a capture"


def test_a_failed_capture_ends_captures_but_not_requests():
    ranks = ranks_of(3, placement="striped", strategy="pass_q")
    ranks.cannot_capture = {2}
    first, second = say(ranks, [5] * 40, 30), say(ranks, [6] * 3, 25)
    ranks.run_to_the_end()
    assert Counter(map(how, ranks.plans))["capture"] == 1
    assert "replay" not in map(how, ranks.plans)
    assert [first.num_generated, second.num_generated] == [30, 25]


def test_ranks_that_replace_lost_ones_capture_again():
    ranks = ranks_of(2, placement="striped", strategy="pass_q")
    say(ranks, [5] * 40, 40)
    while "replay" not in map(how, ranks.plans):
        ranks.step()
    ranks.crash()
    num_before = len(ranks.plans)
    ranks.run_to_the_end()
    later = [how(plan) for plan in ranks.plans[num_before:] if plan.graph is not None]
    assert later[:2] == ["launch", "capture"]
    assert "replay" in later


def test_requests_that_share_too_many_pages_run_in_any_shape(monkeypatch):
    monkeypatch.setattr(step_graphs, "MOST_SHARED", 1)
    ranks = ranks_of(1, pages=30)
    prompt = TEXTS[0][:80]
    say(ranks, prompt, 2)
    ranks.run_to_the_end()
    both = [say(ranks, prompt, 4), say(ranks, prompt, 12)]
    ranks.run_to_the_end()
    assert all(request.num_cached for request in both)
    shared = [plan for plan in ranks.plans if len(plan.query_runs) == 2 and fixed_shape.fixed_shape(plan) is not None]
    assert shared
    assert {how(plan) for plan in shared} == {None}
    assert how(ranks.plans[-2]) is not None, "alone there is room"


@pytest.mark.parametrize(
    ("options", "is_fixed", "is_captured"),
    [
        ({"device": "cuda"}, True, True),
        ({"device": "cuda", "cuda_graphs": "never"}, False, True),
        ({"device": "cuda", "attention_backend": "torch"}, False, True),
        ({"device": "cuda", "executor": "threads"}, True, False),
        ({"device": "cpu"}, False, False),
        ({"device": "cpu", "attention_backend": "triton"}, True, False),
    ],
)
def test_which_engines_have_fixed_steps(options, is_fixed, is_captured):
    config, model = make_config(2, **options), make_model(None)
    assert fixed_shape.has_fixed_steps(config, model) == is_fixed
    assert fixed_shape.is_captured(config) == is_captured


def test_models_whose_rows_differ_have_no_fixed_steps():
    config = make_config(2, device="cuda")
    assert not fixed_shape.has_fixed_steps(config, make_model(None, has_state=True))


def test_blocks_of_gpus_are_longer():
    """A chunk of 6,000 tokens is one run of queries on a GPU, and three on a CPU."""
    for device, lengths in (("cuda", [6000]), ("cpu", [2048, 2048, 1904])):
        config = make_config(1, device=device, max_num_batched_tokens=6000, page_size=16, stripe_size=16)
        scheduler = Scheduler(make_model(None), config, [(400,)])
        scheduler.add_request([5] * 6000, SamplingParams(max_tokens=1))
        assert [run.num_tokens for run in scheduler.schedule().query_runs] == lengths
