"""Tokens are the same with and without a draft model, whatever it guesses, for every family and every way to spread a
request; and whoever cannot have drafts goes on without."""

import pytest
from draft_models import draft_path, drafts_of
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
from drafts import check_all_drafts
from tiny_models import (
    all_pairs,
    greedy,
    memory_for,
    random_prompt,
    run_all,
    run_requests,
    tiny_engine,
    tiny_model,
    write_model,
)

from longspan.config import EngineConfig
from longspan.engine import ranks
from longspan.engine.engine import Engine
from longspan.engine.memory import share_with_draft
from longspan.errors import ConfigError, WorkerError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.scheduler.request import Request
from longspan.types import ModelSpec, SamplingParams

CASES = all_pairs({**SPREADS, "kind": ("same", "like", "other"), "max_num_batched_tokens": (64, 16, 2048)})


@pytest.fixture(autouse=True)
def all_drafts_are_checked(monkeypatch):
    check_all_drafts(monkeypatch)


def check(case):
    model, requests = tiny_model(case["family"]), asked(case["family"], case["temperature"])
    options = options_of(case)
    drafts = drafts_of(case["family"], kind := options.pop("kind"))
    if options["placement"] == "spill":  # both models have half of it, if they are alike
        options["kv_cache_memory"] = 2 * memory_for(model, 240 // options["context_parallel_size"] + 32)
    with tiny_engine(model, speculative_config=drafts, check_invariants=1, **options) as engine:
        running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        run_all(engine)
        drafting = engine.scheduler.drafting
        assert not any(
            allocator.num_used for of_rank in engine.drafts.scheduler.memory.allocators for allocator in of_rank
        )
    assert [request.output_token_ids for request in running] == [output for _, _, output in requests]
    assert drafting.num_drafted
    if kind == "same":
        assert drafting.num_accepted > 10 * drafting.num_rejected
    if kind == "other":
        assert drafting.num_rejected


@pytest.mark.cover
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tokens_are_those_without_a_draft_model(case):
    check(case)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["same", "like", "other"])
def test_tokens_are_the_same_however_good_the_drafts_are(kind, temperature):
    case = {"family": "llama", "kind": kind, "temperature": temperature, "strategy": "auto", **STRIPED}
    check({**case, "max_num_batched_tokens": 64})


def test_a_draft_model_of_another_family_with_windows():
    model, requests = tiny_model("llama"), asked("llama", 0.0)
    drafts = drafts_of("mistral-window-7", "same")
    with tiny_engine(model, speculative_config=drafts, check_invariants=1, **STRIPED) as engine:
        running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        run_all(engine)
        assert engine.scheduler.drafting.num_rejected
    assert [request.output_token_ids for request in running] == [output for _, _, output in requests]


def test_preempted_requests_and_prefix_hits_have_the_same_tokens():
    """Five requests that outgrow the memory, whose prompts begin alike; then the same again, from cached answers."""
    model = tiny_model("llama")
    prompts, alone = prompts_alike()
    options = {"kv_cache_memory": 2 * memory_for(model, 110), "check_invariants": 1, **STRIPED}
    with tiny_engine(model, speculative_config=drafts_of("llama", "like"), **options) as engine:
        requests = [engine.add_request(prompt, params_of(0.8, i)) for i, prompt in enumerate(prompts)]
        run_all(engine)
        assert [request.output_token_ids for request in requests] == alone
        assert engine.scheduler.num_preemptions
        following = [*prompts[-1], *alone[-1][:30]]
        hits = engine.drafts.scheduler.memory.num_hit_tokens
        again = engine.add_request(following, greedy(10))
        run_all(engine)
        assert engine.drafts.scheduler.memory.num_hit_tokens > hits
    (expected,) = run_requests(model, [(following, greedy(10))])
    assert again.output_token_ids == expected.output_token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"context_parallel_size": 3, "rank_weights": (2.0, 1.0, 1.0)},
        {"kv_host_memory": 2**22},
        {"max_step_ms": 5, "max_num_seqs": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_give_the_same_tokens_with_a_draft_model(options):
    found = []
    for drafts in (None, drafts_of("llama", "like")):
        with tiny_engine(
            tiny_model("llama"), speculative_config=drafts, check_invariants=1, **{**STRIPED, **options}
        ) as engine:
            requests = [engine.add_request(prompt, params) for prompt, params, _ in asked("llama", 0.0)]
            run_all(engine)
            found.append([request.output_token_ids for request in requests])
            assert drafts is None or engine.scheduler.drafting.num_accepted
    assert found[0] == found[1]


def test_a_draft_model_of_small_weights_gives_the_same_tokens():
    found, model = [], tiny_model("llama")
    for drafts in (None, drafts_of("llama", "same")):
        config = EngineConfig(
            model=model.path,
            executor="threads",
            threads_per_rank=1,
            quantization="int8",
            kv_cache_memory=2**25,
            speculative_config=drafts,
        )
        with Engine(config) as engine:
            requests = [engine.add_request(prompt, params) for prompt, params, _ in asked("llama", 0.0)]
            run_all(engine)
            found.append([request.output_token_ids for request in requests])
            assert drafts is None or engine.scheduler.drafting.num_accepted > engine.scheduler.drafting.num_rejected
    assert found[0] == found[1]


def test_fewer_ranks_go_on_with_the_draft_model(monkeypatch):
    """Two ranks are lost, and one of them cannot be started again."""
    start, model, requests = ranks.start_executor, tiny_model("llama"), asked("llama", 0.0)
    is_lost = []

    def start_executor(told, *arguments):
        if is_lost and told.config.context_parallel_size == 2:
            raise WorkerError("a rank cannot be started")
        return start(told, *arguments)

    monkeypatch.setattr(ranks, "start_executor", start_executor)
    drafts = drafts_of("llama", "same")
    with tiny_engine(model, speculative_config=drafts, max_restarts=9, check_invariants=1, **STRIPED) as engine:
        running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        while not engine.scheduler.drafting.num_accepted:
            engine.step()
        before = engine.scheduler.drafting.num_accepted
        is_lost.append(True)
        engine._lost = WorkerError("a rank was killed")
        run_all(engine)
        assert engine.config.context_parallel_size == 1
        assert engine.scheduler.drafting.num_accepted > before + 10
    assert [request.output_token_ids for request in running] == [output for _, _, output in requests]


def test_a_prompt_that_does_not_fit_the_draft_models_ranks_has_no_drafts():
    """It is striped over two ranks, and the draft model would need one rank for it."""
    model, requests = tiny_model("llama"), asked("llama", 0.0)
    options = {"kv_cache_memory": 2 * memory_for(model, 80), **STRIPED}
    with tiny_engine(model, speculative_config=drafts_of("llama", "same"), **options) as engine:
        running = []
        for prompt, params, _ in requests:
            running.append(engine.add_request(prompt, params))
            run_all(engine)
    assert [request.output_token_ids for request in running] == [output for _, _, output in requests]
    assert [bool(request.drafter.num_accepted) for request in running] == [True, False]


def test_a_request_may_be_cancelled_while_its_drafts_are_made():
    requests = asked("llama", 0.0)
    with tiny_engine(tiny_model("llama"), speculative_config=drafts_of("llama", "same"), **STRIPED) as engine:
        first, second = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        while not (first.drafter.proposer.guessing and first.drafter.proposer.guessing.in_flight):
            engine.step()
            engine.submit_plans()
        engine.abort(first)
        run_all(engine)
    assert second.output_token_ids == requests[1][2]


@pytest.mark.parametrize(
    "rule", [{"presence_penalty": 1.5}, {"repetition_penalty": 1.4}, {"logprobs": 2}, {"stop_token_ids": (10, 11, 12)}]
)
@pytest.mark.parametrize("is_constrained", [False, True])
def test_what_rows_depend_on_is_the_same_with_a_draft_model(rule, is_constrained):
    found = []
    for drafts in (None, drafts_of("llama", "like")):
        with tiny_engine(tiny_model("llama"), speculative_config=drafts, **STRIPED) as engine:
            params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=5, ignore_eos=True, **rule)
            constraint = OddAndEven() if is_constrained else None
            found.append(engine.add_request(random_prompt(45, 3), params, constraint=constraint))
            run_all(engine)
            assert drafts is None or engine.scheduler.drafting.num_drafted
    assert found[0].output_token_ids == found[1].output_token_ids
    assert found[0].finish_reason is found[1].finish_reason


# -- mutations -------------------------------------------------------------------------------------------------------


def test_keeping_the_first_wrong_draft_changes_tokens(monkeypatch):
    accept_one_too_many(monkeypatch)
    requests = asked("llama", 0.8)
    with tiny_engine(tiny_model("llama"), speculative_config=drafts_of("llama", "like"), **STRIPED) as engine:
        running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
        run_all(engine)
    assert [request.output_token_ids for request in running] != [output for _, _, output in requests]


def test_guesses_that_are_not_taken_back_make_worse_drafts_and_the_same_tokens(monkeypatch):
    """The draft model goes on behind tokens that are not there: its guesses get worse, and nothing else."""

    def run():
        requests = asked("llama", 0.0)
        with tiny_engine(tiny_model("llama"), speculative_config=drafts_of("llama", "like"), **STRIPED) as engine:
            running = [engine.add_request(prompt, params) for prompt, params, _ in requests]
            run_all(engine)
            drafting = engine.scheduler.drafting
        assert [request.output_token_ids for request in running] == [output for _, _, output in requests]
        return drafting.num_accepted / (drafting.num_accepted + drafting.num_rejected)

    rate, follow = run(), Request.follow

    def keeping(self, token_ids, pauses_at, page_size):
        guessed, start = list(self.token_ids), self.num_given or self.prompt_len
        follow(self, token_ids, pauses_at, page_size)
        end = min(len(guessed), len(self.token_ids))
        self.token_ids[start:end] = guessed[start:end]

    monkeypatch.setattr(Request, "follow", keeping)
    assert run() < rate - 0.1


# -- memory and refusals ---------------------------------------------------------------------------------------------


def test_both_models_have_pages_for_as_many_tokens():
    def spec(num_layers, width):
        groups = (KVGroup(tuple(range(num_layers)), KVSpec.uniform(1, width, width, "float32", None), 4),)
        return ModelSpec("fake", num_layers, 300, None, (2,), groups, ())

    large, small = spec(6, 16), spec(1, 8)
    (left, _), (taken, _) = share_with_draft((1300, 2600), large, small)
    assert left + taken == 1300
    assert left // large.kv_groups[0].token_bytes == taken // small.kv_groups[0].token_bytes


def config_of(tmp_path, **options):
    return EngineConfig(model=tiny_model("llama").path, executor="threads", kv_cache_memory=2**25, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"device": "cuda"}, "with device 'cuda'"), ({"tensor_parallel_size": 2}, "with tensor_parallel_size 2")],
)
def test_rejects_what_a_draft_model_cannot_do_yet(options, words):
    with pytest.raises(ConfigError, match=f"^speculative_config: got the draft model 'x' {words}, legal there is"):
        EngineConfig(
            model="m",
            speculative_config={"method": "draft_model", "model": "x", "num_speculative_tokens": 2},
            **options,
        )


def test_rejects_another_vocabulary_and_no_model(tmp_path):
    other = write_model(tmp_path / "other", "llama", vocab_size=310)
    missing = str(tmp_path / "missing")
    for model, words in (
        (other, "with a vocabulary of 310 tokens, legal is .* 300"),
        (missing, "legal is one that can"),
    ):
        drafts = {"method": "draft_model", "model": model, "num_speculative_tokens": 2}
        with pytest.raises(ConfigError, match=f"^speculative_config: got the draft model '{model}'.*{words}"):
            Engine(config_of(tmp_path, speculative_config=drafts))


def test_rejects_memory_without_a_page_for_the_draft_model():
    drafts = {"method": "draft_model", "model": draft_path("llama", "same"), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match=r"^kv_cache_memory: got .*; this is the part of the draft model"):
        Engine(
            EngineConfig(
                model=tiny_model("llama").path, executor="threads", kv_cache_memory=3, speculative_config=drafts
            )
        )
