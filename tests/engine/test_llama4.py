"""What Llama 4 adds gives Transformers' tokens, and would not if any of it were wrong."""

import pytest
import torch
from tiny_models import (
    generate_all,
    generate_reference,
    greedy,
    memory_for,
    random_prompt,
    run_all,
    tiny_engine,
    tiny_model,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from longspan.models import chosen_experts, inspect
from longspan.models.last_layer import skip_unread_rows_
from longspan.models.row_positions import RowPositions

pytestmark = pytest.mark.cover

CHUNK = 22
SPREADS = {
    "packed": {"context_parallel_size": 2, "placement": "packed", "page_size": 16},
    "gather_kv": {"context_parallel_size": 2, "placement": "striped", "strategy": "gather_kv", "page_size": 4},
    "pass_q": {"context_parallel_size": 3, "placement": "striped", "strategy": "pass_q", "page_size": 4},
    "pass_kv": {"context_parallel_size": 2, "placement": "striped", "strategy": "pass_kv", "page_size": 2},
}


def options(spread, budget=33):
    page_size = SPREADS[spread]["page_size"]
    return {**SPREADS[spread], "stripe_size": 2 * page_size, "max_num_batched_tokens": budget}


def expected(model):
    return [reference.token_ids for reference in model.references]


@pytest.mark.parametrize("budget", [20, 44, 50])
@pytest.mark.parametrize("spread", SPREADS)
def test_prompts_that_end_around_a_chunks_edge(spread, budget):
    model = tiny_model("llama4")
    lengths = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1]
    references = [generate_reference(model.path, random_prompt(length, length), 30) for length in lengths]
    with tiny_engine(model, **options(spread, budget)) as engine:
        requests = [engine.add_request(reference.prompt, greedy(30)) for reference in references]
        run_all(engine)
    for request, reference in zip(requests, references, strict=True):
        assert request.output_token_ids == reference.token_ids


def test_pages_behind_a_chunk_are_freed():
    model = tiny_model("llama4")
    with tiny_engine(model, context_parallel_size=1, page_size=4, max_num_batched_tokens=20) as engine:
        groups = {group.spec.chunk: i for i, group in enumerate(engine.spec.kv_groups)}
        assert set(groups) == {None, CHUNK}
        request = engine.add_request(model.references[-1].prompt, greedy(8))
        run_all(engine)
        (allocators,) = engine.scheduler.memory.allocators
        assert allocators[groups[None]].peak_used >= 1025 // 4
        assert allocators[groups[CHUNK]].peak_used <= (CHUNK + 20) // 4 + 2
    assert request.output_token_ids == model.references[-1].token_ids[:8]


def test_a_request_that_is_longer_than_the_pool_of_chunks():
    model = tiny_model("llama4")
    memory = memory_for(model, 700)
    with tiny_engine(
        model, context_parallel_size=2, kv_cache_memory=memory, **{"page_size": 4, "stripe_size": 8}
    ) as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
        run_all(engine)
    assert [request.output_token_ids for request in requests] == expected(model)


def _chunks_that_end_late(monkeypatch):
    _change_chunks(monkeypatch, 1)


def _chunks_that_end_early(monkeypatch):
    _change_chunks(monkeypatch, -1)


def _change_chunks(monkeypatch, change):
    original = inspect.find_chunk
    monkeypatch.setattr(inspect, "find_chunk", lambda call: original(call) and original(call) + change)


def _temperature_by_row(monkeypatch):
    monkeypatch.setattr(RowPositions, "get_seq_length", lambda self, *_: 0)


def _an_expert_dropped(monkeypatch):
    compute_all = chosen_experts.compute_by_expert

    def compute(experts, rows, chosen, scores):
        return compute_all(experts, rows, chosen, scores.masked_fill(chosen == 1, 0.0))

    monkeypatch.setattr(chosen_experts, "compute_by_expert", compute)


@pytest.mark.parametrize(
    "mutation", [_chunks_that_end_late, _chunks_that_end_early, _temperature_by_row, _an_expert_dropped]
)
@pytest.mark.parametrize("spread", ["packed", "pass_q"])
def test_a_mutation_changes_tokens(mutation, spread, monkeypatch):
    model = tiny_model("llama4")
    want = expected(model)
    mutation(monkeypatch)
    assert generate_all(model, **options(spread)) != want


@pytest.mark.parametrize("spread", ["packed", "pass_q"])
def test_the_same_run_without_a_mutation_changes_nothing(spread):
    model = tiny_model("llama4")
    assert generate_all(model, **options(spread)) == expected(model)


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_chosen_experts_compute_what_all_experts_do(num_tokens):
    own = tiny_model("llama4").load()
    mixture = own.model.layers[2].feed_forward
    stock = Llama4TextMoe(own.config)
    stock.load_state_dict(mixture.state_dict())
    hidden = torch.randn(1, num_tokens, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, logits = mixture(hidden)
        wanted, wanted_logits = stock(hidden)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_unread_rows_of_the_last_layer_are_skipped():
    assert skip_unread_rows_(tiny_model("llama4").load()) == 2


def test_experts_are_counted():
    spec = inspect.inspect_model(tiny_model("llama4").load().config, None, torch.float32)
    assert spec.experts is not None
    assert (spec.experts.num_experts, spec.experts.num_chosen) == (4, 2)
    assert spec.experts.num_parameters == 3 * 4 * 3 * 64 * 96
