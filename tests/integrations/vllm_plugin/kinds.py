"""Models with experts, or with other attention than Llama's: what they have beside the sizes of `save_model`."""

W, F = "sliding_attention", "full_attention"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "truncate": False,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
KINDS = {
    "mistral": {"sliding_window": 700},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "layer_types": [W, F, W, F],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN,
    },
    "llama4_text": {
        "attention_chunk_size": 200,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 0, 1],
        "floor_scale": 512,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 192,
    },
    "gemma2": {
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "layer_types": [W, F, W, F],
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,  # vLLM reads no other weights
    },
    "gemma3_text": {
        "sliding_window": 400,
        "num_hidden_layers": 6,
        "layer_types": [W, W, F, W, W, W],
        "query_pre_attn_scalar": 32,
    },
    "cohere2": {
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "layer_types": [W, W, W, F],
        "tie_word_embeddings": True,
    },
}
IN_TRANSFORMERS = {
    "gemma2": {"attn_implementation": "eager"},  # the only one with softcaps on a CPU
    "cohere2": {"sliding_window": 101},  # vLLM's queries see one token more
}
"""How Transformers must load a model to compute what vLLM does."""
TABLES = {
    "mistral": 1,
    "qwen3_moe": 1,
    "gpt_oss": 2,
    "llama4_text": 1,
    "gemma2": 2,
    "gemma3_text": 6,
    "cohere2": 4,
}
"""Block tables of a request of each kind, by vLLM's default: chunks share one with full attention."""
