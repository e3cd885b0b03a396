"""What does not work is refused before a worker starts, with the option's name; and how the CPU's worker is chosen."""

import os
import pickle
from types import SimpleNamespace

import pytest
from plain_config import stub
from vllm.config import CompilationMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import PrefillPrefixLMAttention
from vllm.model_executor.layers.attention.rswa_attention import RSWAAttention
from vllm.model_executor.layers.attention.static_sink_attention import StaticSinkAttention

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl
from longspan.integrations.vllm.layers import CLASSES
from longspan.integrations.vllm.plain_attention import attention_layers
from longspan.integrations.vllm.plugin import register
from longspan.integrations.vllm.refusals import check_config, check_version
from longspan.integrations.vllm.runner.backend import RankedAttentionImpl
from longspan.integrations.vllm.start import WORKER, check_lora, check_platform
from longspan.integrations.vllm.stored import STORED_AS


def config(model, longspan=None, **options):
    register()
    given = {} if longspan is None else {"longspan": longspan}
    arguments = EngineArgs(model=model, dtype="float32", max_model_len=512, additional_config=given, **options)
    return arguments.create_engine_config()


def test_without_the_key_nothing_changes(models):
    found = config(models["llama"])
    assert "longspan" not in found.parallel_config.worker_cls
    assert not found.model_config.enforce_eager


def test_the_key_alone_selects_everything(models):
    found = config(models["llama"], {"context_parallel_size": 2})
    assert found.parallel_config.worker_cls == WORKER
    assert found.parallel_config.distributed_executor_backend.__name__ == "ContextParallelExecutor"
    assert found.parallel_config.tensor_parallel_size == 1
    assert not found.model_config.enforce_eager, "vLLM compiles the model as it does without us"
    assert not found.use_v2_model_runner, "vLLM itself refuses requests that need its V2 runner"


def test_another_engine_of_the_process_keeps_the_runner_that_vllm_chooses(models, monkeypatch):
    before = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    ours = config(models["llama"], {"context_parallel_size": 2})
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == before
    stock = config(models["llama"])
    # from here on as vLLM where Triton is installed: V2 unless the variable says otherwise
    chosen = property(lambda self: os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") == "1")
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", chosen)
    assert stock.use_v2_model_runner
    assert not ours.use_v2_model_runner
    assert not pickle.loads(pickle.dumps(ours)).use_v2_model_runner, "in the engine core, and in workers"
    ours.__post_init__()  # as the engine core does
    assert not ours.use_v2_model_runner


@pytest.mark.parametrize(
    ("longspan", "name"),
    [
        ({}, "context_parallel_size"),
        ({"context_parallel_size": 0}, "context_parallel_size"),
        ({"context_parallel_size": True}, "context_parallel_size"),
        ({"context_parallel_size": 2, "ranks": 3}, "ranks"),
        ({"context_parallel_size": 2, "strategy": "ring"}, "strategy"),
        ({"context_parallel_size": 2, "placement": "spill"}, "placement"),
        ([2], "longspan"),
    ],
)
def test_rejects_options(models, longspan, name):
    with pytest.raises(ConfigError, match=name):
        config(models["llama"], longspan)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"enable_lora": True, "fully_sharded_loras": True}, "fully_sharded_loras"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: got fp8, .* auto or bfloat16 or int8_per_token_head or fp8_"),
        ({"kv_cache_dtype": "int4_per_token_head"}, "kv_cache_dtype"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend"),
        ({"worker_cls": "somebody.Else"}, "worker_cls"),
        ({"worker_cls": "somebody.longspan.Else"}, "worker_cls"),
        ({"return_sampling_mask": True}, "return_sampling_mask"),
        ({"enable_trace_replay": True}, "enable_trace_replay"),
        ({"enable_return_routed_experts": True}, "enable_return_routed_experts"),
        ({"watermark_config": {"algorithm": "gumbel"}}, "watermark_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_vllm_offers_and_the_plugin_does_not(models, options, name):
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in options:
        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    with pytest.raises(ConfigError, match=name):
        config(models["llama"], {"context_parallel_size": 2}, **options)


def test_rejects_gpus_and_names_the_option_that_chooses_their_worker():
    check_platform("cpu")
    with pytest.raises(ConfigError, match=r"^device: got cuda, legal .* --prefill-context-parallel-size"):
        check_platform("cuda")


def test_rejects_the_v2_runner(models, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER"):
        config(models["llama"], {"context_parallel_size": 2})


def test_accepts_a_plain_configuration():
    check_config(stub())


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"compilation_config__mode": CompilationMode.STOCK_TORCH_COMPILE}, "compilation_config.mode"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size"),
        ({"parallel_config__nnodes": 2}, "nnodes"),
        ({"parallel_config__enable_expert_parallel": True}, "enable_expert_parallel"),
        ({"parallel_config__enable_eplb": True}, "enable_eplb"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling"),
        ({"parallel_config__enable_fault_tolerance": True}, "enable_fault_tolerance"),
        ({"parallel_config__ubatch_size": 2}, "ubatch_size"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"lora_config": object()}, "lora_config"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"ec_transfer_config": object()}, "ec_transfer_config"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"cache_config__cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
        ({"cache_config__kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"model_config__enable_sleep_mode": True}, "enable_sleep_mode"),
        ({"model_config__runner_type": "pooling"}, "runner"),
        ({"model_config__enable_prompt_embeds": True}, "enable_prompt_embeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_configurations(changed, what):
    with pytest.raises(ConfigError, match=f"^{what}: "):
        check_config(stub(**changed))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model_config__is_multimodal_model": True}, "several modalities"),
        ({"model_config__use_mla": True}, "latent attention"),
        ({"model_config__uses_mrope": True}, "multimodal positions"),
        ({"model_config__is_encoder_decoder": True}, "encoder"),
        ({"model_config__is_hybrid": True}, "recurrent"),
        ({"model_config__has_inner_state": True}, "recurrent"),
        ({"model_config__supports_kv_cache_grouping": True}, "groups of KV caches"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_models(changed, what):
    with pytest.raises(UnsupportedModelError, match=what):
        check_config(stub(**changed))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "x"}, "share"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"chunk_lookback": 1}, "chunk_lookback"),
    ],
)
@pytest.mark.parametrize("impl", [StepAttentionImpl, RankedAttentionImpl])
def test_rejects_layers_that_need_more(impl, options, what):
    with pytest.raises(UnsupportedModelError, match=what):
        impl(4, 32, 0.1, **options)


@pytest.mark.parametrize(
    ("kind", "architecture", "fields"),
    [
        ("mistral", "MistralForCausalLM", {"sliding_window": 64}),
        ("llama4_text", "Llama4ForCausalLM", {"attention_chunk_size": 64}),
    ],
)
def test_accepts_windows_and_chunks(tmp_path, kind, architecture, fields):
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **fields, architectures=[architecture]).save_pretrained(tmp_path)
    found = config(str(tmp_path), {"context_parallel_size": 2}, skip_tokenizer_init=True)
    assert found.parallel_config.worker_cls == WORKER


def test_accepts_smaller_keys_and_values_and_adapters_that_the_worker_has():
    check_config(stub(cache_config__cache_dtype="int8_per_token_head"), STORED_AS.keys())
    check_config(stub(lora_config=object()), has_lora=True)


def test_accepts_the_text_part_of_a_model_only_where_the_user_asks_for_it():
    modalities = {"model_config__is_multimodal_model": True}
    text = {**modalities, "model_config__multimodal_config": SimpleNamespace(language_model_only=True)}
    check_config(stub(**text), has_text_parts=True)
    with pytest.raises(UnsupportedModelError, match="several modalities, which"):
        check_config(stub(**text))
    with pytest.raises(UnsupportedModelError, match="several modalities without language_model_only, which"):
        check_config(stub(**modalities), has_text_parts=True)


def test_rejects_adapters_of_experts():
    adapters = SimpleNamespace(fully_sharded_loras=False)
    check_lora(stub(lora_config=adapters))
    with pytest.raises(UnsupportedModelError, match="experts, legal with enable_lora"):
        check_lora(stub(lora_config=adapters, model_config__is_moe=True))


def test_names_only_what_a_layer_needs():
    with pytest.raises(UnsupportedModelError) as raised:
        StepAttentionImpl(4, 32, 0.1, chunk_lookback=1, mystery=None)
    assert "chunk_lookback" in str(raised.value)
    assert "mystery" not in str(raised.value)


def layer_of(cls, impl=None):
    """A layer as vLLM makes one, with our implementation inside: the mask is in the class."""
    layer = cls.__new__(cls)
    layer.__dict__["impl"] = impl or StepAttentionImpl(4, 32, 0.1)
    return layer


@pytest.mark.parametrize(
    ("cls", "classes"),
    [
        (PrefillPrefixLMAttention, CLASSES),
        (RSWAAttention, CLASSES),
        (StaticSinkAttention, CLASSES),
        (ChunkedLocalAttention, (Attention,)),
    ],
)
def test_rejects_subclasses_of_attention(cls, classes):
    with pytest.raises(UnsupportedModelError, match=cls.__name__):
        attention_layers({"model.layers.0.self_attn.attn": layer_of(cls)}, classes)


def test_rejects_layers_of_other_backends():
    with pytest.raises(UnsupportedModelError, match=r"layer layers\.0\.attn is Attention"):
        attention_layers({"layers.0.attn": layer_of(Attention, impl=object())})


def test_finds_plain_layers_in_their_order():
    names = ["layers.10.attn", "layers.9.attn"]
    assert list(attention_layers({**{name: layer_of(Attention) for name in names}, "experts": object()})) == names[::-1]


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.32.0", "dev"])
def test_rejects_versions_that_were_not_tested(version):
    with pytest.raises(ConfigError, match="0\\.32, 0\\.33"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1+cpu"])
def test_accepts_versions_that_were_tested(version):
    check_version(version)
