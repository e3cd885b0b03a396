"""RoPE of every proven type gives Transformers' tokens, also where its frequencies depend on a request's length.

Transformers chooses frequencies by the length of a forward pass, and keeps them in the module: references are made by a
fresh model for every prompt.
"""

import functools

import pytest
import torch
import transformers
from drafts import SPECULATION, check_all_drafts, scripted
from msgspec.structs import replace
from proven_models import PROVEN_MODELS
from tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    TinyModel,
    greedy,
    model_root,
    random_prompt,
    run_all,
    tiny_engine,
    write_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models.families import version_of
from longspan.models.inspect import inspect_model
from longspan.models.rope import PROVEN_ROPE_TYPES
from longspan.models.row_rope import _ByRow
from longspan.scheduler import plan_writer, tiers
from longspan.scheduler.request import Request
from longspan.types import RopeLengths, SamplingParams

pytestmark = pytest.mark.cover

ORIGINAL = 64
NUM_TOKENS = 40
PROMPT_LENS = (1, 40, 63, 64, 65, 150)
"""With 40 tokens to generate: below the original length, across it, and behind it."""


def longrope(width):
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": ORIGINAL,
        "factor": 8.0,
        "short_factor": [1.0 + 0.05 * i for i in range(width)],
        "long_factor": [1.0 + 0.7 * i for i in range(width)],
    }


MODELS = {
    "phi3-longrope": (
        "phi3",
        {
            "num_attention_heads": 4,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": {**longrope(8), "factor": None},
            "max_position_embeddings": 8 * ORIGINAL,
        },
    ),
    "llama-longrope": ("llama", {"rope_parameters": longrope(8), "max_position_embeddings": 8 * ORIGINAL}),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
            "max_position_embeddings": ORIGINAL,
        },
    ),
}

SPREADS = {
    "one": {"context_parallel_size": 1, "page_size": 16},
    "packed": {"context_parallel_size": 2, "placement": "packed", "page_size": 4},
    "pass_q": {"context_parallel_size": 2, "placement": "striped", "strategy": "pass_q", "page_size": 4},
    "pass_kv": {"context_parallel_size": 3, "placement": "striped", "strategy": "pass_kv", "page_size": 4},
}


def options(spread, budget=33):
    page_size = SPREADS[spread]["page_size"]
    return {**SPREADS[spread], "stripe_size": 2 * page_size, "max_num_batched_tokens": budget}


@functools.cache
def rope_model(name):
    model_type, fields = MODELS[name]
    path = write_model(model_root() / f"rope-{name}", model_type, **fields)
    return TinyModel(name, path, [])


@functools.cache
@torch.inference_mode()
def reference(name, prompt, num_tokens=NUM_TOKENS):
    model = AutoModelForCausalLM.from_pretrained(rope_model(name).path, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    # Older ones drop Phi-3's cache where it crosses the original length, and then go on from the last token alone.
    is_cached = not name.startswith("phi3") or version_of(transformers.__version__) >= (5, 24)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        use_cache=is_cached,
    )
    return output[0, len(prompt) :].tolist()


def prompt_of(length):
    return tuple(random_prompt(length, length))


def serve(engine, *prompts, num_tokens=NUM_TOKENS):
    requests = [engine.add_request(prompt, greedy(num_tokens)) for prompt in prompts]
    run_all(engine)
    return requests


def check(name, spread, budget=33):
    prompts = [prompt_of(length) for length in PROMPT_LENS]
    with tiny_engine(rope_model(name), **options(spread, budget)) as engine:
        requests = serve(engine, *prompts)
    return [r.output_token_ids for r in requests] == [reference(name, prompt) for prompt in prompts], requests


@pytest.mark.cover
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spread", SPREADS)
def test_requests_of_all_lengths_share_steps(name, spread):
    is_equal, requests = check(name, spread)
    assert is_equal
    assert len({token for request in requests for token in request.output_token_ids}) > 40
    crossing = [r.prompt_len <= ORIGINAL < r.prompt_len + NUM_TOKENS - 1 for r in requests]
    assert crossing == [False, True, True, True, False, False]
    if name.startswith("phi3"):
        assert [r.num_preemptions for r in requests] == [int(crosses) for crosses in crossing]


@pytest.mark.cover
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_lone_request_that_crosses_the_original_length(name, async_scheduling):
    prompt = prompt_of(50)
    with tiny_engine(rope_model(name), **options("packed"), async_scheduling=async_scheduling) as engine:
        (request,) = serve(engine, prompt)
    assert request.output_token_ids == reference(name, prompt)


@pytest.mark.cover
@pytest.mark.parametrize("name", MODELS)
def test_keys_of_other_frequencies_are_not_taken_from_the_cache(name):
    long = prompt_of(150)
    with tiny_engine(rope_model(name), **options("one")) as engine:
        for prompt in (long, long[:40], long[:64], long, long[:120], long[:40], long[:64]):
            (request,) = serve(engine, prompt)
            assert request.output_token_ids == reference(name, prompt)
        assert engine.scheduler.memory.num_hit_tokens > 0


@pytest.mark.cover
@pytest.mark.parametrize("name", MODELS)
def test_a_preempted_request_gets_the_same_tokens(name):
    prompts = [prompt_of(length) for length in PROMPT_LENS] * 2
    with tiny_engine(rope_model(name), **options("one"), kv_cache_memory=2**19) as engine:
        requests = serve(engine, *prompts)
        assert engine.scheduler.num_preemptions > 6
    assert [r.output_token_ids for r in requests] == [reference(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("spread", "wrong"), [("packed", 0.0), ("pass_q", 0.3), ("pass_kv", 0.0)])
def test_drafts_that_cross_the_original_length(name, spread, wrong, monkeypatch):
    check_all_drafts(monkeypatch)
    known = {prompt: [*prompt, *reference(name, prompt)] for prompt in map(prompt_of, PROMPT_LENS)}
    with tiny_engine(rope_model(name), **options(spread), speculative_config=SPECULATION) as engine:
        engine.scheduler.drafting.make_proposer = scripted(
            lambda request: known[tuple(request.token_ids[: request.prompt_len])], wrong, VOCAB_SIZE
        )
        requests = serve(engine, *known)
        assert engine.scheduler.drafting.num_accepted
        assert bool(engine.scheduler.drafting.num_rejected) == (wrong > 0)
    assert [r.output_token_ids for r in requests] == [reference(name, prompt) for prompt in known]


@pytest.mark.parametrize("name", MODELS)
def test_pages_of_other_frequencies_are_not_taken_from_disk(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tiers, "FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30})
    monkeypatch.setattr(tiers, "MEMORY", 1.0)
    long = prompt_of(150)
    load_s = []
    for num_ranks in (2, 3, 1):
        spread = {"context_parallel_size": num_ranks, "page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 33}
        with tiny_engine(rope_model(name), **spread, kv_disk=str(tmp_path)) as engine:
            for prompt in (long[:40], long, long[:64], long[:120]):
                (request,) = serve(engine, prompt)
                assert request.output_token_ids == reference(name, prompt)
            engine.tiers.flush(engine.scheduler, engine.executor)
            load_s.append(engine.scheduler.memory.tiers.counts["disk"].load_s)
    assert load_s[0] == 0 < min(load_s[1:])


@pytest.mark.parametrize("name", ["llama-longrope", "llama-dynamic"])
def test_ranks_of_several_processes_cross_the_original_length(name):
    prompts = [prompt_of(length) for length in PROMPT_LENS]
    with tiny_engine(rope_model(name), **options("pass_q"), tensor_parallel_size=2) as engine:
        requests = serve(engine, *prompts)
    assert [r.output_token_ids for r in requests] == [reference(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", ["llama-longrope", "llama-dynamic"])
def test_adapters_on_both_sides_of_the_original_length(name, tmp_path):
    lora_adapters = pytest.importorskip("lora_adapters")  # needs peft
    path = rope_model(name).path
    adapter = lora_adapters.write_adapter(tmp_path, path, target_modules=["q_proj", "v_proj"])
    for length in (50, 97):
        lora_adapters.check_adapter_beside_none(path, adapter, prompt_of(length), **options("pass_q"))


@pytest.mark.cover
def test_prompt_log_probabilities_outlive_the_crossing():
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    prompt = prompt_of(50)
    with tiny_engine(rope_model("phi3-longrope"), **options("pass_q")) as engine:
        request = engine.add_request(prompt, params)
        run_all(engine)
    assert (len(request.logprobs), len(request.prompt_logprobs)) == (NUM_TOKENS, 49)
    assert request.output_token_ids == reference("phi3-longrope", prompt)


# -- mutations -------------------------------------------------------------------------------------------------------


def _prompts_count_no_more_than_positions(monkeypatch):
    original = plan_writer._request_step
    monkeypatch.setattr(
        plan_writer, "_request_step", lambda *arguments, **flags: replace(original(*arguments, **flags), rope_len=0)
    )


def _by_the_step(monkeypatch):
    def forward(self, x, position_ids):
        lengths = self._current.lengths
        return self._table(max(lengths or [ORIGINAL]), x.device)(x, position_ids)

    monkeypatch.setattr(_ByRow, "__call__", forward)


def _no_computing_again(monkeypatch):
    monkeypatch.setattr(Request, "crosses", lambda *_: False)


def _one_token_late(monkeypatch):
    original = Request.crosses
    monkeypatch.setattr(Request, "crosses", lambda self, num_tokens: original(self, num_tokens - 1))


def _hashes_without_a_root(monkeypatch):
    monkeypatch.setattr(RopeLengths, "hash_root", lambda *_: b"")


@pytest.mark.cover
@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        *((name, mutation) for name in MODELS for mutation in (_prompts_count_no_more_than_positions, _by_the_step)),
        *(("phi3-longrope", mutation) for mutation in (_no_computing_again, _one_token_late, _hashes_without_a_root)),
    ],
)
def test_a_mutation_changes_tokens(name, mutation, monkeypatch):
    mutation(monkeypatch)
    is_equal, _ = check(name, "packed")
    assert not is_equal


@pytest.mark.cover
@pytest.mark.parametrize("name", MODELS)
def test_without_a_root_in_hashes_tokens_change(name, monkeypatch):
    long = prompt_of(150)
    _hashes_without_a_root(monkeypatch)
    with tiny_engine(rope_model(name), **options("one")) as engine:
        serve(engine, long)
        (request,) = serve(engine, long[:40])
    assert request.output_token_ids != reference(name, long[:40])


# -- configs ---------------------------------------------------------------------------------------------------------


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def config(model_type="llama", **fields):
    common = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(
        model_type, **common, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, **fields
    )


def rope(rope_type, **fields):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        (rope("default"), 256),
        (rope("linear", factor=4.0), 1024),
        (rope("dynamic", factor=2.0), 512),
        (rope("yarn", factor=4.0), 1024),
        (rope("yarn", factor=4.0, original_max_position_embeddings=256), 1024),
        (rope("yarn", factor=4.0, original_max_position_embeddings=64), 256),
        (rope("yarn", factor=4.0, original_max_position_embeddings=200), 800),  # Qwen3: 40960 of 4 x 32768
        (rope("yarn", factor=None, original_max_position_embeddings=64), 256),
        (rope("longrope", factor=4.0, original_max_position_embeddings=64, **FACTORS), 256),
        (
            rope("llama3", factor=4.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0),
            256,
        ),
    ],
)
def test_the_longest_request_is_what_stretched_positions_admit(fields, longest):
    assert inspect_model(config(**fields), None, torch.float32).max_position == longest


def test_lengths_that_count():
    each, all_alike = RopeLengths(64, True, False), RopeLengths(64, False, True)
    assert [each.counted(n) for n in (1, 64, 65, 90)] == [64, 64, 65, 90]
    assert [all_alike.counted(n) for n in (1, 64, 65, 90)] == [64, 64, 65, 65]
    assert each.hash_root(64) == all_alike.hash_root(1) == b""
    assert len({each.hash_root(n) for n in (64, 65, 66)}) == 3
    assert len({all_alike.hash_root(n) for n in (64, 65, 66)}) == 2


def test_rejects_scaling_that_transformers_does_not_apply():
    fields = rope("yarn", factor=4.0, original_max_position_embeddings=64)
    with pytest.raises(
        UnsupportedModelError, match="rope_type: got 'yarn', which Transformers does not apply to olmo3"
    ):
        inspect_model(config("olmo3", **fields), None, torch.float32)


def test_rejects_frequencies_by_length_in_some_layers_alone():
    of_layers = {"sliding_attention": rope("default"), "full_attention": rope("dynamic", factor=2.0)}
    layers = {kind: fields["rope_parameters"] for kind, fields in of_layers.items()}
    with pytest.raises(UnsupportedModelError, match="rope_type: got 'dynamic'"):
        inspect_model(config("gemma3_text", rope_parameters=layers), None, torch.float32)


def test_rejects_a_family_that_does_more_with_the_length():
    fields = rope("longrope", original_max_position_embeddings=64, short_mscale=1.0, long_mscale=1.3)
    fields["rope_parameters"] |= FACTORS
    with pytest.raises(
        UnsupportedModelError, match="rope_type: got 'longrope', which phimoe applies in a way of its own"
    ):
        inspect_model(config("phimoe", num_local_experts=2, **fields), None, torch.float32)


def test_every_proven_rope_type_has_a_model():
    proven = {"default"}
    for table in (FAMILIES, MODELS, PROVEN_MODELS):
        for _, fields in table.values():
            proven.add(fields.get("rope_parameters", {}).get("rope_type", "default"))
    assert proven | {"proportional"} == set(PROVEN_ROPE_TYPES)  # gemma4_text has that by default


def test_rejects_a_request_beyond_the_stretched_length():
    with (
        tiny_engine(rope_model("llama-dynamic"), context_parallel_size=1) as engine,
        pytest.raises(ConfigError, match="legal is at most 512"),
    ):
        engine.add_request(random_prompt(500, 1), greedy(20))
