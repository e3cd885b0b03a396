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
    "gpt_oss": {
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "layer_types": [W, F, W, F],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN,
    },
}
TABLES = {"mistral": 1, "gpt_oss": 2}
"""Block tables of a request of each kind, by vLLM's default."""
