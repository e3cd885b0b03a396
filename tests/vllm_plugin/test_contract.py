"""Every field and method of vLLM that the plugin uses, by name: what fails here is what a new version has changed."""

import dataclasses
import inspect

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.worker_base import WorkerBase

from longspan.integrations.vllm.spec import RankedFreeQueue
from longspan.integrations.vllm.worker import Worker

FIELDS = [
    (EngineArgs, ["additional_config", "worker_cls", "distributed_executor_backend", "enforce_eager"]),
    (
        SchedulerOutput,
        [
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "finished_req_ids",
            "kv_cache_block_copies",
            "scheduled_spec_decode_tokens",
            "scheduled_encoder_inputs",
        ],
    ),
    (
        NewRequestData,
        ["req_id", "prompt_token_ids", "sampling_params", "block_ids", "num_computed_tokens", "prefill_token_ids"],
    ),
    (
        CachedRequestData,
        ["req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens", "num_output_tokens"],
    ),
    (
        FullAttentionSpec,
        ["block_size", "num_kv_heads", "head_size", "head_size_v", "dtype", "sliding_window", "dcp_sharded"],
    ),
    (KVCacheConfig, ["num_blocks", "kv_cache_groups"]),
    (
        ModelRunnerOutput,
        ["req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "prompt_logprobs_dict"],
    ),
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
    (MultiprocExecutor._is_driver_worker, ["self", "rank"]),
    (MultiprocExecutor._get_output_rank, ["self"]),
    (FullAttentionManager.allocate_new_blocks, ["self", "request_id", "num_tokens", "num_tokens_main_model"]),
    (FullAttentionManager.free, ["self", "request_id"]),
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
    (Sampler.forward, ["self", "logits", "sampling_metadata", "predict_bonus_token", "logprobs_mode_override"]),
    (Sampler.gather_logprobs, ["logprobs", "num_logprobs", "token_ids"]),
    (InputBatch.add_request, ["self", "request"]),
    (InputBatch.remove_request, ["self", "req_id"]),
    (InputBatch.condense, ["self"]),
    (InputBatch.refresh_metadata, ["self"]),
    (LogprobsTensors.empty_cpu, ["num_positions", "num_tokens_per_position"]),
    (WorkerBase.execute_model, ["self", "scheduler_output"]),
    (WorkerBase.sample_tokens, ["self", "grammar_output"]),
]


@pytest.mark.parametrize(("cls", "names"), FIELDS, ids=lambda value: getattr(value, "__name__", ""))
def test_fields(cls, names):
    missing = set(names) - {f.name for f in dataclasses.fields(cls)}
    assert not missing, f"{cls.__name__} has no {missing} any more"


@pytest.mark.parametrize(("function", "names"), PARAMETERS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_parameters(function, names):
    assert list(inspect.signature(function).parameters) == names


def test_our_queue_has_all_that_vllm_asks_of_one():
    theirs = {name for name, _ in inspect.getmembers(FreeKVCacheBlockQueue, inspect.isfunction) if name[0] != "_"}
    assert theirs - {"iter_blocks_after"} <= set(dir(RankedFreeQueue))  # KV offloading, which is refused, has that one
    assert "num_free_blocks" in dir(RankedFreeQueue)
    assert "free_block_queue" in inspect.getsource(BlockPool.get_new_blocks)


def test_our_worker_implements_what_vllm_asks_of_one():
    optional = {"pin_lora", "remove_lora", "list_loras", "get_cache_block_size_bytes"}
    for name, method in inspect.getmembers(WorkerBase, inspect.isfunction):
        if "raise NotImplementedError" in inspect.getsource(method) and name not in optional:
            assert name in vars(Worker), f"WorkerBase.{name} is new"


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
