"""What the worker on vLLM's V2 model runner uses of vLLM: what fails here is what a new version has changed."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import vllm
from vllm import _custom_ops
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.utils.torch_utils import async_tensor_h2d, canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import pcp_manager
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner
from vllm.v1.worker.gpu.pcp_manager import PCPManager
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import AttentionGroup

from longspan.integrations.vllm.runner.manager import OwnerManager
from longspan.integrations.vllm.runner.runner import OwnerRunner, local_kv_cache_config

FIELDS = [
    (
        SchedulerOutput,
        [
            "finished_req_ids",
            "kv_cache_block_copies",
            "new_block_ids_to_zero",
            "preempted_req_ids",
            "scheduled_cached_reqs",
            "scheduled_new_reqs",
            "scheduled_spec_decode_tokens",
        ],
    ),
    (NewRequestData, ["req_id", "block_ids"]),
    (CachedRequestData, ["req_ids", "new_block_ids", "resumed_req_ids"]),
    (KVCacheConfig, ["num_blocks", "kv_cache_tensors", "kv_cache_groups"]),
    (KVCacheTensor, ["size", "layers", "layer_stride", "block_stride", "offset"]),
    (FullAttentionSpec, ["dcp_sharded", "sliding_window", "attention_chunk_size", "non_causal"]),
]
PARAMETERS = [
    (GPUModelRunner.initialize_kv_cache, ["self", "kv_cache_config"]),
    (GPUModelRunner.finish_requests, ["self", "scheduler_output"]),
    (GPUModelRunner.add_requests, ["self", "scheduler_output"]),
    (GPUModelRunner.update_requests, ["self", "scheduler_output"]),
    (GPUModelRunner.gather_batch_req_state, ["self", "scheduler_output", "dummy_run"]),
    (PCPManager.validate_config, ["vllm_config", "supports_mm_inputs"]),
    (PCPManager.replicated_requests, ["self", "num_scheduled_tokens", "is_prefilling"]),
    (PCPManager._iter_rank_chunks, ["self", "rank", "num_scheduled_tokens", "is_prefilling"]),
    (PCPManager.prepare_attn, ["self", "input_batch"]),
    (PCPManager.get_dummy_block_tables, ["self", "num_reqs"]),
    (PCPManager.get_dummy_slot_mappings, ["self", "num_tokens"]),
    (AttentionMetadataBuilder.build, ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]),
    (AttentionGroup.get_metadata_builder, ["self", "ubatch_id"]),
    (async_tensor_h2d, ["data", "device"]),
    (canonicalize_singleton_dim_strides, ["t"]),
    (
        _custom_ops.reshape_and_cache_flash,
        ["key", "value", "key_cache", "value_cache", "slot_mapping", "kv_cache_dtype", "k_scale", "v_scale"],
    ),
]
"""The first parameters of each."""


@pytest.mark.parametrize(("cls", "names"), FIELDS, ids=lambda value: getattr(value, "__name__", ""))
def test_fields(cls, names):
    missing = set(names) - {f.name for f in dataclasses.fields(cls)}
    assert not missing, f"{cls.__name__} has no {missing} any more"


@pytest.mark.parametrize(("function", "names"), PARAMETERS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_parameters(function, names):
    assert list(inspect.signature(function).parameters)[: len(names)] == names


def test_members():
    assert AttentionCGSupport.NEVER.value < AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value
    assert AttentionBackendEnum.CUSTOM.name == "CUSTOM"
    assert hasattr(AttentionImpl, "supports_pcp")
    assert isinstance(GPUModelRunner.pcp_manager_cls, property)
    assert {"req_ids", "num_scheduled_tokens", "idx_mapping_np", "is_prefilling_np"} <= set(BatchReqState._fields)
    assert "self.device_group = " in inspect.getsource(GroupCoordinator.__init__)
    assert {"head_size", "requires_softcap"} <= inspect.signature(fa_utils.get_flash_attn_version).parameters.keys()


def test_a_worker_leaves_the_runner_to_its_subclasses():
    assert "self._make_model_runner()" in inspect.getsource(Worker._init_workspace_and_model_runner)
    assert "self._init_workspace_and_model_runner()" in inspect.getsource(Worker.init_device)
    source = inspect.getsource(CPUWorker.init_device)
    assert "from vllm.v1.worker.cpu.model_runner import (" in source, "the CPU worker looks it up when it starts"
    assert issubclass(CPUModelRunner, GPUModelRunner)


def test_a_step_asks_in_our_order():
    source = inspect.getsource(GPUModelRunner.execute_model)
    places = [
        source.index(text)
        for text in (
            "self.finish_requests(scheduler_output)",
            "self.add_requests(scheduler_output)",
            "self.update_requests(scheduler_output)",
            "self.gather_batch_req_state(",
            "self.pcp_manager.get_num_tokens_for_dispatch(",
            "self.prepare_inputs(",
            "self.prepare_attn(input_batch)",
            "self.prepare_dummy_attn(",
            "self.model_state.prepare_attn(",
        )
    ]
    assert places == sorted(places)
    assert "self.pcp_manager.partition_batch(" in inspect.getsource(GPUModelRunner.prepare_inputs)
    assert "self.pcp_manager.prepare_attn(" in inspect.getsource(GPUModelRunner.prepare_attn)
    dummy = inspect.getsource(GPUModelRunner.prepare_dummy_attn)
    assert "self.pcp_manager or self.block_tables" in dummy
    assert "restore_for_sampling(" in inspect.getsource(GPUModelRunner.sample_tokens)


def test_vllm_orders_a_ranks_rows_as_we_do():
    source = inspect.getsource(PCPManager._reorder_segments)
    key = source[source.index("return (") :]
    assert key.index("is_prefilling[req_idx]") < key.index("req_idx,") < key.index("global_batch_slice.start")


def test_the_manager_gets_what_it_needs():
    source = inspect.getsource(pcp_manager.maybe_build_pcp_manager)
    for name in ("max_num_reqs=", "max_num_tokens=", "cls.validate_config("):
        assert name in source, name
    has_setter = hasattr(PCPManager, "set_block_tables")
    assert has_setter or "block_tables=block_tables," in source, "block tables come by one of two ways, or by both"
    made = inspect.getsource(PCPManager)
    assert "2 * max_num_reqs" in made, "vLLM doubles the number of rows' requests"
    for name in ("pcp_rank", "pcp_world_size", "device"):
        assert f"self.{name} = " in made, name
    kernel = inspect.getsource(BlockTables.__init__)
    for name in ("self.block_sizes", "self.block_tables", "StagedWriteTensor"):
        assert name in kernel, name


def test_our_overrides_exist_in_vllm():
    for ours, theirs in ((OwnerManager, PCPManager), (OwnerRunner, GPUModelRunner)):
        own = {"begin", "_placeholders", "_upload"} | ({"set_block_tables"} - set(dir(theirs)))
        for name, member in vars(ours).items():
            if callable(member) or isinstance(member, (staticmethod, property)):
                assert name in own or hasattr(theirs, name), f"{theirs.__name__}.{name} is gone"


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_one_ranks_share_is_laid_out_as_vllm_would(layout, num_ranks):
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    layers = ["a", "b", "c"]

    def config(num_blocks):
        layer_stride, block_stride, *_ = compute_layout_strides(spec, num_blocks, len(layers), layout)
        size = num_blocks * len(layers) * spec.page_size_bytes
        tensor = KVCacheTensor(size, layers, layer_stride, block_stride)
        return KVCacheConfig(num_blocks, [tensor], [KVCacheGroupSpec(layers, spec)])

    assert local_kv_cache_config(config(100), num_ranks) == config(-(-100 // num_ranks))


def test_graphs_are_piecewise_where_attention_is_in_none():
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    config.splitting_ops = list(config._attention_ops)
    found = config.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.NEVER, "LONGSPAN", use_v2_model_runner=True)
    assert found == CUDAGraphMode.PIECEWISE


def test_kv_memory_is_head_major_and_holds_keys_then_values():
    for method in (FlashAttentionImpl.forward, FlashAttentionImpl.do_kv_cache_update):
        assert "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in inspect.getsource(method)


def test_flash_attention_takes_what_we_give():
    source = (Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    (function,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    names = {argument.arg for argument in function.args.args}
    assert {
        "q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k", "block_table",
        "softmax_scale", "softcap", "causal", "return_softmax_lse", "fa_version",
    } <= names  # fmt: skip
