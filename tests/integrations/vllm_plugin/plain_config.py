"""A stand-in for vLLM's configuration that no check of the plugin refuses."""

from types import SimpleNamespace

import torch
from vllm.config import CompilationMode

PLAIN = {
    "use_v2_model_runner": True,
    "compilation_config.mode": CompilationMode.DYNAMO_TRACE_ONCE,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.data_parallel_size": 1,
    "parallel_config.nnodes": 1,
    "parallel_config.enable_expert_parallel": False,
    "parallel_config.enable_eplb": False,
    "parallel_config.enable_dbo": False,
    "parallel_config.enable_batch_sharded_sampling": None,
    "parallel_config.enable_fault_tolerance": False,
    "parallel_config.ubatch_size": 0,
    "speculative_config": None,
    "lora_config": None,
    "kv_transfer_config": None,
    "ec_transfer_config": None,
    "cache_config.cache_dtype": "auto",
    "cache_config.kv_cache_dtype_skip_layers": [],
    "cache_config.kv_sharing_fast_prefill": False,
    "model_config.model": "m",
    "model_config.dtype": torch.float32,
    "model_config.enable_sleep_mode": False,
    "model_config.runner_type": "generate",
    "model_config.enable_prompt_embeds": False,
    "model_config.is_multimodal_model": False,
    "model_config.multimodal_config": SimpleNamespace(language_model_only=False),
    "model_config.uses_mrope": False,
    "model_config.is_encoder_decoder": False,
    "model_config.use_mla": False,
    "model_config.is_hybrid": False,
    "model_config.has_inner_state": False,
    "model_config.is_moe": False,
    "model_config.attention_chunk_size": None,
    "model_config.get_sliding_window": lambda: None,
    "model_config.hf_text_config": SimpleNamespace(layer_types=None),
}
"""What the checks of configurations read, with values that all of them accept."""


def stub(**changed):
    """A VllmConfig of `PLAIN` with changes, where `__` stands for the dot."""
    found = SimpleNamespace()
    for path, value in {**PLAIN, **{name.replace("__", "."): value for name, value in changed.items()}}.items():
        *outer, name = path.split(".")
        for part in outer:
            found.__dict__.setdefault(part, SimpleNamespace())
        setattr(getattr(found, outer[0]) if outer else found, name, value)
    return found
