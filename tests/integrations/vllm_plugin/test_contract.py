"""Every field and method of vLLM that the plugin uses, by name: what fails here is what a new version has changed."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import vllm
import vllm.envs as envs
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    CompilationMode,
    LoRAConfig,
    ModelConfig,
    MultiModalConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.aux_output import AuxOutputConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.utils.cpu_resource_utils import LogicalCPUInfo, MemoryNodeInfo, get_allowed_cpu_list, get_memory_node_info
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    get_kv_quant_mode,
    is_quantized_kv_cache,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import WorkerBase

from longspan.integrations.vllm.free_queue import RankedFreeQueue
from longspan.integrations.vllm.worker import Worker
from longspan.kv.layout import KVSpec

MINOR = vllm.__version_tuple__[:2]

FIELDS = [
    (
        EngineArgs,
        [
            "additional_config",
            "worker_cls",
            "distributed_executor_backend",
            "return_sampling_mask",
            "enable_trace_replay",
            "async_scheduling",
            "attention_backend",
            "aux_output_config",
            "enforce_eager",
            "watermark_config",
        ],
    ),
    (AuxOutputConfig, ["enable_return_routed_experts"]),
    (
        VllmConfig,
        [
            "additional_config",
            "cache_config",
            "compilation_config",
            "ec_transfer_config",
            "kv_transfer_config",
            "lora_config",
            "model_config",
            "parallel_config",
            "reasoning_config",
            "scheduler_config",
            "speculative_config",
        ],
    ),
    (
        ParallelConfig,
        [
            "data_parallel_size",
            "enable_dbo",
            "ubatch_size",
            "decode_context_parallel_size",
            "disable_custom_all_reduce",
            "enable_expert_parallel",
            "nnodes",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
            "world_size",
        ],
    ),
    (
        ModelConfig,
        [
            "dtype",
            "enable_prompt_embeds",
            "enable_sleep_mode",
            "logits_processors",
            "logprobs_mode",
            "max_model_len",
            "model",
            "seed",
            "use_fp64_gumbel",
        ],
    ),
    (
        CacheConfig,
        [
            "block_size",
            "cache_dtype",
            "gpu_memory_utilization",
            "kv_cache_dtype_skip_layers",
            "kv_cache_memory_bytes",
        ],
    ),
    (LoRAConfig, ["fully_sharded_loras", "max_cpu_loras", "max_loras"]),
    (MultiModalConfig, ["language_model_only"]),
    (LoRAMapping, ["index_mapping", "prompt_mapping", "is_prefill"]),
    (SchedulerConfig, ["disable_hybrid_kv_cache_manager", "max_num_batched_tokens", "max_num_seqs"]),
    (CompilationConfig, ["mode", "static_forward_context"]),
    (
        SchedulerOutput,
        [
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "finished_req_ids",
            "kv_cache_block_copies",
            "new_block_ids_to_zero",
            "scheduled_spec_decode_tokens",
            "scheduled_encoder_inputs",
        ],
    ),
    (
        NewRequestData,
        [
            "req_id",
            "prompt_token_ids",
            "sampling_params",
            "block_ids",
            "num_computed_tokens",
            "prefill_token_ids",
            "lora_request",
        ],
    ),
    (
        CachedRequestData,
        ["req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens", "num_output_tokens"],
    ),
    (
        FullAttentionSpec,
        [
            "block_size",
            "num_kv_heads",
            "head_size",
            "head_size_v",
            "dtype",
            "kv_quant_mode",
            "state_content_bytes",
            "sliding_window",
            "attention_chunk_size",
            "non_causal",
            "dcp_sharded",
        ],
    ),
    (SlidingWindowSpec, ["block_size", "num_kv_heads", "head_size", "head_size_v", "dtype", "sliding_window"]),
    (KVCacheConfig, ["num_blocks", "kv_cache_groups"]),
    (ChunkedLocalAttentionSpec, ["block_size", "num_kv_heads", "head_size", "dtype", "attention_chunk_size"]),
    (KVCacheGroupSpec, ["layer_names"]),
    (
        ModelRunnerOutput,
        ["req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "prompt_logprobs_dict"],
    ),
    (LogicalCPUInfo, ["numa_node"]),
    (MemoryNodeInfo, ["total_memory", "available_memory"]),
    (SamplerOutput, ["sampled_token_ids", "logprobs_tensors"]),
    (
        CachedRequestState,
        [
            "req_id",
            "prompt_token_ids",
            "mm_features",
            "sampling_params",
            "generator",
            "block_ids",
            "num_computed_tokens",
            "output_token_ids",
        ],
    ),
]

PARAMETERS = [
    (EngineArgs.create_engine_config, ["self", "usage_context", "headless"]),
    (MultiprocExecutor._get_parallel_sizes, ["self"]),
    (MultiprocExecutor.execute_model, ["self", "scheduler_output", "non_block"]),
    (MultiprocExecutor._is_driver_worker, ["self", "rank"]),
    (MultiprocExecutor._get_output_rank, ["self"]),
    (FullAttentionManager.allocate_new_blocks, ["self", "request_id", "num_tokens", "num_tokens_main_model"]),
    (SlidingWindowManager.get_num_skipped_tokens, ["self", "num_computed_tokens"]),
    (SlidingWindowSpec.max_memory_usage_bytes, ["self", "vllm_config"]),
    (
        FullAttentionManager.get_num_blocks_to_allocate,
        [
            "self",
            "request_id",
            "num_tokens",
            "new_computed_blocks",
            "total_computed_tokens",
            "num_local_computed_tokens",
            "num_tokens_main_model",
            "apply_admission_cap",
            "prefill_end",
        ],
    ),
    (FullAttentionSpec.merge, ["specs"]),
    (Sampler.__init__, ["self", "logprobs_mode", "use_fp64_gumbel"]),
    (Sampler.compute_logprobs, ["logits"]),
    (Sampler.forward, ["self", "logits", "sampling_metadata", "predict_bonus_token", "logprobs_mode_override"]),
    (Sampler.gather_logprobs, ["logprobs", "num_logprobs", "token_ids"]),
    (InputBatch.add_request, ["self", "request"]),
    (InputBatch.remove_request, ["self", "req_id"]),
    (InputBatch.condense, ["self"]),
    (InputBatch.refresh_metadata, ["self"]),
    (LogprobsTensors.tolists, ["self", "cu_num_generated_tokens"]),
    (LogprobsTensors.empty_cpu, ["num_positions", "num_tokens_per_position"]),
    (
        WorkerBase.__init__,
        ["self", "vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker"],
    ),
    (WorkerBase.execute_model, ["self", "scheduler_output"]),
    (WorkerBase.sample_tokens, ["self", "grammar_output"]),
    (Attention.get_kv_cache_spec, ["self", "vllm_config"]),
    (
        AttentionImpl.__init__,
        [
            "self",
            "num_heads",
            "head_size",
            "scale",
            "num_kv_heads",
            "alibi_slopes",
            "sliding_window",
            "kv_cache_dtype",
            "logits_soft_cap",
            "attn_type",
            "kv_sharing_target_layer_name",
        ],
    ),
    (apply_grammar_bitmask, ["scheduler_output", "grammar_output", "input_batch", "logits"]),
    (build_logitsprocs, ["vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"]),
    (extract_layer_index, ["layer_name", "num_attn_module"]),
    (
        init_worker_distributed_environment,
        ["vllm_config", "rank", "distributed_init_method", "local_rank", "backend"],
    ),
    (register_backend, ["backend", "class_path", "is_mamba"]),
    (register_kv_cache_spec, ["manager_class", "uniform_type_base_spec"]),
    (replace_as, ["spec", "target_cls", "drop", "changes"]),
    (FullAttentionSpec.copy_with_new_block_size, ["self", "block_size"]),
    (set_random_seed, ["seed", "data_parallel_index"]),
    (get_kv_quant_mode, ["kv_cache_dtype"]),
    (is_quantized_kv_cache, ["kv_cache_dtype"]),
    (LRUCacheWorkerLoRAManager.__init__, ["self", "vllm_config", "device", "embedding_modules", "lora_model_cls"]),
    (LRUCacheWorkerLoRAManager.create_lora_manager, ["self", "model", "vllm_config"]),
    (LRUCacheWorkerLoRAManager.add_dummy_lora, ["self", "lora_request", "rank"]),
    (LRUCacheWorkerLoRAManager.set_active_adapters, ["self", "requests", "mapping"]),
    (LRUCacheWorkerLoRAManager.add_adapter, ["self", "lora_request"]),
    (LRUCacheWorkerLoRAManager.remove_adapter, ["self", "adapter_id"]),
    (LRUCacheWorkerLoRAManager.pin_adapter, ["self", "adapter_id"]),
    (LRUCacheWorkerLoRAManager.list_adapters, ["self"]),
    (get_memory_node_info, ["node_id"]),
    (get_allowed_cpu_list, []),
]

KEYWORDS = [
    (BlockPool.__init__, ["num_gpu_blocks", "enable_caching", "hash_block_size"]),
    (
        InputBatch.__init__,
        [
            "max_num_reqs",
            "max_model_len",
            "max_num_batched_tokens",
            "device",
            "vocab_size",
            "block_sizes",
            "max_num_blocks_per_req",
            "logitsprocs",
            "logitsprocs_need_output_token_ids",
            "reasoning_config",
        ],
    ),
    (get_model, ["vllm_config"]),
    (set_current_vllm_config, ["vllm_config"]),
    (set_forward_context, ["attn_metadata", "vllm_config", "num_tokens", "slot_mapping"]),
]
"""Some of the parameters of each."""

MEMBERS = [
    (VllmConfig, ["use_v2_model_runner"]),
    (ParallelConfig, ["local_world_size"]),
    (
        ModelConfig,
        [
            "get_hidden_size",
            "get_vocab_size",
            "has_inner_state",
            "is_encoder_decoder",
            "is_hybrid",
            "is_multimodal_model",
            "use_mla",
            "uses_mrope",
        ],
    ),
    (SamplingParams, ["prompt_logprobs", "sampling_type", "seed"]),
    (SamplingType, ["RANDOM_SEED"]),
    (CompilationMode, ["NONE", "STOCK_TORCH_COMPILE"]),
    (AttentionType, ["DECODER"]),
    (AttentionBackendEnum, ["CPU_ATTN"]),
    (
        CPUAttentionBackend,
        ["get_impl_cls", "forward_includes_kv_cache_update", "supports_kv_cache_dtype", "supports_sink"],
    ),
    (KVCacheBlock, ["block_id", "is_null"]),
    (envs, ["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_USE_V2_MODEL_RUNNER"]),
    (
        InputBatch(2, 64, 64, torch.device("cpu"), 512, [32], [1]),
        [
            "is_token_ids",
            "num_tokens_no_spec",
            "req_id_to_index",
            "req_ids",
            "sampling_metadata",
            "token_ids_cpu",
            "vocab_size",
        ],
    ),
    (BlockPool(4, False, 32), ["free_block_queue", "num_gpu_blocks"]),
]
"""Attributes of classes, modules and instances."""


@pytest.mark.parametrize(("cls", "names"), FIELDS, ids=lambda value: getattr(value, "__name__", ""))
def test_fields(cls, names):
    missing = set(names) - {f.name for f in dataclasses.fields(cls)}
    assert not missing, f"{cls.__name__} has no {missing} any more"


@pytest.mark.parametrize(("function", "names"), PARAMETERS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_parameters(function, names):
    assert list(inspect.signature(function).parameters) == names


@pytest.mark.parametrize(("function", "names"), KEYWORDS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_keywords(function, names):
    assert set(names) <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize(("owner", "names"), MEMBERS, ids=lambda value: getattr(value, "__name__", ""))
def test_members(owner, names):
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"{owner} has no {missing} any more"


def test_logprobs_begin_with_ids_values_and_ranks():
    assert LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")


def test_attention_layers_have_what_we_read():
    source = inspect.getsource(Attention.__init__)
    assert "sliding_window," in source, "the implementation learns of the layer's window"
    names = ("num_heads", "num_kv_heads", "head_size", "head_size_v", "impl", "layer_name")
    for name in (*names, "kv_cache_dtype", "kv_cache_torch_dtype"):
        assert f"self.{name} = " in source, name
    assert "self.attention_chunk_size = " in inspect.getsource(ChunkedLocalAttention.__init__)


def test_our_queue_has_all_that_vllm_asks_of_one():
    for name, method in inspect.getmembers(FreeKVCacheBlockQueue, inspect.isfunction):
        if name[0] != "_" and name != "iter_blocks_after":  # KV offloading, which is refused, has that one
            ours = inspect.signature(getattr(RankedFreeQueue, name))
            assert list(ours.parameters) == list(inspect.signature(method).parameters), name
    assert "num_free_blocks" in dir(RankedFreeQueue)
    assert "free_block_queue" in inspect.getsource(BlockPool.get_new_blocks)


def test_our_worker_implements_what_vllm_asks_of_one():
    for name, method in inspect.getmembers(WorkerBase, inspect.isfunction):
        if "raise NotImplementedError" in inspect.getsource(method) and name != "get_cache_block_size_bytes":
            assert getattr(Worker, name) is not method, f"WorkerBase.{name} is new"


def test_a_process_answers_only_where_it_is_asked_to():
    source = inspect.getsource(WorkerProc._execute_worker_rpc)
    assert "method, args, kwargs, output_rank = rpc_request" in source
    assert "if output_rank is None or self.rank == output_rank" in source
    sent = inspect.getsource(MultiprocExecutor.collective_rpc)
    assert "self.rpc_broadcast_mq.enqueue((send_method, args, kwargs, output_rank))" in sent
    assert "if self.is_failed" in sent


def test_a_worker_ends_at_sigterm_in_any_thread():
    source = inspect.getsource(WorkerProc.worker_main)
    assert "signal.signal(signal.SIGTERM, signal_handler)" in source
    assert "raise SystemExit()" in source


def test_a_step_is_sampled_after_it_has_begun():
    source = inspect.getsource(EngineCore.step)
    begin, wait, sample = (source.index(text) for text in (".execute_model(", ".result()", ".sample_tokens("))
    assert begin < wait < sample
    assert "if model_output is None" in source[wait:sample]


def test_an_adapter_for_warm_up_is_of_zeros():
    source = inspect.getsource(LoRALayerWeights.create_dummy_lora_weights)
    assert source.count("torch.zeros(") == 2


def test_every_way_to_free_a_request_takes_its_blocks_by_one_method():
    assert list(inspect.signature(SingleTypeKVCacheManager.pop_blocks_for_free).parameters) == ["self", "request_id"]
    assert "self.pop_blocks_for_free(request_id)" in inspect.getsource(SingleTypeKVCacheManager.free)
    assert "manager.pop_blocks_for_free(request_id)" in inspect.getsource(KVCacheCoordinator.pop_blocks_for_free)


def test_a_window_sees_its_own_token():
    manager = SlidingWindowManager.__new__(SlidingWindowManager)
    manager.sliding_window, manager.extra_retained_tokens = 4, 0
    assert manager.get_num_skipped_tokens(7) == KVSpec.uniform(1, 1, 1, "float32", 4).first_key(7)


def test_only_the_block_pool_and_kv_offloading_touch_the_free_queue():
    package = Path(vllm.__file__).parent
    users = {path.relative_to(package).as_posix() for path in package.rglob("v1/**/*.py") if _names_queue(path)}
    assert users == {"v1/core/block_pool.py", "v1/simple_kv_offload/manager.py"}


def _names_queue(path):
    return ".free_block_queue" in path.read_text()


def test_layouts_are_recorded_without_us():
    """We inherit it; 0.33 has one more parameter."""
    names = ["self", "kv_cache_layout", "cp_kv_cache_interleave_size"]
    found = list(inspect.signature(WorkerBase.set_kv_cache_layout).parameters)
    assert found == (names[:2] if MINOR == (0, 32) else names)


def test_blocks_are_zeroed_only_for_models_that_we_refuse():
    assert "return self.has_mamba_layers or self.has_mixed_precision_kv_cache" in inspect.getsource(
        KVCacheConfig.needs_kv_cache_zeroing.fget
    )


def test_the_v2_runner_has_the_seams_for_context_parallelism():
    """Read as text: importing it takes a GPU's packages."""
    worker = Path(vllm.__file__).parent / "v1/worker"
    for file, texts in {
        "gpu/model_runner.py": ["def pcp_manager_cls(self)", "cls=self.pcp_manager_cls,"],
        "gpu/pcp_manager.py": ["class PCPManager", "def _iter_rank_chunks(\n", "is_prefilling: np.ndarray,"],
        "gpu_worker.py": ["def _make_model_runner(self)"],
    }.items():
        source = (worker / file).read_text()
        for text in texts:
            assert text in source, f"{file} has no {text}"


def test_attention_layers_call_what_we_implement():
    assert list(inspect.signature(AttentionImpl.forward).parameters) == [
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ]
