"""Tiny models of families with recurrent layers, for the table of proven families."""

from collections.abc import Mapping

LINEAR, FULL, CONV = "linear_attention", "full_attention", "conv"
FOUR = {"num_hidden_layers": 4}
DELTA = {
    **FOUR,
    "layer_types": [LINEAR, FULL, LINEAR, FULL],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
}
CONVS = {**FOUR, "layer_types": [CONV, FULL, CONV, FULL], "conv_L_cache": 3}
NO_HEAD_DIM = {"head_dim": None, "num_attention_heads": 4}

HYBRIDS: dict[str, tuple[str, Mapping[str, object]]] = {
    # name: model type, and what differs from the common sizes; None drops a field
    "bamba": ("bamba", {**MAMBA, **NO_HEAD_DIM, **FOUR, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 128}),  # both kinds in every layer
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA,
            **NO_HEAD_DIM,
            **FOUR,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],  # the last layer carries a state on
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "kimi_linear": (  # latent attention beside layers of three convolutions and a delta rule gated by channel
        "kimi_linear",
        {
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, FULL, LINEAR],
            "num_key_value_heads": 8,
            "head_dim": None,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "lfm2": ("lfm2", CONVS),
    "lfm2_moe": (
        "lfm2_moe",
        {**CONVS, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1},
    ),
    "nemotron_h": (  # some layers have neither attention nor a state
        "nemotron_h",
        {
            "layers_block_type": [LINEAR, "mlp", FULL, LINEAR, "moe"],
            "num_hidden_layers": 5,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "chunk_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**DELTA, **NO_HEAD_DIM}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**DELTA, **EXPERTS}),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_next": ("qwen3_next", {**DELTA, **EXPERTS}),
}
