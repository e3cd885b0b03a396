"""Models with other attention than Llama's: what they have beside the sizes of `save_model`."""

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
    "gemma2": {
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    # five layers with windows in three groups of two: the last one has one layer less than its memory
    "gemma3_text": {
        "sliding_window": 100,
        "num_hidden_layers": 7,
        "layer_types": [W, W, W, F, W, W, F],
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "layer_types": [W, F, W, F],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN,
    },
    "cohere2": {
        "sliding_window": 320,
        "num_hidden_layers": 4,
        "layer_types": [W, W, W, F],
        "tie_word_embeddings": True,
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
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 64,
    },
}
TABLES = {"mistral": 1, "gemma2": 2, "gemma3_text": 4, "gpt_oss": 2, "cohere2": 4, "llama4_text": 1, "deepseek_v3": 1}
"""Block tables of a request of each kind, by vLLM's default: chunks share one with full attention."""
