"""What a worker and the block manager decide, without an engine."""

import os
import signal
from contextlib import contextmanager
from functools import partial
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from vllm.config import CompilationMode
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.utils.cpu_resource_utils import MemoryNodeInfo
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from longspan.attention.select import make_backend
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.costmodel.choose import plan_group
from longspan.costmodel.parameters import costs_by_bytes
from longspan.cp.eager import EagerStepAttention
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm import memory
from longspan.integrations.vllm import rank_model as rank_model_module
from longspan.integrations.vllm.backend import StepAttentionImpl, StepMetadata, WarmUp
from longspan.integrations.vllm.costs import agree_on_costs
from longspan.integrations.vllm.exchange import StepExchange
from longspan.integrations.vllm.executor import ContextParallelExecutor
from longspan.integrations.vllm.failure import telling_peers
from longspan.integrations.vllm.memory import common_kv_bytes, local_kv_bytes
from longspan.integrations.vllm.options import Options
from longspan.integrations.vllm.placement import Striping, block_rank, choose_home
from longspan.integrations.vllm.planning import Row
from longspan.integrations.vllm.rank_model import RankModel
from longspan.integrations.vllm.spec import PlacedSpec, PlacedWindowSpec, PlacingManager
from longspan.integrations.vllm.worker import Worker
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.pool import PagePool
from longspan.plan.build import RequestStep, build_plan
from longspan.plan.types import SampleRow
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.pages import PageTable
from longspan.types import AttentionParams, Strategy

STRIPING = Striping(StepGeometry(num_ranks=2, page_size=32, stripe_len=128, chunk_len=256), min_striped_blocks=16)
SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "head_size_v": 32, "dtype": torch.float32}


class Layer:
    """An attention layer of vLLM's."""

    num_heads, num_kv_heads, head_size, head_size_v = 4, 2, 32, 32
    kv_cache_dtype, kv_cache_torch_dtype = "auto", torch.float32
    impl = SimpleNamespace(scale=0.1, softcap=None, window=None)

    def __init__(self, **more):
        self.more = more

    def get_kv_cache_spec(self, vllm_config):
        return FullAttentionSpec(**SHAPE, **self.more)


def rank_model(*layers, module=None, mode=CompilationMode.NONE, is_one_table=False):
    """A loaded model with these layers."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=32),
        compilation_config=SimpleNamespace(mode=mode),
        model_config=SimpleNamespace(dtype=torch.float32),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=is_one_table),
    )
    return RankModel(module, {f"attn{i}": layer for i, layer in enumerate(layers)}, config)


def cache_config(share):
    return SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=share)


@pytest.mark.parametrize("more", [{}, {"sliding_window": 64}, {"attention_chunk_size": 64}, {"non_causal": True}])
def test_only_layers_with_plain_full_attention_are_placed(more):
    model = rank_model(Layer(**more))
    if more:
        with pytest.raises(UnsupportedModelError, match="layer attn0"):
            model.kv_cache_spec(STRIPING)
    else:
        assert model.kv_cache_spec(STRIPING) == {"attn0": PlacedSpec(**SHAPE, striping=STRIPING)}


class WindowLayer(Layer):
    """An attention layer with a sliding window."""

    impl = SimpleNamespace(scale=0.1, softcap=None, window=64)

    def get_kv_cache_spec(self, vllm_config):
        return SlidingWindowSpec(**{**SHAPE, "block_size": 16, **self.more}, sliding_window=64)


def test_layers_with_windows_get_tables_of_their_own_where_vllm_has_them():
    window = {**SHAPE, "sliding_window": 64, "striping": STRIPING}
    assert rank_model(Layer(), WindowLayer()).kv_cache_spec(STRIPING) == {
        "attn0": PlacedSpec(**SHAPE, striping=STRIPING, spare_blocks=2),
        "attn1": PlacedWindowSpec(**window, spare_blocks=2),
    }
    assert rank_model(WindowLayer()).kv_cache_spec(STRIPING) == {"attn0": PlacedWindowSpec(**window)}
    one = rank_model(Layer(), WindowLayer(), is_one_table=True).kv_cache_spec(STRIPING)
    assert set(one.values()) == {PlacedSpec(**SHAPE, striping=STRIPING)}
    chunked = ChunkedLocalAttention.__new__(ChunkedLocalAttention)
    shape = {name: getattr(Layer, name) for name in ("num_heads", "num_kv_heads", "head_size", "head_size_v", "impl")}
    chunked.__dict__.update(shape, attention_chunk_size=64, kv_cache_dtype="auto", kv_cache_torch_dtype=torch.float32)
    one = rank_model(Layer(), chunked).kv_cache_spec(STRIPING)
    assert set(one.values()) == {PlacedSpec(**SHAPE, striping=STRIPING)}, "vLLM frees no chunks by default"
    with pytest.raises(UnsupportedModelError, match="layer attn0"):
        rank_model(WindowLayer(page_size_padded=1 << 20)).kv_cache_spec(STRIPING)


def test_layers_are_divided_by_vllms_block_tables():
    model = rank_model(Layer(), WindowLayer(), WindowLayer())
    assert model.groups([["attn0"], ["attn1", "attn2"]]).num_tables == 2
    found = model.groups([["attn0"], ["attn1"], ["attn2"]])
    assert (found.num_tables, [group.layers for group in found.groups]) == (3, [(0,), (1,), (2,)])


def test_vllm_is_told_what_the_longest_request_takes():
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=640),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=64,
    )
    for spec in (PlacedSpec, partial(PlacedWindowSpec, sliding_window=64)):
        plain, spare = (spec(**SHAPE, striping=STRIPING, spare_blocks=n) for n in (0, 2))
        more = spare.max_memory_usage_bytes(config) - plain.max_memory_usage_bytes(config)
        assert more == 2 * plain.page_size_bytes


def test_all_ranks_refuse_where_one_has_no_memory(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda blocks, op: blocks.zero_())  # another rank's 0
    monkeypatch.setattr(dist, "all_gather_object", lambda nodes, node: nodes.__setitem__(slice(None), [node] * 2))
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        common_kv_bytes(cache_config(0.5), 2, 1 << 16)


def test_a_rank_without_memory_says_zero():
    assert local_kv_bytes(cache_config(1e-9), 2, 0) == 0


def test_processes_of_one_memory_node_divide_its_memory(monkeypatch):
    """Of four processes, two are on this one's node, which has 1,000 GiB in its container; half of them are free."""
    shared = []

    def gather(nodes, node):
        nodes[:] = [node, node + 1, node, node + 1]

    def share(config, num_sharing, node_id):
        shared.append(num_sharing)
        return 64

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda blocks, op: None)
    monkeypatch.setattr(memory, "local_kv_bytes", share)
    assert common_kv_bytes(cache_config(0.5), 4, 16) == 64
    assert shared == [2]
    monkeypatch.undo()
    node = MemoryNodeInfo(total_memory=1000 << 30, available_memory=500 << 30)
    monkeypatch.setattr(memory, "get_memory_node_info", lambda node_id: node)
    assert local_kv_bytes(cache_config(1.0), 2, 0) == 250 << 30
    assert 50 << 30 < local_kv_bytes(cache_config(0.2), 2, 0) < 100 << 30, "its own memory counts"


def test_other_processes_than_the_first_end_where_they_fail(monkeypatch):
    closed, sent = [], []
    comm = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(os, "kill", lambda process, signal: sent.append((process, signal)))
    for process in (1, 0):
        with pytest.raises(ValueError, match="reason"), telling_peers(comm, process):
            raise ValueError("reason")
    assert closed == [True, True]
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize(
    "asked",
    [
        [(640, 0), (256, 0)],  # admission, then the first chunk
        [(256, 640)],
    ],
)
def test_a_prompt_is_placed_by_its_whole_length_however_vllm_asks(asked):
    pool = BlockPool(400, False, 32)
    manager = PlacingManager(PlacedSpec(**SHAPE, striping=STRIPING), pool, False, 0, 32)
    for num_tokens, prefill_end in asked:
        manager.get_num_blocks_to_allocate("a", num_tokens, [], 0, 0, num_tokens, prefill_end=prefill_end)
    blocks = manager.allocate_new_blocks("a", 256, 256)
    ranks = [block_rank(block.block_id, 400, 2)[0] for block in blocks]
    assert ranks == [0] * 4 + [1] * 4, "a prompt of 20 blocks is striped, one of 8 would be packed"


def test_specs_with_unlike_striping_are_not_merged():
    one, other = PlacedSpec(**SHAPE, striping=STRIPING), PlacedSpec(**SHAPE, striping=None)
    assert PlacedSpec.merge([one, one]) == one
    with pytest.raises(AssertionError, match="striping"):
        PlacedSpec.merge([one, other])


@pytest.mark.parametrize(
    ("room", "last_rank", "home"),
    [
        ((9, 10), None, 0),  # of an idle engine: rank 0 lacks the null block
        ((8, 10), None, 1),
        ((9, 10, 10), None, 0),
        ((5, 9, 9), None, 1),
        ((9, 10), 1, 1),
        ((10, 4), 1, 0),  # no room behind the cached block
    ],
)
def test_a_lone_request_is_at_home_on_the_rank_that_samples(room, last_rank, home):
    assert choose_home(room, last_rank, needed=4) == home


def step(num_tokens):
    return SimpleNamespace(total_num_scheduled_tokens=num_tokens)


def test_a_step_begins_without_an_answer_from_anybody():
    sent = []
    executor = ContextParallelExecutor.__new__(ContextParallelExecutor)
    executor.is_failed, executor.rpc_broadcast_mq = False, SimpleNamespace(enqueue=sent.append)
    assert executor.execute_model(step(3), non_block=True).result() is None
    ((method, (sent_step,), _, answering),) = sent
    assert (method, sent_step.total_num_scheduled_tokens) == ("begin_step", 3)
    assert answering is not None, "None: all answer"
    assert answering not in range(128)
    executor.is_failed = True
    with pytest.raises(RuntimeError):
        executor.execute_model(step(3))


def test_what_fails_in_a_step_is_raised_where_it_ends(monkeypatch):
    def fail(worker, scheduler_output):
        raise ValueError("of the step")

    monkeypatch.setattr(Worker, "execute_model", fail)
    worker = Worker.__new__(Worker)
    worker.begin_step(step(1))
    with pytest.raises(ValueError, match="of the step"):
        worker.sample_tokens(None)


def test_sampled_tokens_are_taken_in_with_the_next_step():
    written = []
    state = SimpleNamespace(output_token_ids=[4])

    def exchange(sends, recvs):
        ((peer, tokens),) = recvs
        assert (sends, peer) == ([], 0)
        return SimpleNamespace(wait=lambda: written.append(tokens.fill_(7)))

    found = StepExchange(SimpleNamespace(exchange=exchange))
    found.expect_tokens([state])
    assert not written, "nobody waits at the end of a step"
    found.hear_tokens()
    found.hear_tokens()
    assert (len(written), state.output_token_ids) == (1, [4, 7])


def test_hidden_states_travel_only_to_the_rank_that_samples_and_only_from_ranks_that_have_them():
    comms = [RecordingCommunicator(comm) for comm in thread_group(3)]
    wanted = [Row(2, 1), Row(0, 0), Row(2, 0)]
    hidden = [torch.full((2, 4), 10.0 * rank) + torch.arange(2.0).view(2, 1) for rank in range(3)]
    assert [StepExchange(comms[rank]).gather(hidden[rank], wanted) for rank in (1, 2)] == [None, None]
    rows = StepExchange(comms[0]).gather(hidden[0], wanted)
    assert rows[:, 0].tolist() == [21.0, 0.0, 20.0]
    assert [comm.num_exchanges for comm in comms] == [1, 0, 1]
    assert StepExchange(comms[0]).gather(hidden[0], [Row(0, 1)])[:, 0].tolist() == [1.0]
    assert comms[0].num_exchanges == 1, "a lone request at home is no business of others"


def test_a_model_is_compiled_with_as_many_rows_as_a_step_may_have_and_with_positions_that_all_models_have(monkeypatch):
    ran = []

    @contextmanager
    def forward_context(metadata, vllm_config, *, num_tokens, slot_mapping):
        ran.append((metadata, num_tokens))
        yield

    def module(*, input_ids, positions):
        ran.append((input_ids, positions))

    monkeypatch.setattr(rank_model_module, "set_forward_context", forward_context)
    rank_model(Layer(), module=module).warm_up(1024)
    assert not ran, "nothing is compiled"
    rank_model(Layer(), module=module, mode=CompilationMode.DYNAMO_TRACE_ONCE).warm_up(1024)
    ((metadata, num_tokens), (token_ids, positions)) = ran
    assert isinstance(metadata, WarmUp)
    assert num_tokens == 1024
    assert token_ids.shape == positions.shape == (1024,)
    assert not positions.any()


def test_the_last_layer_computes_attention_for_the_rows_that_are_read_and_the_others_are_zero():
    """Eight tokens of a prompt, half on each rank; the last one is read."""
    names, outs = ("layers.0.attn", "layers.1.attn"), {}
    group = KVGroup((0, 1), KVSpec.uniform(2, 32, 32, "float32"), 4)
    table = PageTable(4)
    table.append(0, 0, 1)
    table.append(1, 0, 1)
    part = RequestStep(0, 0, 8, 8, range(8), [SampleRow(0, 7, 0.0, 1.0, 0, 0.0, 0, None, ())], ())
    plan = build_plan(0, (0, 1), [part], [{0: table}], [group], partial(plan_group, forced=Strategy.PASS_Q))
    assert plan.last_layer is not None
    impl = StepAttentionImpl(4, 32, 0.1, 2)

    def run(rank, comm):
        pool = PagePool(group, 1, 4, torch.device("cpu"))
        recording = RecordingCommunicator(comm)
        params = [AttentionParams(0.1), AttentionParams(0.1)]
        attention = EagerStepAttention(plan, [{0: table}], [pool], recording, make_backend("cpu", "cpu"), params)
        metadata = StepMetadata(attention, {name: i for i, name in enumerate(names)})
        for name in names:
            q, kv = torch.randn(4, 4, 32), torch.randn(4, 2, 32)
            layer, output = SimpleNamespace(layer_name=name), torch.full((4, 4, 32), torch.nan)
            outs[rank, name] = impl.forward(layer, q, kv, kv, None, metadata, output).abs().amax((1, 2)) > 0

    threads = [Thread(target=run, args=(rank, comm)) for rank, comm in enumerate(thread_group(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outs[rank, names[0]].tolist() for rank in (0, 1)] == [[True] * 4] * 2
    assert [outs[rank, names[1]].tolist() for rank in (0, 1)] == [[False] * 4, [False] * 3 + [True]]


@pytest.mark.parametrize("refused", [{"strategy": "pass_q"}, {"measure": "never"}, {"context_parallel_size": 1}])
def test_nothing_is_measured_where_nothing_is_chosen_by_it(refused):
    options = Options(**{"context_parallel_size": 2, **refused})
    comm = SimpleNamespace(size=options.context_parallel_size)
    costs = agree_on_costs(options, None, None, None, comm, torch.device("cpu"))
    assert costs == costs_by_bytes((0,) * comm.size)


def test_attention_gives_zeros_only_while_a_model_is_compiled():
    attention, ones = StepAttentionImpl(4, 32, 0.1), torch.ones(3, 4, 32)
    kv = torch.ones(3, 2, 32)
    assert not attention.forward(None, ones, kv, kv, None, WarmUp(), ones.clone()).any()
    with pytest.raises(AttributeError):
        attention.forward(SimpleNamespace(layer_name="attn"), ones, kv, kv, None, None, ones.clone())
