"""Requests of two adapters and of none, in one batch, get the tokens of peft, however they are spread over ranks; and
broken ways to find an adapter's rows or pages change them."""

import shutil

import pytest
import torch
from draft_models import drafts_of
from drafts import SPECULATION, check_all_drafts, scripted
from lora_adapters import (
    adapter_engine,
    adapter_references,
    both,
    check_adapter_beside_none,
    generate_with,
    merged_model,
    tiny_adapter,
    write_adapter,
)
from proven_models import proven_model
from tiny_models import FAMILIES, VOCAB_SIZE, all_pairs, greedy, memory_for, random_prompt, run_all, tiny_model
from transformers import AutoModelForCausalLM

from longspan.errors import ConfigError
from longspan.models.packed_linear import linear_names, rounded
from longspan.native.packed import unpack
from longspan.scheduler import intake, request
from longspan.worker import runner

NUM_TOKENS = 24
LENGTHS = (31, 97)
MODEL = tiny_model("llama")
STRIPED = {
    "context_parallel_size": 2,
    "placement": "striped",
    "page_size": 4,
    "stripe_size": 8,
    "max_num_batched_tokens": 64,
    "check_invariants": 1,
}
CASES = all_pairs(
    {
        "family": ("llama", "qwen2", "gemma2", "qwen3_moe", "gpt_oss"),
        "strategy": ("auto", "pass_q", "gather_kv", "pass_kv", "tree"),
        "placement": ("striped", "packed", "spill", "auto"),
        "context_parallel_size": (2, 1, 3),
        "page_size": (4, 16, 1),
        "async_scheduling": (True, False),
        "max_num_batched_tokens": (64, 7, 2048),
    }
)


def name_of(case):
    return "-".join(str(value) for value in case.values())


def add_all(engine, family, lengths=LENGTHS, num_tokens=NUM_TOKENS):
    """Queue each prompt with `a`, with `b` and with neither; return requests and what peft continues them with."""
    found = []
    for length in lengths:
        for name, reference in adapter_references(family, length, NUM_TOKENS).items():
            adapter = None if name is None else engine.adapters.find(name)
            request = engine.add_request(reference.prompt, greedy(num_tokens), adapter=adapter)
            found.append((request, reference.token_ids[:num_tokens]))
    return found


def run(family, **options):
    with adapter_engine(tiny_model(family).path, both(family), **options) as engine:
        running = add_all(engine, family)
        run_all(engine)
    return [request.output_token_ids for request, _ in running], [wanted for _, wanted in running]


@pytest.mark.cover
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tokens_are_those_of_peft(case):
    options = dict(case)
    family, size = options.pop("family"), options["context_parallel_size"]
    if options["strategy"] == "tree":
        options["nodes"] = tuple(rank * 2 // size for rank in range(size))
    if options["placement"] == "spill":
        options["kv_cache_memory"] = memory_for(tiny_model(family), 600 // size + 32)
    found, wanted = run(family, **options, stripe_size=2 * options["page_size"])
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_peft_in_every_family(family):
    found, wanted = run(family, **{**STRIPED, "context_parallel_size": 3})
    assert found == wanted


def test_drafts_change_no_token(monkeypatch):
    check_all_drafts(monkeypatch)
    with adapter_engine(MODEL.path, both("llama"), **STRIPED, speculative_config=SPECULATION) as engine:
        truths = {
            (tuple(reference.prompt), name): reference.token_ids
            for length in LENGTHS
            for name, reference in adapter_references("llama", length, NUM_TOKENS).items()
        }
        engine.scheduler.drafting.make_proposer = scripted(
            lambda one: [*one.token_ids, *truths[tuple(one.token_ids), one.adapter and one.adapter.name]],
            0.3,
            VOCAB_SIZE,
        )
        running = add_all(engine, "llama")
        run_all(engine)
        assert engine.scheduler.drafting.num_accepted
        assert engine.scheduler.drafting.num_rejected
    assert [one.output_token_ids for one, _ in running] == [wanted for _, wanted in running]


def test_a_draft_model_without_the_adapters_changes_no_token(monkeypatch):
    check_all_drafts(monkeypatch)
    drafts = drafts_of("llama", "same")
    with adapter_engine(MODEL.path, both("llama"), **STRIPED, speculative_config=drafts) as engine:
        running = add_all(engine, "llama")
        run_all(engine)
        assert engine.scheduler.drafting.num_accepted
        assert engine.scheduler.drafting.num_rejected
    assert [one.output_token_ids for one, _ in running] == [wanted for _, wanted in running]


# -- pages and memory --------------------------------------------------------------------------------------------------


def one_by_one(engine, names, length=97):
    """Run a prompt with one adapter after the other; return requests and what peft continues them with."""
    found = []
    for name in names:
        reference = adapter_references("llama", length, NUM_TOKENS)[name]
        adapter = None if name is None else engine.adapters.find(name)
        found.append((engine.add_request(reference.prompt, greedy(NUM_TOKENS), adapter=adapter), reference.token_ids))
        run_all(engine)
    return found


ORDER = (None, "a", "b", "a", None, "b")
IS_CACHED = [False, False, False, True, True, True]


@pytest.mark.cover
@pytest.mark.parametrize("num_ranks", [2, 1, 3])
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("qwen3_5_text", ["q_proj", "v_proj"]),
        ("lfm2", ["q_proj", "v_proj"]),
        ("falcon_h1", ["q_proj", "v_proj"]),
        ("youtu", ["o_proj", "down_proj"]),
    ],
)
def test_adapters_of_hybrids_and_latents_give_the_tokens_of_peft(name, modules, num_ranks, tmp_path):
    path = proven_model(name).path
    adapter = write_adapter(tmp_path, path, target_modules=modules)
    spread = {**STRIPED, "context_parallel_size": num_ranks}
    for length in (50, 97):
        check_adapter_beside_none(path, adapter, random_prompt(length, length), **spread)


def test_pages_are_shared_by_requests_of_one_adapter_alone():
    with adapter_engine(MODEL.path, both("llama"), **STRIPED) as engine:
        found = one_by_one(engine, ORDER)
    assert [one.output_token_ids for one, _ in found] == [wanted for _, wanted in found]
    assert [one.num_cached > 0 for one, _ in found] == IS_CACHED


def test_one_adapter_of_two_names_shares_pages():
    lora = {"a": tiny_adapter("llama", "a"), "same": tiny_adapter("llama", "a")}
    reference = adapter_references("llama", 97, NUM_TOKENS)["a"]
    with adapter_engine(MODEL.path, lora) as engine:
        for name, is_cached in (("a", False), ("same", True)):
            one = engine.add_request(reference.prompt, greedy(NUM_TOKENS), adapter=engine.adapters.find(name))
            run_all(engine)
            assert (one.output_token_ids, one.num_cached > 0) == (reference.token_ids, is_cached)


def test_pages_on_disk_are_those_of_their_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.scheduler.tiers.FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30})
    monkeypatch.setattr("longspan.scheduler.tiers.MEMORY", 1.0)
    options = {**STRIPED, "page_size": 16, "stripe_size": 16, "kv_disk": str(tmp_path)}
    with adapter_engine(MODEL.path, both("llama"), **options) as engine:
        one_by_one(engine, (None, "a"))
        engine.tiers.flush(engine.scheduler, engine.executor)
    with adapter_engine(MODEL.path, both("llama"), **options) as engine:
        found = one_by_one(engine, ("b", "a", None))
    assert [one.output_token_ids for one, _ in found] == [wanted for _, wanted in found]
    assert [one.num_cached > 0 for one, _ in found] == [False, True, True]


def test_preempted_requests_keep_their_adapter():
    options = {**STRIPED, "kv_cache_memory": memory_for(MODEL, 120)}
    with adapter_engine(MODEL.path, both("llama"), **options) as engine:
        running = add_all(engine, "llama")
        run_all(engine)
        assert engine.scheduler.num_preemptions
    assert [one.output_token_ids for one, _ in running] == [wanted for _, wanted in running]


# -- mutations ---------------------------------------------------------------------------------------------------------


def shifted(adapters):
    return adapters and [*adapters[1:], adapters[0]]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_of_another_adapter_change_tokens(num_ranks, monkeypatch):
    original = runner._row_adapters
    monkeypatch.setattr(runner, "_row_adapters", lambda runs: shifted(original(runs)))
    found, wanted = run("llama", **{**STRIPED, "context_parallel_size": num_ranks})
    assert found != wanted


def test_pages_without_their_adapter_change_tokens(monkeypatch):
    for module in (request, intake):
        monkeypatch.setattr(module, "hash_root", lambda rope, rope_len, adapter: b"")
    with adapter_engine(MODEL.path, both("llama"), **STRIPED) as engine:
        found = one_by_one(engine, ORDER)
    assert [one.output_token_ids for one, _ in found] != [wanted for _, wanted in found]


# -- weights that are not plain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_beside_small_weights_give_the_tokens_of_peft(bits, tmp_path):
    twin = AutoModelForCausalLM.from_pretrained(MODEL.path, dtype=torch.float32)
    for name in linear_names(twin):
        linear = twin.get_submodule(name)
        linear.weight.data = unpack(rounded(linear.weight.data, 8 if name == "lm_head" else bits))
    twin.save_pretrained(tmp_path)
    prompt = adapter_references("llama", 97, NUM_TOKENS)[None].prompt
    with adapter_engine(MODEL.path, both("llama"), **STRIPED, quantization=f"int{bits}") as engine:
        running = [
            engine.add_request(prompt, greedy(NUM_TOKENS), adapter=None if name is None else engine.adapters.find(name))
            for name in (None, "a", "b")
        ]
        run_all(engine)
    for name, one in zip((None, "a", "b"), running, strict=True):
        adapter = None if name is None else tiny_adapter("llama", name)
        assert one.output_token_ids == generate_with(str(tmp_path), adapter, prompt, NUM_TOKENS).token_ids


def test_an_adapter_is_computed_beside_a_merged_one(tmp_path):
    merged = tiny_adapter("llama", "b")
    lora = [merged, f"a={tiny_adapter('llama', 'a')}"]
    with adapter_engine(MODEL.path, lora, **STRIPED) as engine:
        prompt = adapter_references("llama", 97, NUM_TOKENS)["b"].prompt
        running = [
            engine.add_request(prompt, greedy(NUM_TOKENS), adapter=adapter)
            for adapter in (None, engine.adapters.find("a"))
        ]
        run_all(engine)
    assert running[0].output_token_ids == adapter_references("llama", 97, NUM_TOKENS)["b"].token_ids
    merged_model(MODEL.path, merged).save_pretrained(tmp_path)
    wanted = generate_with(str(tmp_path), tiny_adapter("llama", "a"), prompt, NUM_TOKENS)
    assert running[1].output_token_ids == wanted.token_ids


# -- while requests run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_adapters_come_and_go_while_requests_run(num_ranks):
    options = {**STRIPED, "context_parallel_size": num_ranks}
    references = adapter_references("llama", 97, NUM_TOKENS)
    prompt = references[None].prompt
    with adapter_engine(MODEL.path, {"a": tiny_adapter("llama", "a")}, **options) as engine:
        first, second = (
            engine.add_request(prompt, greedy(NUM_TOKENS), adapter=one) for one in (None, engine.adapters.find("a"))
        )
        while second.num_generated < 3:
            engine.step()
        gone = engine.adapters.find("a")
        engine.load_adapter("b", tiny_adapter("llama", "b"))
        third = engine.add_request(prompt, greedy(NUM_TOKENS), adapter=engine.adapters.find("b"))
        engine.unload_adapter("a")
        with pytest.raises(ConfigError, match="lora: got 'a', which was unloaded, legal is one of b"):
            engine.add_request(prompt, greedy(NUM_TOKENS), adapter=gone)
        assert [one.name for one in engine.adapters.told] == ["b", "a"], "its request still runs"
        run_all(engine)
        assert [one.name for one in engine.adapters.told] == ["b"]
        engine.load_adapter("a", tiny_adapter("llama", "b"))
        again = engine.add_request(prompt, greedy(NUM_TOKENS), adapter=engine.adapters.find("a"))
        run_all(engine)
        assert again.num_cached, "its files are those of b"
    assert [one.output_token_ids for one in (first, second, third, again)] == [
        references[name].token_ids for name in (None, "a", "b", "b")
    ]


def test_an_adapter_that_a_rank_cannot_load_is_none(tmp_path, monkeypatch):
    shutil.copytree(tiny_adapter("llama", "b"), tmp_path / "b")
    with adapter_engine(MODEL.path, both("llama"), **STRIPED) as engine:
        adapter = engine.adapters.read("c", str(tmp_path / "b"))
        with (tmp_path / "b" / "adapter_config.json").open("a") as file:
            file.write("\n")
        load = engine.begin_load_adapter(adapter)
        with pytest.raises(ConfigError, match="other files than the driver has read"):
            engine.end_load_adapter(load)
        with pytest.raises(ConfigError, match="lora: got 'c', legal is one of a, b"):
            engine.adapters.find("c")
        running = add_all(engine, "llama", LENGTHS[:1])
        run_all(engine)
    assert [one.output_token_ids for one, _ in running] == [wanted for _, wanted in running]
