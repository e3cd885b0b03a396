"""The parts of the worker that only a GPU runs, with stand-ins for the GPU."""

from types import SimpleNamespace

import pytest
import torch
from plain_config import stub
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.runner import start, worker
from longspan.integrations.vllm.runner.flash import make_flash_kernels
from longspan.integrations.vllm.runner.kernels import TorchKernels
from longspan.integrations.vllm.runner.runner import make_kernels, warm_up_merge
from longspan.integrations.vllm.runner.start import WORKERS, create_owner_config
from longspan.integrations.vllm.runner.step import exchanged_bytes
from longspan.integrations.vllm.runner.worker import OwnerWorker


def arguments(**changed):
    """What is read of vLLM's arguments."""
    return SimpleNamespace(
        **{
            "additional_config": {"longspan": {}},
            "prefill_context_parallel_size": 2,
            "worker_cls": "auto",
            "distributed_executor_backend": None,
            "attention_backend": None,
            "return_sampling_mask": False,
            "enable_trace_replay": False,
            "aux_output_config": SimpleNamespace(enable_return_routed_experts=False),
            "watermark_config": None,
            "compilation_config": SimpleNamespace(cudagraph_mode=None),
            **changed,
        }
    )


def test_on_a_gpu_our_worker_and_attention_are_chosen(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(start, "current_platform", SimpleNamespace(device_type="cuda"))
    given, made = arguments(), []

    def original(ours, usage_context):
        made.append((ours, usage_context))
        return stub()

    create_owner_config(original, given, "llm")
    ((ours, context),) = made
    assert context == "llm"
    assert ours.worker_cls == WORKERS["cuda"]
    assert ours.distributed_executor_backend == "mp"
    assert ours.attention_backend == AttentionBackendEnum.CUSTOM
    assert (given.worker_cls, given.attention_backend) == ("auto", None), "the user's arguments are unchanged"


def test_a_gpu_without_flash_attention_is_refused(monkeypatch):
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **asked: None)
    with pytest.raises(UnsupportedModelError, match="no FlashAttention for heads of 80"):
        make_flash_kernels(80, has_softcap=False, device=torch.device("cpu"))


def test_kernels_of_a_gpu_are_vllms_in_the_version_that_it_names(monkeypatch):
    asked, called = [], []
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **named: asked.append(named) or 3)
    monkeypatch.setattr(
        fa_utils, "flash_attn_varlen_func", lambda **given: called.append(given) or (None, given["q"][..., 0]),
        raising=False,
    )  # fmt: skip
    monkeypatch.setattr(fa_utils, "reshape_and_cache_flash", lambda *given: called.append(given), raising=False)
    kernels = make_flash_kernels(16, has_softcap=True, device=torch.device("cpu"))
    assert asked == [{"head_size": 16, "requires_softcap": True}]
    cache = torch.zeros(3, 1, 16, 32)  # one KV head, as under tensor parallelism
    q = torch.zeros(2, 4, 16)
    call = SimpleNamespace(
        block_table=None, query_starts=None, key_lens=None, max_query_len=1, max_key_len=1, is_causal=True
    )
    kernels.attend(q, cache, call, SimpleNamespace(scale=0.5, softcap=None), q)
    assert called[0]["fa_version"] == 3
    assert called[0]["softcap"] == 0.0
    assert called[0]["k"].shape == (3, 16, 1, 16)
    kernels.store(q[:, :1], q[:, :1], cache, torch.zeros(2, dtype=torch.int64))
    assert called[1][5] == "auto"


def test_a_cpu_has_kernels_in_torch():
    impl = SimpleNamespace(num_heads=4, head_size=16, kernels=make_kernels(None, torch.device("cpu")))
    assert isinstance(impl.kernels, TorchKernels)
    warm_up_merge(impl, 3, torch.float32, torch.device("cpu"))


@pytest.fixture
def memory_of(monkeypatch):
    """Bytes that a worker reports, where vLLM finds `found`."""
    monkeypatch.setattr(worker, "warm_up", lambda group, device: None)
    monkeypatch.setattr(worker, "get_pcp_group", lambda: SimpleNamespace(device_group=None))
    layer = SimpleNamespace(impl=SimpleNamespace(num_heads=8, head_size=128))
    monkeypatch.setattr(worker, "attention_layers", lambda context: {"a": layer})

    def report(found, kv_cache_memory_bytes=None):
        monkeypatch.setattr(Worker, "determine_available_memory", lambda self: found)
        one = OwnerWorker.__new__(OwnerWorker)
        one.device = None
        one.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        one.parallel_config = SimpleNamespace(prefill_context_parallel_size=2)
        one.cache_config = SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes)
        one.model_config = SimpleNamespace(dtype=torch.bfloat16)
        one.scheduler_config = SimpleNamespace(max_num_batched_tokens=1024)
        return one.determine_available_memory()

    return report


def test_memory_is_that_of_all_ranks_less_what_exchanges_hold(memory_of):
    held = exchanged_bytes(2, 1024, 8 * 128 * 2)
    assert memory_of(1 << 30) == 2 * ((1 << 30) - held)
    assert memory_of(held - 1) == 0, "vLLM refuses this itself, on all ranks"


def test_the_users_bytes_are_taken_as_they_are(memory_of):
    assert memory_of(1 << 30, kv_cache_memory_bytes=1 << 30) == 2 << 30


def test_exchanges_hold_queries_and_partials_of_all_ranks():
    row = 32 * 128 * 2
    assert exchanged_bytes(8, 8192, row) == (3 * 8 + 4) * 8192 * row  # 1.9 GB
