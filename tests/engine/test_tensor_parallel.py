"""Ranks of several processes that share a model give Transformers' tokens; the processes are threads here.

`test_rank_processes.py` has real ones.
"""

import itertools

import pytest
import torch
from proven_models import PROVEN_MODELS, SPREADS, check_proven, make_config, proven_engine, proven_model
from tiny_models import FAMILIES, all_pairs, greedy, run_all, tiny_engine, tiny_model

from longspan.comm.peers import Peers, span
from longspan.config import EngineConfig
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models import part_norms, tensor_cuts, tensor_parallel, tensor_plans
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config
from longspan.models.speedups import speedups_of
from longspan.models.tensor_part import Part
from longspan.types import SamplingParams

CUT = [name for name, (model_type, _) in FAMILIES.items() if model_type != "youtu"]
_REFUSED = """
    axk1 biogpt deepseek_v2 deepseek_v3 glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode minicpm3 modernbert-decoder opt
    persimmon sarvam_mla youtu bamba falcon_h1 granitemoehybrid kimi_linear lfm2 lfm2_moe nemotron_h olmo_hybrid
    qwen3_5_moe_text qwen3_5_text qwen3_next
"""
REFUSED = frozenset(_REFUSED.split())
"""Families that no size but 1 works for, with Transformers 5.24."""
SHAPES = [(1, 2), (2, 2), (3, 2), (1, 4)]
REMOTE = ("gather_kv", "pass_kv", "pass_q", "tree")
SMALL = {"page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 64}


def divides(config, size):
    """Whether a model can be shared by so many processes."""
    try:
        inspect_model(config, None, torch.float32, size)
    except UnsupportedModelError as error:
        if not str(error).startswith(f"tensor_parallel_size: got {size} with "):
            raise
        return False
    return True


def check(name, shape, prompts=slice(1, 3), **options):
    """Compare with Transformers, and return the bytes that ranks sent by kind."""
    model, (num_ranks, size) = tiny_model(name), shape
    references = model.references[prompts]
    spread = {"context_parallel_size": num_ranks, "tensor_parallel_size": size, **SMALL, **options}
    with tiny_engine(model, **spread) as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in references]
        run_all(engine)
        sent = engine.stats().bytes_per_strategy
    assert [request.output_token_ids for request in requests] == [reference.token_ids for reference in references]
    return sent


@pytest.mark.cover(cases=3)
@pytest.mark.parametrize(
    ("name", "shape", "strategy"),
    [
        ("llama", (1, 2), "auto"),
        ("qwen3_moe", (2, 2), "gather_kv"),
        ("gemma2", (3, 2), "pass_q"),
        ("qwen2-window-mix", (1, 4), "auto"),
        ("gpt_oss", (2, 2), "pass_kv"),
    ],
)
def test_ranks_of_several_processes_give_the_tokens_of_transformers(name, shape, strategy):
    options = {} if shape[0] == 1 else {"placement": "striped", "strategy": strategy}
    sent = check(name, shape, **options)
    assert sent["sums"] > 0
    assert strategy == "auto" or sent[strategy] > 0


FACTORS = {
    "name": CUT,
    "shape": SHAPES,
    "strategy": ("auto", *REMOTE),
    "placement": ("striped", "spill", "packed"),
    "max_num_batched_tokens": (33, 256),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", all_pairs(FACTORS), ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_family_shape_strategy_and_placement_gives_the_tokens_of_transformers(case):
    name, shape = case.pop("name"), case.pop("shape")
    if not divides(load_config(tiny_model(name).path)[0], shape[1]):
        pytest.skip("its heads do not divide")
    if shape[0] == 1 or case["placement"] == "packed":
        case["strategy"] = "auto"
    if case["strategy"] == "tree":
        case["nodes"] = (0, *[1] * (shape[0] - 1))
    check(name, shape, slice(0, 4), **case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), list(itertools.product(PROVEN_MODELS, (2, 4))))
def test_every_family_gives_the_tokens_of_transformers_or_is_refused(name, size):
    config = make_config(name)
    if not divides(config, size):
        assert size == 4 or config.model_type in REFUSED, "2 divides the heads of all others"
        return
    assert config.model_type not in REFUSED
    model = proven_model(name)
    with proven_engine(model, tensor_parallel_size=size, **SPREADS["gather_kv"]) as engine:
        check_proven(model, engine)


def test_everything_that_is_sampled_and_scored_is_as_with_one_process():
    model = tiny_model("llama")
    prompt = model.references[1].prompt
    params = [
        SamplingParams(max_tokens=24, temperature=1.0, seed=3, top_p=0.9, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=24, repetition_penalty=1.3, presence_penalty=0.5, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=8),
    ]
    found = []
    for size in (1, 2):
        with tiny_engine(
            model, context_parallel_size=2, tensor_parallel_size=size, placement="striped", **SMALL
        ) as one:
            requests = [one.add_request(prompt, some) for some in params]
            run_all(one)
            found.append(requests)
    for one, two in zip(*found, strict=True):
        assert one.output_token_ids == two.output_token_ids
        for a, b in zip((*one.logprobs, *one.prompt_logprobs), (*two.logprobs, *two.prompt_logprobs), strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.cover
def test_the_prefix_cache_and_preemption_work_on_parts():
    model = tiny_model("qwen3-window-mix")
    long, short = model.references[2], model.references[1]
    spread = {"context_parallel_size": 2, "tensor_parallel_size": 2, "placement": "striped", **SMALL}
    with tiny_engine(model, **spread) as engine:
        for _ in range(2):
            request = engine.add_request(long.prompt, greedy())
            run_all(engine)
            assert request.output_token_ids == long.token_ids
        assert engine.stats().prefix_hit_tokens > 48
    tokens = sum(
        group.token_bytes for group in inspect_model(load_config(model.path)[0], None, torch.float32, 2).kv_groups
    )
    with tiny_engine(model, **spread, kv_cache_memory=140 * tokens) as engine:
        requests = [engine.add_request(one.prompt, greedy()) for one in (long, short, long)]
        run_all(engine)
        assert [one.output_token_ids for one in requests] == [long.token_ids, short.token_ids, long.token_ids]
        assert engine.stats().num_preemptions > 0


# -- mutations: what these tests would notice --------------------------------------------------------------------------


def skip_a_sum(monkeypatch):
    """In every fourth sum each process keeps its own part. Messages are the same, so that nothing waits."""
    original = Peers.sum

    def mutated(self, part):
        self.num_sums = getattr(self, "num_sums", 0) + 1
        total = original(self, part)
        return part if self.num_sums % 4 == 0 else total

    monkeypatch.setattr(Peers, "sum", mutated)


def swap_positions(monkeypatch):
    """The processes of a rank have each other's columns, and their own rows."""
    original = tensor_parallel.cut_columns_

    def mutated(module, columns, peers):
        half = module.in_features // 2
        original(module, slice(0, half) if columns.start else slice(half, 2 * half), peers)

    monkeypatch.setattr(tensor_parallel, "cut_columns_", mutated)


def compute_a_head_twice(monkeypatch):
    """Both processes have the first one's heads."""
    original = Part.rows

    def mutated(self, width, least):
        return original(Part(0, self.size), width, least)

    monkeypatch.setattr(Part, "rows", mutated)


def join_logits_in_the_wrong_order(monkeypatch):
    original = Peers.gather

    def mutated(self, part, width):
        return original(self, part, width).roll(width // 2, dims=-1)

    monkeypatch.setattr(Peers, "gather", mutated)


@pytest.mark.parametrize("mutate", [skip_a_sum, swap_positions, compute_a_head_twice, join_logits_in_the_wrong_order])
def test_the_comparison_notices(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check("qwen3_moe", (1, 2))


def skip_the_sum_of_a_norm(monkeypatch):
    """Each process scales its heads by their own squares."""
    original = tensor_parallel.cut_norm_
    monkeypatch.setattr(
        tensor_parallel, "cut_norm_", lambda norm, kept, add, size: original(norm, kept, lambda mean: mean * size, size)
    )


def give_all_processes_the_sinks_of_the_first(monkeypatch):
    original = tensor_parallel.cut_heads_
    monkeypatch.setattr(
        tensor_parallel, "cut_heads_", lambda module, name, part: original(module, name, Part(0, part.size))
    )


def add_the_bias_of_experts_in_every_process(monkeypatch):
    original = tensor_parallel.cut_experts_

    def mutated(module, part, peers):
        bias = module.down_proj_bias
        original(module, part, peers)
        module.down_proj_bias = bias

    monkeypatch.setattr(tensor_parallel, "cut_experts_", mutated)


def take_gate_and_up_for_one_matrix(monkeypatch):
    monkeypatch.setattr(
        tensor_parallel,
        "cut_gate_up_",
        lambda module, part: tensor_cuts.cut_rows_(module, part.of(module.out_features)),
    )


@pytest.mark.cover(cases=1)
@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("olmo2", skip_the_sum_of_a_norm),
        ("gpt_oss", give_all_processes_the_sinks_of_the_first),
        ("gpt_oss", add_the_bias_of_experts_in_every_process),
        ("glm4", take_gate_and_up_for_one_matrix),
    ],
)
def test_the_comparison_notices_what_a_family_has_of_its_own(name, mutate, monkeypatch):
    model, spread = proven_model(name), {"tensor_parallel_size": 2, **SPREADS["gather_kv"]}
    with proven_engine(model, **spread) as engine:
        check_proven(model, engine)
    mutate(monkeypatch)
    with proven_engine(model, **spread) as engine, pytest.raises(AssertionError):
        check_proven(model, engine)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_layers_of_a_part_are_fused_and_hold_nothing_else():
    model = tiny_model("llama")
    with tiny_engine(model, tensor_parallel_size=2, **SMALL) as engine:
        parts = [runner.model for runner in engine.executor.runners]
        for index, part in enumerate(parts):
            assert "fused_layers" in {speedup.name for speedup in speedups_of(part)}
            whole, cut = model.plain.model.layers[0].self_attn, part.model.layers[0].self_attn
            assert cut.q_proj.weight.shape[0] * 2 == whole.q_proj.weight.shape[0]
            assert torch.equal(cut.o_proj.weight, whole.o_proj.weight[:, span(64, index, 2)])
            assert cut.q_proj.weight.untyped_storage().nbytes() == cut.q_proj.weight.nbytes, "the rest is let go"
            assert part.model.embed_tokens.weight is model.plain.model.embed_tokens.weight
    assert model.plain.model.layers[0].self_attn.q_proj.out_features == 64, "the model that was given is whole"


@pytest.mark.cover
def test_fewer_kv_heads_than_processes_are_held_by_several():
    (group,) = inspect_model(load_config(tiny_model("mistral").path)[0], None, torch.float32, 4).kv_groups
    assert (group.num_query_heads, group.spec.layout.num_kv_heads) == (2, 1)
    rows = [Part(index, 4).rows(2 * 16, 16) for index in range(4)]
    assert rows == [slice(0, 16), slice(0, 16), slice(16, 32), slice(16, 32)]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("qwen2", 4, r"got 4 with 14 query and 2 KV heads.*, legal is 1, 2$"),
        ("llama-yarn", 2, r"got 2 with 7 query and 1 KV heads.*, legal is 1$"),
        ("youtu", 2, "got 2 with latents, which every process would need, legal is 1"),
    ],
)
def test_rejects_models_that_cannot_be_shared_and_names_the_sizes_that_work(name, size, message):
    with (
        pytest.raises(UnsupportedModelError, match=f"tensor_parallel_size: {message}"),
        tiny_engine(tiny_model(name), tensor_parallel_size=size),
    ):
        pass


def test_rejects_families_without_a_plan_and_what_no_part_can_compute(monkeypatch):
    def check_refused(name, message):
        with pytest.raises(UnsupportedModelError, match=f"tensor_parallel_size: got 2 with {message}, legal is 1$"):
            inspect_model(make_config(name), None, torch.float32, 2)

    check_refused("gpt2", "GPT2LMHeadModel, for which there is no plan that cuts attention")
    monkeypatch.setitem(tensor_plans.OWN_PLANS, "llama", {"mlp.act_fn": "colwise"})
    check_refused("llama", r"LlamaForCausalLM, in which Transformers' plan cuts model.layers.0.mlp.act_fn as 'colwise'")
    monkeypatch.setattr(part_norms, "EPSILONS", ())
    check_refused("olmo2", "Olmo2ForCausalLM, whose heads go through Olmo2RMSNorm, which is no RMS norm that is known")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: got 0"),
        ({"tensor_parallel_size": 2, "quantization": "int8"}, "quantization: got 'int8' with tensor_parallel_size 2"),
        ({"tensor_parallel_size": 2, "compile_dense": True}, "compile_dense: got True with tensor_parallel_size 2"),
        ({"tensor_parallel_size": 2, "kv_host_memory": 2**30}, "kv_host_memory: got one with tensor_parallel_size 2"),
        ({"tensor_parallel_size": 2, "kv_disk": "pages"}, "kv_disk: got one with tensor_parallel_size 2"),
        (
            {"tensor_parallel_size": 64, "context_parallel_size": 4},
            "tensor_parallel_size: got 64 with context_parallel_size 4, legal is 32 at most",
        ),
    ],
)
def test_rejects_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="recall", **options)


def test_rejects_a_loaded_model_with_speedups():
    model = tiny_model("llama")
    with (
        pytest.raises(ConfigError, match="got one with speed-ups and tensor_parallel_size"),
        tiny_engine(model, model.module, tensor_parallel_size=2),
    ):
        pass
