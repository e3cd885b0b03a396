"""vLLM's names of KV dtypes, and how the core stores them.

Holds the names that a worker for CPUs takes. Must not know layers or requests.
Read next: `longspan.kv.stored`; `longspan.integrations.vllm.layers`, which makes specs of it.
"""

STORED_AS = {
    "bfloat16": "bfloat16",
    "int8_per_token_head": "int8",
    "fp8_per_token_head": "float8_e4m3fn",
}
"""PyTorch's name of the dtype of stored elements, by vLLM's name of what the user wants. vLLM's names with a scale per
token and head mean what the core does; its `fp8` has one scale per layer, which the core lacks."""
