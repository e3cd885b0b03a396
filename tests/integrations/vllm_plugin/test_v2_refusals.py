"""With `prefill_context_parallel_size`, what is not proven is refused before a worker starts, by the option's name."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.rswa_attention import RSWAAttention
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm.placement import Striping
from longspan.integrations.vllm.plugin import register
from longspan.integrations.vllm.runner.backend import RankedAttentionImpl, RankedBackend, attention_layers
from longspan.integrations.vllm.runner.checks import check_config, check_platform
from longspan.integrations.vllm.runner.start import WORKERS
from longspan.integrations.vllm.runner.worker import placed_spec
from longspan.integrations.vllm.spec import PlacedSpec
from longspan.sharding.geometry import StepGeometry


@pytest.fixture
def triton(monkeypatch):
    """vLLM chooses its V2 model runner only where it finds Triton."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr("longspan.integrations.vllm.runner.start.HAS_TRITON", True)


def config(model, longspan=None, **options):
    register()
    arguments = {"dtype": "float32", "max_model_len": 512, "prefill_context_parallel_size": 2, **options}
    return EngineArgs(model=model, additional_config={"longspan": longspan or {}}, **arguments).create_engine_config()


def test_vllms_own_option_selects_everything(models, triton):
    found = config(models["llama"])
    assert found.parallel_config.worker_cls == WORKERS["cpu"]
    assert found.parallel_config.world_size == 2
    assert found.use_v2_model_runner
    assert not found.model_config.enforce_eager, "vLLM compiles the model as it does without us"


def test_rejects_a_cpu_without_triton(models):
    with pytest.raises(
        ConfigError, match=r"^device: got cpu, legal .* on CPUs give context_parallel_size under longspan"
    ):
        config(models["llama"])


def test_rejects_other_devices():
    with pytest.raises(ConfigError, match=r"^device: got xpu, legal .* is cuda"):
        check_platform("xpu", has_triton=True)


def test_rejects_the_v1_runner(models, triton, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ConfigError, match=r"^VLLM_USE_V2_MODEL_RUNNER: got 0"):
        config(models["llama"])


@pytest.mark.parametrize(
    ("longspan", "name"),
    [
        ({"context_parallel_size": 3}, "longspan.context_parallel_size"),
        ({"strategy": "pass_q"}, "longspan.strategy"),
        ({"placement": "spill"}, "longspan.placement"),
    ],
)
def test_rejects_options(models, triton, longspan, name):
    with pytest.raises(ConfigError, match=f"^{name}: got"):
        config(models["llama"], longspan)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"enable_lora": True}, "lora_config"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend"),
        ({"worker_cls": "somebody.Else"}, "worker_cls"),
        ({"attention_backend": "FLASHINFER"}, "attention_backend"),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, "compilation_config.cudagraph_mode"),
        ({"return_sampling_mask": True}, "return_sampling_mask"),
        ({"enable_trace_replay": True}, "enable_trace_replay"),
        ({"watermark_config": {"algorithm": "gumbel"}}, "watermark_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_vllm_offers_and_is_not_proven(models, triton, options, name):
    with pytest.raises(ConfigError, match=f"^{name}: got"):
        config(models["llama"], **options)


PLAIN = {
    "use_v2_model_runner": True,
    "compilation_config.mode": CompilationMode.VLLM_COMPILE,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.data_parallel_size": 1,
    "parallel_config.nnodes": 1,
    "parallel_config.enable_expert_parallel": False,
    "parallel_config.enable_eplb": False,
    "parallel_config.enable_dbo": False,
    "parallel_config.ubatch_size": 0,
    "parallel_config.enable_batch_sharded_sampling": None,
    "parallel_config.enable_fault_tolerance": False,
    "aux_output_config.enable_return_routed_experts": False,
    "speculative_config": None,
    "lora_config": None,
    "kv_transfer_config": None,
    "ec_transfer_config": None,
    "cache_config.cache_dtype": "auto",
    "cache_config.kv_sharing_fast_prefill": False,
    "model_config.model": "m",
    "model_config.dtype": torch.bfloat16,
    "model_config.enable_sleep_mode": False,
    "model_config.runner_type": "generate",
    "model_config.enable_prompt_embeds": False,
    "model_config.is_multimodal_model": False,
    "model_config.is_encoder_decoder": False,
    "model_config.use_mla": False,
    "model_config.is_moe": False,
    "model_config.is_hybrid": False,
    "model_config.has_inner_state": False,
    "model_config.uses_mrope": False,
    "model_config.attention_chunk_size": None,
    "model_config.get_sliding_window": lambda: None,
    "model_config.hf_text_config": SimpleNamespace(layer_types=None),
}
"""What `check_config` reads of a configuration that it accepts."""


def stub(**changed):
    """A VllmConfig of `PLAIN` with changes, where `__` stands for the dot."""
    found = SimpleNamespace()
    for path, value in {**PLAIN, **{name.replace("__", "."): value for name, value in changed.items()}}.items():
        *outer, name = path.split(".")
        for part in outer:
            found.__dict__.setdefault(part, SimpleNamespace())
        setattr(getattr(found, outer[0]) if outer else found, name, value)
    return found


def test_accepts_a_plain_configuration():
    check_config(stub())


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"use_v2_model_runner": False}, "model runner"),
        ({"compilation_config__mode": CompilationMode.STOCK_TORCH_COMPILE}, "compilation_config.mode"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size"),
        ({"parallel_config__nnodes": 2}, "nnodes"),
        ({"parallel_config__enable_expert_parallel": True}, "enable_expert_parallel"),
        ({"parallel_config__enable_eplb": True}, "enable_eplb"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"parallel_config__ubatch_size": 2}, "ubatch_size"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling"),
        ({"parallel_config__enable_fault_tolerance": True}, "enable_fault_tolerance"),
        ({"aux_output_config__enable_return_routed_experts": True}, "enable_return_routed_experts"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"ec_transfer_config": object()}, "ec_transfer_config"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"model_config__enable_sleep_mode": True}, "enable_sleep_mode"),
        ({"model_config__runner_type": "pooling"}, "runner"),
        ({"model_config__enable_prompt_embeds": True}, "enable_prompt_embeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_configurations(changed, what):
    with pytest.raises(ConfigError, match=f"^{what}: got"):
        check_config(stub(**changed))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model_config__is_multimodal_model": True}, "several modalities"),
        ({"model_config__is_encoder_decoder": True}, "encoder"),
        ({"model_config__use_mla": True}, "latent attention"),
        ({"model_config__is_moe": True}, "mixture of experts"),
        ({"model_config__is_hybrid": True}, "recurrent"),
        ({"model_config__has_inner_state": True}, "recurrent"),
        ({"model_config__uses_mrope": True}, "multimodal positions"),
        ({"model_config__attention_chunk_size": 64}, "chunked attention of 64"),
        ({"model_config__supports_kv_cache_grouping": True}, "groups of KV caches"),
        ({"model_config__get_sliding_window": lambda: 64}, "sliding window of 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_models(changed, what):
    with pytest.raises(UnsupportedModelError, match=f"{what}.*prefill_context_parallel_size"):
        check_config(stub(**changed))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 64}, "sliding window"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "x"}, "share"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"sinks": object()}, "sinks"),
    ],
)
def test_rejects_layers_that_need_more(options, what):
    with pytest.raises(UnsupportedModelError, match=what):
        RankedAttentionImpl(4, 32, 0.1, **options)


@pytest.mark.parametrize("cls", [ChunkedLocalAttention, RSWAAttention])
def test_rejects_subclasses_of_attention(cls):
    layer = cls.__new__(cls)  # as vLLM makes one, with our implementation inside: the mask is in the class
    layer.__dict__["impl"] = RankedAttentionImpl(4, 32, 0.1)
    with pytest.raises(UnsupportedModelError, match=cls.__name__):
        attention_layers({"model.layers.0.self_attn.attn": layer})


def test_accepts_plain_attention():
    layer = Attention.__new__(Attention)
    layer.__dict__["impl"] = RankedAttentionImpl(4, 32, 0.1)
    assert list(attention_layers({"a": layer, "experts": object()})) == ["a"]


STRIPING = Striping(StepGeometry.of_step_budget(2, 32, 512, 1024), 0)
SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def test_specs_keep_all_that_vllm_says():
    spec = FullAttentionSpec(**SIZES, head_size_v=64, page_size_padded=None, max_tp_shards=2)
    found = placed_spec("a", spec, STRIPING)
    assert isinstance(found, PlacedSpec)
    assert (found.striping, found.dcp_sharded, found.max_tp_shards) == (STRIPING, False, 2)
    assert found.page_size_bytes == spec.page_size_bytes


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(**SIZES, sliding_window=64),
        FullAttentionSpec(**SIZES, sliding_window=64),
        FullAttentionSpec(**SIZES, attention_chunk_size=64),
        FullAttentionSpec(**SIZES, non_causal=True),
    ],
)
def test_rejects_specs_of_other_attention(spec):
    with pytest.raises(UnsupportedModelError, match="layer a needs"):
        placed_spec("a", spec, STRIPING)


def test_the_backend_promises_no_more_than_is_proven():
    assert RankedBackend.supports_pcp()
    for name in ("sliding_window", "sink", "rswa", "mm_prefix", "non_causal", "batch_invariance", "kv_connector"):
        assert not getattr(RankedBackend, f"supports_{name}")(), name
    assert not RankedBackend.supports_attn_type("encoder_only")
    assert not RankedBackend.supports_kv_cache_dtype("fp8")
    assert not RankedBackend.supports_dcp()
