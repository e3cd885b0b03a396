"""How many drafts a step checks, and which of them: what they bring, what they cost, and where they must end."""

import random

import pytest
from drafts import SPECULATION, check_all_drafts, scripted
from fake_ranks import EOS, VOCAB, FakeRanks, make_config, make_model, make_scheduler, tokens_alone

from longspan.config import EngineConfig
from longspan.costmodel.row_time import FIRST_SHARE, RowTime, count_drafts
from longspan.errors import ConfigError
from longspan.kv.prefix import extend_hashes
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Request
from longspan.types import SamplingParams


def make_ranks(wrong, num_ranks=2, *, has_state=False, memory_tokens=400, **options):
    config = make_config(num_ranks, speculative_config=SPECULATION, **options)
    scheduler = make_scheduler(make_model(None, 6, has_state=has_state), config, memory_tokens)
    if wrong is not None:
        scheduler.drafting.make_proposer = scripted(
            lambda request: [*request.token_ids, *tokens_alone(request)], wrong, VOCAB
        )
    return FakeRanks(scheduler, random.Random(0))


def params(max_tokens=40, **options):
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=3, **options)


@pytest.mark.parametrize(
    ("offers", "num_decodes", "row", "wait", "counts"),
    [
        ([(0.7, 9)], 1, 0.1, 0.0, [6]),
        ([(0.7, 3)], 1, 0.1, 0.0, [3]),
        ([(0.05, 4)], 1, 0.1, 0.0, [0]),
        ([(0.25, 4)], 1, 0.1, 0.2, [0]),  # together they do not pay for the wait
        ([(0.9, 4)] * 16, 16, 0.06, 0.0, [0] * 16),  # the batch is full
        ([(0.9, 4)] * 16, 16, 0.01, 0.0, [4] * 16),
        ([(0.9, 4), (0.2, 4)], 2, 0.1, 0.2, [4, 0]),
        ([], 3, 0.1, 0.2, []),
    ],
)
def test_drafts_are_checked_where_they_pay(offers, num_decodes, row, wait, counts):
    assert count_drafts(offers, num_decodes, row, wait) == counts


def test_the_time_of_a_row_is_learnt_from_steps():
    rows = RowTime()
    assert rows.share(1) == FIRST_SHARE
    for _ in range(50):
        rows.learn(1, 0.010)
    assert rows.share(1) == pytest.approx(FIRST_SHARE, rel=0.01), "steps of one row say nothing of two"
    for _ in range(50):
        rows.learn(1, 0.010)
        rows.learn(5, 0.012)
    assert rows.share(1) == pytest.approx(0.05, rel=0.1)
    for _ in range(100):
        rows.learn(16, 0.016)
        rows.learn(20, 0.020)
    assert 16 * rows.share(16) == pytest.approx(1.0, rel=0.15), "a full batch"


def test_right_drafts_save_steps_and_wrong_ones_stop():
    num_plans = {}
    for wrong in (0.0, 1.0):
        ranks = make_ranks(wrong)
        request = ranks.scheduler.add_request([5] * 9, params())
        ranks.run_to_the_end()
        assert request.output_token_ids == tokens_alone(request)
        num_plans[wrong], drafting = len(ranks.plans), ranks.scheduler.drafting
    assert num_plans[0.0] <= 18
    assert 40 <= num_plans[1.0] <= 42
    assert 0 < drafting.num_rejected < 60, "a request whose drafts are wrong gets none"


def test_a_model_with_states_gets_no_drafts():
    ranks = make_ranks(0.0, has_state=True)
    request = ranks.scheduler.add_request([5] * 9, params())
    ranks.run_to_the_end()
    assert not any(plan.has_drafts for plan in ranks.plans)
    assert request.output_token_ids == tokens_alone(request)


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_drafts_take_what_others_leave_of_the_budget(budget, monkeypatch):
    """Requests that decode come before drafts of any of them; `FakeRanks` checks the budget."""
    check_all_drafts(monkeypatch)
    ranks = make_ranks(0.0, 1, max_num_batched_tokens=budget)
    requests = [ranks.scheduler.add_request([i], params(20 + 9 * i)) for i in range(3)]
    while not all(request.num_generated for request in requests):
        ranks.step()
    first = len(ranks.plans)
    ranks.run_to_the_end()
    plan = ranks.plans[first]
    assert len({run.request_id for run in plan.query_runs}) == min(budget, 3)
    assert any(plan.has_drafts for plan in ranks.plans) == (budget > 1)
    assert all(request.output_token_ids == tokens_alone(request) for request in requests)


def test_drafts_end_before_an_end_token_and_before_max_tokens(monkeypatch):
    check_all_drafts(monkeypatch)
    ranks = make_ranks(0.0)
    for max_tokens in (1, 2, 3, 5):
        request = ranks.scheduler.add_request([5] * 9, params(max_tokens))
        ranks.run_to_the_end()
        assert request.num_generated == max_tokens
    for seed in range(12):
        stops = SamplingParams(max_tokens=60, seed=seed)
        request = ranks.scheduler.add_request([7] * 5, stops)
        ranks.run_to_the_end()
        assert request.output_token_ids == tokens_alone(request)
    checked = [
        run.tokens.token_ids for plan in ranks.plans for run in plan.query_runs if plan.has_drafts and run.position > 5
    ]
    assert checked
    assert not any(EOS in token_ids for token_ids in checked)


def test_a_step_that_may_have_drafts_is_not_run_ahead_of():
    ranks = make_ranks(0.0, 1, async_scheduling=True)
    request = ranks.scheduler.add_request([5] * 9, params())
    while request.num_generated < 3:
        ranks.step()
    ranks.submit_all()
    assert len(ranks.in_flight) == 1
    assert request.drafts
    ranks.run_to_the_end()
    ranks = make_ranks(1.0, 1, async_scheduling=True)
    request = ranks.scheduler.add_request([5] * 9, params())
    while request.num_generated < 20:
        ranks.step()
    ranks.submit_all()
    assert len(ranks.in_flight) == 2, "it has learnt that its drafts are wrong"
    ranks.run_to_the_end()


def test_publishing_pages_of_wrong_drafts_is_noticed(monkeypatch):
    check_all_drafts(monkeypatch)
    planned: dict[int, list[int]] = {}
    take, publish = Request.take_sampled, KVMemory.publish

    def take_sampled(self, sampled, failed):
        planned[self.request_id] = [*self.token_ids, *[draft.token_id for draft in self.drafts]]
        return take(self, sampled, failed)

    def mutated(self, request):
        publish(self, request)
        allocation, size = request.allocation, self.config.page_size
        hashes: list[bytes] = []
        extend_hashes(hashes, planned.get(request.request_id, []), size)
        for page_idx in range(request.num_computed // size, len(hashes)):
            for group_idx, table in enumerate(allocation.tables):
                rank, slot = table.page(page_idx)
                self.allocators[rank][group_idx].publish(hashes[page_idx], slot)

    def run():
        ranks = make_ranks(0.3)
        ranks.scheduler.add_request([5] * 9, params())
        while ranks.scheduler.has_requests:
            ranks.step()
            ranks.check_cached()

    run()
    monkeypatch.setattr(Request, "take_sampled", take_sampled)
    monkeypatch.setattr(KVMemory, "publish", mutated)
    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"method": "mtp", "num_speculative_tokens": 2}, "method 'mtp'"),
        ({"method": ["ngram"], "num_speculative_tokens": 2}, r"method \['ngram'\]"),
        ({"method": "draft_model", "num_speculative_tokens": 2}, "no model"),
        ({"method": "draft_model", "model": "", "num_speculative_tokens": 2}, "model ''"),
        ({"method": "draft_model", "model": 4, "num_speculative_tokens": 2}, "model 4"),
        ({"method": "draft_model", "model": "x"}, "no num_speculative_tokens"),
        ({"method": "draft_model", "model": "x", "num_speculative_tokens": 0}, "num_speculative_tokens 0"),
        ({"method": "draft_model", "model": "x", "num_speculative_tokens": 500}, "num_speculative_tokens 500"),
        ({"method": "draft_model", "model": "x", "num_speculative_tokens": 2, "quantization": "int8"}, "the key 'quan"),
        ({"method": "draft_model", "model": "x", "prompt_lookup_max": 2}, "the key 'prompt_lookup_max'"),
        ({"method": "ngram", "model": "x", "num_speculative_tokens": 2}, "the key 'model'"),
        ({"num_speculative_tokens": 2}, "no method"),
        ({"method": "ngram"}, "no num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens 0"),
        ({"method": "ngram", "num_speculative_tokens": 300}, "num_speculative_tokens 300"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens True"),
        ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 0}, "prompt_lookup_max 0"),
        (
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "prompt_lookup_min 3",
        ),
        ({"method": "ngram", "num_speculative_tokens": 2, "lookup": 3}, "the key 'lookup'"),
        ([4], r"\[4\]"),
        ("{", "'{'"),
        ("[]", r"'\[\]'"),
    ],
)
def test_rejects_illegal_values(value, words):
    with pytest.raises(ConfigError, match=f"^speculative_config: got {words}.*, legal is "):
        EngineConfig(model="m", speculative_config=value)


def test_n_grams_have_vllms_defaults():
    def lengths(**keys):
        value = {"method": "ngram", "num_speculative_tokens": 4, **keys}
        found = EngineConfig(model="m", speculative_config=value).speculation
        return found.longest, found.shortest

    assert lengths() == (5, 5)
    assert lengths(prompt_lookup_max=4) == (4, 4)
    assert lengths(prompt_lookup_min=2) == (2, 2)
    assert lengths(prompt_lookup_max=4, prompt_lookup_min=2) == (4, 2)
    text = '{"method": "ngram", "num_speculative_tokens": 4}'
    assert EngineConfig(model="m", speculative_config=text).speculation.num_drafts == 4
