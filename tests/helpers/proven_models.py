"""A tiny model of every row of the table of proven families, and how far its log-probabilities are from exact ones.

Unlike `tiny_models.FAMILIES`, which a few families share in covers of all pairs of options, each family here is run in
a handful of spreads: the parts that spread a request know nothing of families, so what can differ is how a family calls
them. Some families repeat themselves whatever the weights, so log-probabilities are compared as well: with float64, in
units of the error that Transformers' own float32 has.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hybrid_models import HYBRIDS
from tiny_models import COMMON, model_root, random_prompt, randomize_, run_all
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.types import SamplingParams

FULL, SLIDING = "full_attention", "sliding_attention"
DENSE, SPARSE = "dense", "sparse"
MIXED = [SLIDING, FULL, SLIDING]
WINDOW = {"sliding_window": 24}
LAYERS = {"layer_types": MIXED, **WINDOW}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
}
LATENTS = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 8,
    "head_dim": None,
}
MSCALE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 1, 0, 1],
    "attention_chunk_size": 28,
    "floor_scale": 40,
    "attn_scale": 0.4,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
}
NO_GROUPS = {"num_key_value_heads": None, "head_dim": None}
NO_HEAD_DIM = {"head_dim": None, "num_attention_heads": 4}
PROMPT_LENS = (1, 31, 97, 330)
NUM_TOKENS = 24

SPREADS = {
    "one": {"context_parallel_size": 1},
    "gather_kv": {
        "context_parallel_size": 2,
        "placement": "striped",
        "strategy": "gather_kv",
        "page_size": 4,
        "stripe_size": 4,
        "max_num_batched_tokens": 33,
    },
    "pass_q": {
        "context_parallel_size": 2,
        "placement": "striped",
        "strategy": "pass_q",
        "page_size": 16,
        "stripe_size": 32,
        "max_num_batched_tokens": 100,
    },
    "pass_kv": {
        "context_parallel_size": 3,
        "placement": "striped",
        "strategy": "pass_kv",
        "page_size": 4,
        "stripe_size": 8,
        "max_num_batched_tokens": 64,
    },
    "tree": {
        "context_parallel_size": 3,
        "placement": "striped",
        "strategy": "tree",
        "nodes": (0, 0, 1),
        "page_size": 4,
        "stripe_size": 4,
        "max_num_batched_tokens": 50,
    },
    "packed": {"context_parallel_size": 3, "placement": "packed", "page_size": 16, "max_num_batched_tokens": 129},
    "auto": {"context_parallel_size": 2, "placement": "striped", "page_size": 16, "stripe_size": 16},
}
"""Ways to spread all prompts at once."""

PROVEN_MODELS: dict[str, tuple[str, Mapping[str, object]]] = {
    # name: model type, and what differs from the common sizes; None drops a field
    "afmoe": ("afmoe", {**EXPERTS, **LAYERS}),
    "apertus": ("apertus", {}),
    "apertus1p5_text": ("apertus1p5_text", {}),
    "arcee": ("arcee", {}),
    "axk1": ("axk1", {**ROUTED, **LATENTS, "mlp_layer_types": [DENSE, SPARSE, SPARSE]}),
    "aria_text": ("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "biogpt": ("biogpt", NO_GROUPS),
    "bitnet": ("bitnet", NO_HEAD_DIM),
    "cohere": ("cohere", {}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", LAYERS),
    "cohere2_moe": ("cohere2_moe", {**EXPERTS, **LAYERS, "moe_intermediate_size": None}),
    "cwm": ("cwm", LAYERS),
    "deepseek_v2": (
        "deepseek_v2",
        {**ROUTED, **LATENTS, "q_lora_rank": None, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2-real-sizes": (  # of one layer's attention, with which chunks of more than 239 tokens are expanded
        "deepseek_v2",
        {
            **NO_GROUPS,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**ROUTED, **LATENTS, "first_k_dense_replace": 1}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {**ROUTED, **LATENTS, "qk_rope_head_dim": 16, "v_head_dim": 16, "rope_parameters": MSCALE_YARN},
    ),
    "dots1": ("dots1", {**ROUTED, **LAYERS, "first_k_dense_replace": 1}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    ),
    "exaone": ("exaone", {}),
    "exaone4": ("exaone4", LAYERS),
    "exaone_moe": ("exaone_moe", {**EXPERTS, **LAYERS, "n_group": 2, "topk_group": 1}),
    "flex_olmo": ("flex_olmo", {**EXPERTS, "moe_intermediate_size": None}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("gemma3_text", {**LAYERS, "query_pre_attn_scalar": 24}),
    "gemma4_text": (
        "gemma4_text",
        {**LAYERS, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 300, "global_head_dim": 32},
    ),
    "gemma4_text-shared": (
        "gemma4_text",
        {
            **WINDOW,
            "global_head_dim": 32,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {**ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True}),
    "glm4_moe_lite": ("glm4_moe_lite", {**ROUTED, **LATENTS, "mlp_layer_types": [DENSE, SPARSE, SPARSE]}),
    "gpt-sw3": ("gpt-sw3", NO_GROUPS),
    "gpt2": ("gpt2", NO_GROUPS),
    "gpt_bigcode": ("gpt_bigcode", NO_GROUPS),
    "gpt_neox": ("gpt_neox", NO_GROUPS),
    "gpt_oss": (
        "gpt_oss",
        {
            **LOCAL_EXPERTS,
            **LAYERS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "truncate": False,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "granite": ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0}),
    "granite_swa": ("granite_swa", {**LAYERS, "attention_multiplier": 0.3}),
    "granitemoe": ("granitemoe", {**LOCAL_EXPERTS, "attention_multiplier": 0.3}),
    "granitemoe_swa": ("granitemoe_swa", {**LOCAL_EXPERTS, **LAYERS, "attention_multiplier": 0.3}),
    "granitemoeshared": (
        "granitemoeshared",
        {**LOCAL_EXPERTS, "shared_intermediate_size": 48, "attention_multiplier": 0.3},
    ),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2}),
    "hy_v3": ("hy_v3", EXPERTS),
    "hyperclovax": ("hyperclovax", {"attention_multiplier": 0.3}),
    "internlm3": ("internlm3", {}),
    "iquestcoder": ("iquestcoder", {}),
    "jais2": ("jais2", {}),
    "laguna": (
        "laguna",
        {**EXPERTS, **LAYERS, "shared_expert_intermediate_size": 32, "mlp_layer_types": [DENSE, SPARSE, SPARSE]},
    ),
    "llama": ("llama", {}),
    "llama4_text": ("llama4_text", LLAMA4),
    "llama4_text-interleaved": (
        "llama4_text",
        {
            **LLAMA4,
            "num_experts_per_tok": 2,
            "moe_layers": [1, 3],
            "use_qk_norm": False,
            "no_rope_layers": [1, 0, 0, 1],
        },
    ),
    "mellum": ("mellum", {**EXPERTS, **LAYERS}),
    "mimo_v2_flash": ("mimo_v2_flash", {**ROUTED, **LAYERS, "v_head_dim": 12, "n_shared_experts": None}),
    "minimax_m2": ("minimax_m2", LOCAL_EXPERTS),
    "minicpm3": ("minicpm3", {**LATENTS, "dim_model_base": 32}),
    "minicpm3-longrope": (
        "minicpm3",
        {
            **LATENTS,
            "dim_model_base": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [1.5, 2.5, 4.0, 8.0],
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "ministral": ("ministral", LAYERS),
    "ministral3": ("ministral3", WINDOW),
    "ministral3-far": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.4,
            }
        },
    ),
    "mistral": ("mistral", WINDOW),
    "mixtral": ("mixtral", LOCAL_EXPERTS),
    "mixtral-window": ("mixtral", {**LOCAL_EXPERTS, **WINDOW}),
    "modernbert-decoder": (
        "modernbert-decoder",
        {"layer_types": MIXED, "local_attention": 24, "num_key_value_heads": None, "head_dim": None},
    ),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {"clip_qkv": 1.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", LAYERS),
    "olmoe": ("olmoe", {**EXPERTS, "head_dim": None, "moe_intermediate_size": None}),
    "opt": ("opt", {**NO_GROUPS, "word_embed_proj_dim": 64, "ffn_dim": 96}),
    "persimmon": ("persimmon", NO_GROUPS),
    "phi": ("phi", {"head_dim": None}),
    "phi3": ("phi3", {"head_dim": None}),
    "phi3-window": ("phi3", {"head_dim": None, **WINDOW}),
    "phimoe": ("phimoe", {**LOCAL_EXPERTS, "head_dim": None}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "head_dim": None, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe-mlp": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1]}),
    "sarvam_mla": ("sarvam_mla", {**ROUTED, **LATENTS, "q_lora_rank": None, "first_k_dense_replace": 1}),
    "sarvam_moe": ("sarvam_moe", EXPERTS),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "solar_open": ("solar_open", ROUTED),
    "stablelm": ("stablelm", {"head_dim": None}),
    "stablelm-norm": ("stablelm", {"head_dim": None, "qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"head_dim": None}),
    "starcoder2-window": ("starcoder2", {"head_dim": None, **WINDOW}),
    "vaultgemma": ("vaultgemma", {**LAYERS, "attn_logit_softcapping": 3.0}),
    "youtu": ("youtu", LATENTS),
    **HYBRIDS,
}


def make_config(name: str) -> object:
    """Config of a tiny model."""
    model_type, options = PROVEN_MODELS[name]
    fields = copy.deepcopy({**COMMON, **options})  # gemma4's config changes the list that it is given
    return AutoConfig.for_model(model_type, **{key: value for key, value in fields.items() if value is not None})


@dataclass(frozen=True)
class Exact:
    """Prompt, and what Transformers continues it with in float32 with eager attention."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    """Of each token, from float64 weights and arithmetic."""
    eager_error: float
    """Largest difference of Transformers' own float32 log-probabilities from these."""


@dataclass(frozen=True)
class ProvenModel:
    name: str
    path: str
    references: Sequence[Exact]
    """One per length in PROMPT_LENS."""

    @property
    def eager_error(self) -> float:
        """Largest error of Transformers' float32 over all references."""
        return max(reference.eager_error for reference in self.references)


@functools.cache
def proven_model(name: str) -> ProvenModel:
    """Build a family's model and its references; shared by all callers of this process."""
    path = model_root() / f"proven-{name}"
    config = make_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_(model)
    model.tie_weights()
    model.save_pretrained(path)
    return ProvenModel(name, str(path), references_of(path))


def references_of(path: object) -> tuple[Exact, ...]:
    """What Transformers continues one prompt of each length with, for the model in a folder."""
    eager = _load(path, torch.float32)
    exact = _load(path, torch.float64)
    return tuple(_reference(eager, exact, length) for length in PROMPT_LENS)


def _load(path: object, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.inference_mode()
def _reference(eager: nn.Module, exact: nn.Module, length: int) -> Exact:
    """Greedy tokens by one prefill per token from scratch would be slow, so Transformers' own `generate` does it."""
    for seed in range(20):
        prompt = random_prompt(length, seed)
        output = eager.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(output.logits)
        top = logits.topk(2).values
        if float((top[:, 0] - top[:, 1]).min()) > 1e-3:  # else two float32 evaluations may differ
            break
    else:
        raise AssertionError("every prompt meets a near-tie")
    tokens = output.sequences[0, length:]
    rows = exact(output.sequences[:, :-1]).logits[0, length - 1 :].log_softmax(-1)
    picked = rows.gather(1, tokens[:, None])[:, 0]
    own = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Exact(prompt, tokens.tolist(), picked.tolist(), float((own - picked).abs().max()))


def proven_engine(model: ProvenModel, **options: object) -> Engine:
    """An engine on ranks that are threads; options as in `EngineConfig`."""
    common = {"executor": "threads", "threads_per_rank": 1, "exchange_timeout_s": 60.0}
    return Engine(EngineConfig(model=model.path, **common, **{"dtype": "float32", "kv_cache_memory": 2**25, **options}))


def check_proven(model: ProvenModel, engine: Engine, slack: float = 2e-6) -> None:
    """Compare an engine's tokens with Transformers', and its log-probabilities' errors with three times Transformers'.

    Args:
        model: what the engine serves.
        engine: has no requests.
        slack: error that log-probabilities may have beyond that.
    """
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    requests = [engine.add_request(reference.prompt, params) for reference in model.references]
    run_all(engine)
    for request, reference in zip(requests, model.references, strict=True):
        assert request.output_token_ids == reference.token_ids
        found = [one.logprob for one in request.logprobs]
        error = max(abs(a - b) for a, b in zip(found, reference.logprobs, strict=True))
        assert error <= 3 * model.eager_error + slack, f"{error:.1e} beside Transformers' own {model.eager_error:.1e}"
