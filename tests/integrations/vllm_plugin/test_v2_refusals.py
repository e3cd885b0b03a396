"""With `prefill_context_parallel_size`, what is not proven is refused before a worker starts, by the option's name."""

import pytest
import torch
from plain_config import stub
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm.placement import Striping
from longspan.integrations.vllm.plugin import register
from longspan.integrations.vllm.runner.backend import RankedAttentionImpl, RankedBackend
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
    with pytest.raises(ConfigError, match=r"^device: got cpu, legal .* CPUs need context_parallel_size under longspan"):
        config(models["llama"])


def test_rejects_other_devices():
    with pytest.raises(ConfigError, match=r"^device: got xpu, legal .* is cuda,"):
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
        ({"attention_backend": "FLASHINFER"}, "attention_backend"),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, "compilation_config.cudagraph_mode"),
        # what no worker supports: test_refusals.py has the list
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"enable_lora": True}, "lora_config"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"worker_cls": "somebody.Else"}, "worker_cls"),
        ({"enable_trace_replay": True}, "enable_trace_replay"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_vllm_offers_and_is_not_proven(models, triton, options, name):
    with pytest.raises(ConfigError, match=f"^{name}: got"):
        config(models["llama"], **options)


def test_accepts_a_plain_configuration():
    check_config(stub())


def test_rejects_a_choice_of_vllms_for_the_v1_runner():
    with pytest.raises(ConfigError, match=r"^model runner: got V1"):
        check_config(stub(use_v2_model_runner=False))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model_config__is_moe": True}, "mixture of experts"),
        ({"model_config__attention_chunk_size": 64}, "chunked attention of 64"),
        ({"model_config__get_sliding_window": lambda: 64}, "sliding window of 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_models(changed, what):
    with pytest.raises(UnsupportedModelError, match=f"{what}.*prefill_context_parallel_size"):
        check_config(stub(**changed))


@pytest.mark.parametrize(
    ("options", "what"), [({"sliding_window": 64}, "sliding window"), ({"sinks": object()}, "sinks")]
)
def test_rejects_layers_that_need_more(options, what):
    with pytest.raises(UnsupportedModelError, match=f"{what}.*prefill_context_parallel_size"):
        RankedAttentionImpl(4, 32, 0.1, **options)


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
