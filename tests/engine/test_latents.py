"""Latent attention in the engine: what is cached and sent, and that the comparison with Transformers notices faults."""

import msgspec
import pytest
import torch
from proven_models import PROVEN_MODELS, make_config
from tiny_models import greedy, run_all, tiny_engine, tiny_model
from transformers import DeepseekV3Config

from longspan.attention import latent
from longspan.attention.latent import LatentBackend, LatentParams, LatentWeights
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import UnsupportedModelError
from longspan.kv.layout import KVSpec
from longspan.kv.pool import PagePool
from longspan.models import hook
from longspan.models import latent as model_latent
from longspan.models.families import PROVEN_FAMILIES, REFUSED_FAMILIES, Need, check_family
from longspan.models.inspect import inspect_model
from longspan.models.shape import model_shape
from longspan.types import AttentionParams

pytestmark = pytest.mark.cover

FAMILIES = sorted(name for name, (kind, _) in PROVEN_MODELS.items() if Need.LATENTS in PROVEN_FAMILIES[kind].needs)
OPTIONS = {"context_parallel_size": 2, "placement": "striped", "page_size": 4, "stripe_size": 8}


# -- what is cached ----------------------------------------------------------------------------------------------------


def test_deepseek_v3_caches_70_kilobytes_a_token():
    """61 layers of 512 + 64 elements in bfloat16. Keys and values of 128 heads would be 4,997,120 bytes."""
    shape = model_shape(DeepseekV3Config(), "bfloat16")
    assert shape.kv_token_bytes == 61 * (512 + 64) * 2 == 70_272
    (group,) = shape.spec.kv_groups
    assert group.spec == KVSpec.latents(512, 64, 192, 128, "bfloat16")
    assert (group.spec.layout.k_width, group.spec.layout.v_width, group.num_query_heads) == (576, 512, 128)
    assert group.query_row_bytes == 128 * 192 * 2, "queries travel as wide as the layer makes them"
    assert group.merged_row_bytes == 128 * 128 * 4
    assert shape.not_run is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_caches_latents_once_for_all_heads(name):
    config = make_config(name)
    spec = inspect_model(config, None, torch.float32)
    (group,) = spec.kv_groups
    rotated = config.qk_rope_head_dim
    assert group.spec.layout.num_kv_heads == 1
    assert group.token_bytes == len(group.layers) * 4 * (config.kv_lora_rank + rotated)
    assert group.spec.q_width == config.qk_nope_head_dim + rotated
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(group.spec), type=KVSpec) == group.spec


def test_scores_have_yarns_factor():
    spec = inspect_model(make_config("deepseek_v3-yarn"), None, torch.float32)
    assert spec.layer_params[0].scale != pytest.approx(32**-0.5, rel=1e-3)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(REFUSED_FAMILIES))
def test_rejects_a_sparse_index_and_says_why(model_type):
    with pytest.raises(UnsupportedModelError, match=f"model_type: got '{model_type}', not supported: .*learned index"):
        check_family(model_type)
    assert model_type not in PROVEN_FAMILIES


def test_rejects_a_projection_whose_parts_cannot_be_taken():
    class Module(torch.nn.Module):
        qk_nope_head_dim, v_head_dim, kv_lora_rank = 4, 4, 8
        expand_kv = None

    module = Module()
    for projection in (
        torch.nn.Linear(8, 16),
        torch.nn.Linear(4, 16, bias=False),
        torch.nn.Linear(8, 16, bias=False).to(torch.float8_e4m3fn).requires_grad_(False),
    ):
        module.kv_b_proj = projection
        if projection.weight.dtype is torch.float8_e4m3fn:
            continue  # a plain matrix of numbers that cannot be multiplied is another refusal's
        with pytest.raises(UnsupportedModelError, match="kv_b_proj: got Linear with a weight"):
            model_latent.hand_over_latents_(module)


def test_rejects_latents_with_what_no_family_has(monkeypatch):
    honest = hook.AttentionCall
    monkeypatch.setattr(hook, "AttentionCall", lambda **fields: honest(**{**fields, "softcap": 3.0}))
    with pytest.raises(UnsupportedModelError, match=r"layer 0: got latents with .*softcap 3.0.*, proven"):
        inspect_model(make_config("youtu"), None, torch.float32)


# -- mutations ---------------------------------------------------------------------------------------------------------


def values_from_the_wrong_end_of_keys(monkeypatch):
    monkeypatch.setattr(
        PagePool, "_starts_of_keys", lambda self, width: {layer: k[:, :, -width:] for layer, k in self.k.items()}
    )


def scale_of_the_stored_width(monkeypatch):
    """As if scores were those of keys of rank + rotated elements."""
    wrong = property(lambda self: AttentionParams(self.spec.layout.k_width**-0.5, self.softcap, self.window))
    monkeypatch.setattr(LatentParams, "of_heads", wrong)


def absorb_with_the_wrong_head(monkeypatch):
    honest = LatentWeights.absorb
    monkeypatch.setattr(
        LatentWeights, "absorb", lambda self, q: honest(LatentWeights(self.w_k.roll(1, 0), self.w_v), q)
    )


def project_with_the_wrong_head(monkeypatch):
    honest = LatentWeights.project
    monkeypatch.setattr(
        LatentWeights, "project", lambda self, part: honest(LatentWeights(self.w_k, self.w_v.roll(1, 0)), part)
    )


def expand_with_the_wrong_head(monkeypatch):
    honest = LatentWeights.expand
    monkeypatch.setattr(
        LatentWeights, "expand", lambda self, rows: honest(LatentWeights(self.w_k.roll(1, 0), self.w_v), rows)
    )


def forget_the_rotated_part(monkeypatch):
    honest = LatentWeights.absorb

    def wrong(self, q):
        absorbed = honest(self, q)
        absorbed[..., self.w_k.shape[2] :] = 0
        return absorbed

    monkeypatch.setattr(LatentWeights, "absorb", wrong)


def lose_an_expanded_block(monkeypatch):
    honest = latent.divide

    def wrong(*args):
        work = honest(*args)
        return latent.Work(work.left, work.blocks[1:])

    monkeypatch.setattr(latent, "divide", wrong)


def generate(strategy):
    model = tiny_model("youtu")
    with tiny_engine(model, **OPTIONS, strategy=strategy) as engine:
        for rank in engine.executor.runners:
            assert isinstance(rank.backend, LatentBackend)
        requests = [engine.add_request(reference.prompt, greedy(24)) for reference in model.references[1:3]]
        run_all(engine)
    return [request.output_token_ids for request in requests]


@pytest.mark.cover(cases=6)
@pytest.mark.parametrize("strategy", ["pass_q", "gather_kv"])
@pytest.mark.parametrize(
    "mutation",
    [
        None,
        values_from_the_wrong_end_of_keys,
        scale_of_the_stored_width,
        absorb_with_the_wrong_head,
        project_with_the_wrong_head,
        expand_with_the_wrong_head,
        forget_the_rotated_part,
        lose_an_expanded_block,
    ],
)
def test_a_broken_layer_changes_tokens(mutation, strategy, monkeypatch):
    if mutation is not None:
        mutation(monkeypatch)
    expected = [reference.token_ids[:24] for reference in tiny_model("youtu").references[1:3]]
    assert (generate(strategy) == expected) == (mutation is None)


# -- what is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.cover
def test_queries_and_partials_travel_as_wide_as_the_heads():
    """Two ranks, one request: each of the decode rows sends its queries once and gets one partial back, per layer."""
    model = tiny_model("youtu")
    reference = model.references[2]
    with tiny_engine(model, **OPTIONS, strategy="pass_q", max_num_batched_tokens=400) as engine:
        engine.add_request(reference.prompt, greedy(1))
        run_all(engine)
        before = sum(stats.bytes_sent for stats in engine.rank_stats())
        engine.add_request(reference.prompt, greedy(9))
        (group,) = engine.executor.runners[0].spec.kv_groups
        run_all(engine)
        sent = sum(stats.bytes_sent for stats in engine.rank_stats()) - before
    row = 8 * (32 * 4 + 16 * 4 + 4)  # of 8 heads: a query of 32 elements, an output of 16, one log-sum-exp
    assert group.query_row_bytes == 8 * 32 * 4
    assert sent % row == 0
    assert 3 * 8 * row <= sent <= 3 * (8 + 4) * row  # 8 decodes, and the tail of the prompt behind its cached pages


@pytest.mark.processes
def test_ranks_that_are_processes_measure_and_attend_latents():
    """They load the weights themselves, and measure kernels with them before `auto` chooses."""
    model = tiny_model("youtu")
    references = model.references[1:3]
    config = EngineConfig(model=model.path, **OPTIONS, threads_per_rank=1, dtype="float32", kv_cache_memory=2**25)
    with Engine(config) as engine:
        requests = [engine.add_request(reference.prompt, greedy(24)) for reference in references]
        run_all(engine)
        assert all(stats.tokens_computed for stats in engine.rank_stats())
    assert [request.output_token_ids for request in requests] == [r.token_ids[:24] for r in references]
