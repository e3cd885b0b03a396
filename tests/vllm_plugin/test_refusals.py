"""What does not work is refused before a worker starts, with the option's name."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl
from longspan.integrations.vllm.plugin import WORKER, register
from longspan.integrations.vllm.refusals import check_version


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
        ({"enable_lora": True}, "lora_config"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend"),
        ({"worker_cls": "somebody.Else"}, "worker_cls"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_vllm_offers_and_the_plugin_does_not(models, options, name):
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in options:
        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    with pytest.raises(ConfigError, match=name):
        config(models["llama"], {"context_parallel_size": 2}, **options)


def test_rejects_a_model_with_a_sliding_window(models, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("mistral", sliding_window=64, architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        config(str(tmp_path), {"context_parallel_size": 2}, skip_tokenizer_init=True)


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
        StepAttentionImpl(4, 32, 0.1, **options)


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.32.0", "dev"])
def test_rejects_versions_that_were_not_tested(version):
    with pytest.raises(ConfigError, match="0\\.32"):
        check_version(version)
