"""Models with recurrent layers get the tokens that Transformers gives them, wherever their states go.

Real tiny models on ranks that are threads: gated delta rule beside attention, Mamba 2 and attention in every layer,
short convolutions. States move from rank to rank inside a chunk, with a decode's next page, into the prefix cache and
out of it. Every mutation of that must change tokens.
"""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from proven_models import NUM_TOKENS, PROMPT_LENS, proven_model
from tiny_models import all_pairs, generate_reference, greedy, random_prompt, run_all
from transformers import AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.cp import handover, relay
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models import inspect, recurrent, state_proof
from longspan.models.loader import load_config
from longspan.scheduler.states import StateMemory
from longspan.sharding.capacity import pool_bytes
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

DELTA, BOTH, CONV = "qwen3_5_text", "falcon_h1", "lfm2"
PAGE = 4
LONG = PROMPT_LENS.index(330)

CASES = all_pairs(
    {
        "name": (DELTA, BOTH, CONV),
        "context_parallel_size": (2, 3, 5, 1),
        "placement": ("striped", "auto", "spill", "packed"),
        "strategy": ("pass_kv", "auto", "gather_kv", "pass_q", "tree"),
        "max_num_batched_tokens": (33, 64, 200, 7),
        "page_size": (4, 16),
        "async_scheduling": (True, False),
        "state_parts": (None, 1, 3),
    }
)


@contextmanager
def hybrid_engine(name, **options):
    """An engine whose ranks are threads; in the end nothing is held."""
    page_size = options.setdefault("page_size", PAGE)
    config = EngineConfig(
        model=proven_model(name).path,
        executor="threads",
        threads_per_rank=1,
        exchange_timeout_s=60.0,
        check_invariants=1,
        **{"dtype": "float32", "kv_cache_memory": 2**25, "stripe_size": 2 * page_size, **options},
    )
    with Engine(config) as engine:
        yield engine
        engine.scheduler.memory.check_integrity()
        assert engine.scheduler.memory.is_empty


def generate(name, prompts=None, max_tokens=NUM_TOKENS, **options):
    """Tokens for all prompts of a model, in one batch."""
    if prompts is None:
        prompts = [reference.prompt for reference in proven_model(name).references]
    with hybrid_engine(name, **options) as engine:
        requests = [engine.add_request(prompt, greedy(max_tokens)) for prompt in prompts]
        run_all(engine)
    return [request.output_token_ids for request in requests]


def expected(name):
    return [reference.token_ids for reference in proven_model(name).references]


def striped(num_ranks=3, **options):
    return {
        "context_parallel_size": num_ranks,
        "placement": "striped",
        "strategy": "pass_q",
        "max_num_batched_tokens": 50,
        **options,
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_tokens_are_those_of_transformers_in_every_spread(case):
    options = dict(case)
    name, strategy = options.pop("name"), options["strategy"]
    if name != DELTA:  # whose states alone have heads
        del options["state_parts"]
    if strategy == "tree":
        options["nodes"] = tuple(min(rank, 1) for rank in range(options["context_parallel_size"]))
    if options["placement"] == "packed" or options["context_parallel_size"] == 1:
        options["strategy"] = "auto"
        options.pop("nodes", None)
    assert generate(name, **options) == expected(name)


@pytest.mark.parametrize("name", [BOTH, DELTA])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_preempted_requests_get_their_tokens(name, num_ranks):
    model = proven_model(name)
    spec = inspect.inspect_model(load_config(model.path)[0], None, recurrent.torch.float32)
    memory = pool_bytes(spec, 360 // PAGE // num_ranks + 8, PAGE, 50)
    options = striped(num_ranks, state_parts=3 if name == DELTA else None) if num_ranks > 1 else {}
    options["kv_cache_memory"] = memory
    with hybrid_engine(name, **options) as engine:
        requests = [engine.add_request(r.prompt, greedy(NUM_TOKENS)) for r in (*model.references, *model.references)]
        run_all(engine)
        assert engine.scheduler.num_preemptions or num_ranks > 1
    assert [request.output_token_ids for request in requests] == expected(name) * 2


def test_a_cancelled_request_leaves_nothing_behind_and_the_others_get_their_tokens():
    model = proven_model(DELTA)
    with hybrid_engine(DELTA, **striped()) as engine:
        requests = [engine.add_request(reference.prompt, greedy(NUM_TOKENS)) for reference in model.references]
        for _ in range(6):
            engine.step()
        engine.scheduler.cancel(requests[LONG])
        run_all(engine)
    assert [r.output_token_ids for r in requests[:LONG]] == expected(DELTA)[:LONG]


def test_generated_tokens_stay_on_one_rank_until_it_is_full():
    with hybrid_engine(DELTA, **striped()) as engine:
        request = engine.add_request(proven_model(DELTA).references[1].prompt, greedy(NUM_TOKENS))
        while not request.num_generated:
            engine.step()
        allocation = request.allocation
        run_all(engine)
        ranks = {rank for rank, _, _ in allocation.ranks_of(request.prompt_len // PAGE * PAGE, 10**6)}
    assert len(ranks) == 1


# -- prefix cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DELTA, BOTH, CONV])
@pytest.mark.parametrize("options", [{}, striped(2), striped(3), {"context_parallel_size": 3, "placement": "packed"}])
def test_a_hit_goes_on_from_a_kept_state(name, options):
    model = proven_model(name)
    long = model.references[LONG]
    shared = long.prompt[:200]
    other = shared + random_prompt(9, 77)
    reference = generate_reference(model.path, other, NUM_TOKENS)
    options = {**options, "state_snapshot_tokens": 64}
    with hybrid_engine(name, **options) as engine:
        first = engine.add_request(long.prompt, greedy(NUM_TOKENS))
        run_all(engine)
        again = engine.add_request(long.prompt, greedy(NUM_TOKENS))
        run_all(engine)
        beside = engine.add_request(other, greedy(NUM_TOKENS))
        run_all(engine)
        chat = engine.add_request(again.token_ids[: 330 + 8], greedy(NUM_TOKENS - 8))
        run_all(engine)
    assert [first.num_cached, again.num_cached, beside.num_cached] == [0, 328, 192]
    assert chat.num_cached == 328
    assert first.output_token_ids == again.output_token_ids == long.token_ids
    assert beside.output_token_ids == reference.token_ids
    assert chat.output_token_ids == long.token_ids[8:]


def test_a_hit_on_another_rank_brings_its_state_along():
    """Two short chats at once with one system prompt: the second is packed on the rank that is idle."""
    model = proven_model(DELTA)
    long = model.references[LONG]
    with hybrid_engine(DELTA, context_parallel_size=2, placement="packed", state_snapshot_tokens=64) as engine:
        first = engine.add_request(long.prompt, greedy(NUM_TOKENS))
        run_all(engine)
        several = [engine.add_request(long.prompt, greedy(NUM_TOKENS)) for _ in range(4)]
        run_all(engine)
        assert all(stats.tokens_computed for stats in engine.rank_stats())
    assert {request.num_cached for request in several} == {328}
    assert {tuple(request.output_token_ids) for request in (first, *several)} == {tuple(long.token_ids)}


def test_states_are_evicted_and_the_least_recently_used_goes_first():
    model = proven_model(DELTA)
    spec = inspect.inspect_model(load_config(model.path)[0], None, recurrent.torch.float32)
    memory = 4 * 5 * spec.state_bytes  # five slots
    prompts = [random_prompt(60, seed) for seed in range(6)]
    with hybrid_engine(DELTA, kv_cache_memory=memory, state_snapshot_tokens=512) as engine:
        for prompt in prompts:
            engine.add_request(prompt, greedy(2))
            run_all(engine)
        hits = []
        for prompt in reversed(prompts):
            hits.append(engine.add_request(prompt, greedy(2)))
            run_all(engine)
    assert [request.num_cached for request in hits[:3]] == [56] * 3
    assert hits[-1].num_cached == 0


def test_a_hybrid_gets_no_drafts_and_says_so(capsys):
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1}
    with hybrid_engine(DELTA, speculative_config=speculation) as engine:
        assert "no drafts for a model with recurrent layers" in capsys.readouterr().err
        assert not engine.scheduler.drafting.is_on
        request = engine.add_request(proven_model(DELTA).references[1].prompt, greedy(4))
        run_all(engine)
    assert request.output_token_ids == expected(DELTA)[1][:4]


def test_without_the_prefix_cache_no_state_is_kept():
    with hybrid_engine(DELTA, enable_prefix_caching=False) as engine:
        request = engine.add_request(proven_model(DELTA).references[1].prompt, greedy(4))
        run_all(engine)
        slots = engine.scheduler.memory.allocators[0][-1]
        assert slots.num_available == slots.num_pages
        assert slots.peak_used == 1
    assert request.output_token_ids == expected(DELTA)[1][:4]


# -- mutations ---------------------------------------------------------------------------------------------------------


def forget_what_is_handed_on(monkeypatch):
    original = handover.Handover._arrive

    def arrive(self, end):
        first = len(self._messages) - len(self._arriving)
        original(self, end)
        for message in self._messages[first:end]:
            message.tensor.zero_()

    monkeypatch.setattr(handover.Handover, "_arrive", arrive)


def compute_heads_that_have_not_come(monkeypatch):
    original = handover.Handover.heads

    def heads(self, component):
        found = [message.heads for message in self._messages if message.component == component]
        for wrong, _ in zip(reversed(found), original(self, component), strict=True):
            yield wrong

    monkeypatch.setattr(handover.Handover, "heads", heads)


def hand_on_heads_before_they_are_computed(monkeypatch):
    original = handover.Handover.heads

    def heads(self, component):
        for found in original(self, component):
            self._hand_on(len(self._messages))
            yield found

    monkeypatch.setattr(handover.Handover, "heads", heads)


def hand_to_the_wrong_run(monkeypatch):
    original = relay.Relay.__init__

    def init(self, *args):
        original(self, *args)
        self._slots = self._slots.flip(0)

    monkeypatch.setattr(relay.Relay, "__init__", init)


def lose_a_row_of_the_halo(monkeypatch):
    original = recurrent.LayerCache.update_conv_state

    def update(self, inputs, *args, **kwargs):
        found = original(self, inputs, *args, **kwargs)
        self._tensors["conv", 0][..., -1] = 0
        return found

    monkeypatch.setattr(recurrent.LayerCache, "update_conv_state", update)


@pytest.mark.parametrize("name", [DELTA, BOTH, CONV])
@pytest.mark.parametrize("mutate", [forget_what_is_handed_on, hand_to_the_wrong_run, lose_a_row_of_the_halo])
def test_a_mutation_changes_tokens(name, mutate, monkeypatch):
    model = proven_model(name)
    prompts = [reference.prompt for reference in model.references[1:]]
    prompts = [prompt for prompt in prompts for _ in range(2)] if mutate is hand_to_the_wrong_run else prompts
    monkeypatch.setattr(state_proof, "MOST_ERROR", 1e9)  # it would notice
    mutate(monkeypatch)
    found = generate(name, prompts, **striped(2))
    wanted = [reference.token_ids for reference in model.references[1:] for _ in range(len(prompts) // 3)]
    assert found != wanted


@pytest.mark.parametrize("mutate", [compute_heads_that_have_not_come, hand_on_heads_before_they_are_computed])
def test_a_mutation_of_parts_changes_tokens(mutate, monkeypatch):
    references = proven_model(DELTA).references[1:]
    mutate(monkeypatch)
    found = generate(DELTA, [reference.prompt for reference in references], **striped(2, state_parts=4))
    assert found != [reference.token_ids for reference in references]


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid", "kimi_linear", DELTA])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_states_in_parts_are_whole_states(name, num_ranks):
    """The same tokens, in more messages of as many bytes; every family with a delta rule has heads."""
    references = proven_model(name).references
    sent = []
    for num_parts in (1, 4):
        with hybrid_engine(name, **striped(num_ranks, state_parts=num_parts)) as engine:
            requests = [engine.add_request(reference.prompt, greedy(NUM_TOKENS)) for reference in references]
            run_all(engine)
            assert {note.num_parts for note in engine.state_parts} == {num_parts}
            sent.append(engine.stats().bytes_per_strategy["states"])
        assert [request.output_token_ids for request in requests] == [reference.token_ids for reference in references]
        assert all(component.num_heads == 4 for component in recurrent_components(engine.spec))
    assert sent[0] == sent[1] > 0


def recurrent_components(spec):
    return [part for group in spec.state_groups for part in group.components if part.role == "recurrent"]


def test_heads_are_computed_as_they_come(monkeypatch):
    """Without states in parts, nothing of the sort is asked for; with them, the kernel asks for every part."""
    asked = []
    original = handover.Handover.heads

    def heads(self, component):
        for found in original(self, component):
            asked.append(len(found))
            yield found

    monkeypatch.setattr(handover.Handover, "heads", heads)
    reference = proven_model(DELTA).references[LONG]
    for num_parts, lengths in ((4, {1}), (3, {1, 2}), (1, {4})):
        asked.clear()
        assert generate(DELTA, [reference.prompt], **striped(2, state_parts=num_parts)) == [reference.token_ids]
        assert set(asked) == lengths


@pytest.mark.parametrize(
    ("name", "got", "legal"),
    [(BOTH, 2, "1: states of this model go whole"), (CONV, 4, "1: states"), (DELTA, 5, "4, the heads of its states")],
)
def test_rejects_more_parts_than_states_have_heads(name, got, legal):
    message = f"state_parts: got {got}, legal is at most {legal}"
    with pytest.raises(ConfigError, match=message), hybrid_engine(name, **striped(3, state_parts=got)):
        pass


def test_a_kept_state_of_the_wrong_position_changes_tokens(monkeypatch):
    original = StateMemory._keep

    def keep(self, request, allocation, start, end):
        for kept in original(self, request, allocation, start, end):
            earlier = max(start + 1, kept.position - PAGE)
            yield type(kept)(earlier, kept.place)

    long = proven_model(DELTA).references[LONG]

    def publish(self, request, hashes):
        for kept in request.allocation.kept_states:
            page = -(-kept.position // PAGE) * PAGE + PAGE
            self._allocators[kept.place.rank].publish(hashes[page // PAGE - 1], kept.place.slot)
            self._allocators[kept.place.rank].release(kept.place.slot, 1)
        request.allocation.kept_states = []

    monkeypatch.setattr(StateMemory, "_keep", keep)
    monkeypatch.setattr(StateMemory, "publish", publish)
    with hybrid_engine(DELTA, state_snapshot_tokens=512) as engine:
        engine.add_request(long.prompt, greedy(NUM_TOKENS))
        run_all(engine)
        again = engine.add_request(long.prompt, greedy(NUM_TOKENS))
        run_all(engine)
    assert again.num_cached == 328
    assert again.output_token_ids != long.token_ids


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_rejects_a_module_that_does_not_go_on_from_its_state(monkeypatch):
    monkeypatch.setattr(recurrent.LayerCache, "get_recurrent_state", lambda *_, **__: None)
    message = r"recurrent layers: Qwen3_5GatedDeltaNet in pieces of 20\+2\+14\+1 rows differs .* proven is at most"
    with pytest.raises(UnsupportedModelError, match=message):
        inspect.inspect_model(load_config(proven_model(DELTA).path)[0], None, recurrent.torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_snapshot_tokens": 10}, r"state_snapshot_tokens: got 10, legal is a multiple of page_size \(4\)"),
        ({"kv_cache_memory": 1000}, r"kv_cache_memory: got 1000 bytes per rank, legal is at least \d+ \(one state of "),
    ],
)
def test_rejects_options_that_no_state_fits(options, message):
    with pytest.raises(ConfigError, match=message), hybrid_engine(DELTA, **options):
        pass


@pytest.mark.parametrize("name", ["state_snapshot_tokens", "state_parts"])
def test_rejects_options_of_states_for_a_model_without_any(name):
    message = f"{name}: got 64 for a model without recurrent layers, legal is none"
    with pytest.raises(ConfigError, match=message), hybrid_engine("qwen3", **{name: 64}):
        pass


@functools.cache
def exact_and_eager(name, length):
    """Log-probabilities of a prompt's tokens: weights rounded to bfloat16, computed in float64 and by Transformers."""
    prompt = random_prompt(length, 5)
    found = []
    rounded = AutoModelForCausalLM.from_pretrained(proven_model(name).path, dtype=torch.bfloat16)
    for dtype in (torch.float64, torch.bfloat16):
        with torch.inference_mode():
            logits = copy.deepcopy(rounded).to(dtype).eval()(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
        logprobs = logits.double().log_softmax(-1)
        found.append(logprobs[torch.arange(length - 1), torch.tensor(prompt[1:])])
    return prompt, *found


@pytest.mark.parametrize("name", [DELTA, BOTH, CONV])
def test_bfloat16_costs_what_it_costs_on_one_device(name):
    prompt, exact, eager = exact_and_eager(name, 200)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for num_ranks in (1, 3):
        options = striped(num_ranks) if num_ranks > 1 else {"max_num_batched_tokens": 50}
        with hybrid_engine(name, dtype="bfloat16", **options) as engine:
            request = engine.add_request(prompt, params)
            run_all(engine)
        found = torch.tensor([one.logprob for one in request.prompt_logprobs], dtype=torch.float64)
        assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()
        assert (found - exact).square().mean() <= 4 * (eager - exact).square().mean()
