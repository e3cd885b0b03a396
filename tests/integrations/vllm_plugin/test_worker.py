"""What a worker and the block manager decide, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationMode
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm import worker as worker_module
from longspan.integrations.vllm.backend import StepAttentionImpl, WarmUp
from longspan.integrations.vllm.exchange import StepExchange
from longspan.integrations.vllm.executor import ContextParallelExecutor
from longspan.integrations.vllm.memory import local_kv_bytes
from longspan.integrations.vllm.options import Options
from longspan.integrations.vllm.placement import Striping, choose_home
from longspan.integrations.vllm.planning import Row
from longspan.integrations.vllm.spec import PlacedSpec, PlacingManager
from longspan.kv.layout import KVGroup, KVSpec

STRIPING = Striping(num_ranks=2, stripe_blocks=4, chunk_blocks=8, min_striped_blocks=16)
SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "head_size_v": 32, "dtype": torch.float32}


@pytest.fixture
def worker():
    """Of two ranks, as after `load_model` of a model with one layer."""
    found = worker_module.Worker.__new__(worker_module.Worker)
    found._options, found._cp_size = Options(context_parallel_size=2), 2
    found._group, found._index_of_layer = KVGroup((0,), KVSpec.uniform(2, 32, 32, "float32"), 4), {"attn": 0}
    found.device = torch.device("cpu")
    found.vllm_config, found.compilation_config = None, SimpleNamespace(mode=CompilationMode.NONE)
    found.cache_config = SimpleNamespace(block_size=32, kv_cache_memory_bytes=None, gpu_memory_utilization=0.5)
    found.scheduler_config = SimpleNamespace(max_num_batched_tokens=1024)
    found.model_config = SimpleNamespace(dtype=torch.float32)
    found.parallel_config = SimpleNamespace(world_size=2)
    return found


@pytest.mark.parametrize("more", [{}, {"sliding_window": 64}, {"attention_chunk_size": 64}, {"non_causal": True}])
def test_only_layers_with_plain_full_attention_are_placed(worker, more):
    layer = SimpleNamespace(get_kv_cache_spec=lambda vllm_config: FullAttentionSpec(**SHAPE, **more))
    worker.compilation_config.static_forward_context = {"attn": layer}
    if more:
        with pytest.raises(UnsupportedModelError, match="layer attn"):
            worker.get_kv_cache_spec()
    else:
        assert isinstance(worker.get_kv_cache_spec()["attn"], PlacedSpec)


def test_all_ranks_refuse_where_one_has_no_memory(worker, monkeypatch):
    monkeypatch.setattr(worker_module.dist, "all_reduce", lambda blocks, op: blocks.zero_())  # another rank's 0
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        worker.determine_available_memory()


def test_a_rank_without_memory_says_zero():
    cache = SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=1e-9)
    assert local_kv_bytes(cache, 2, torch.device("cpu")) == 0


def test_other_processes_than_the_first_end_where_they_fail(worker):
    closed = []
    worker._comm, worker.rank = SimpleNamespace(close=lambda: closed.append(True)), 1
    with pytest.raises(SystemExit), worker._telling_peers_of_failure():
        raise ValueError
    worker.rank = 0
    with pytest.raises(ValueError, match="reason"), worker._telling_peers_of_failure():
        raise ValueError("reason")
    assert closed == [True, True]


def test_a_prompt_is_placed_by_its_whole_length_however_vllm_asks(monkeypatch):
    monkeypatch.setattr(FullAttentionManager, "get_num_blocks_to_allocate", lambda *args, **kwargs: 0)
    manager = PlacingManager.__new__(PlacingManager)
    manager.block_size, manager._placements, manager._prompt_blocks = 32, {}, {}
    manager.get_num_blocks_to_allocate("a", 3200, prefill_end=0)  # admission
    manager.get_num_blocks_to_allocate("a", 1024, prefill_end=0)  # the first chunk
    manager.get_num_blocks_to_allocate("b", 1024, prefill_end=3200)
    assert manager._prompt_blocks == {"a": 100, "b": 100}


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


def test_what_fails_in_a_step_is_raised_where_it_ends(worker):
    worker.rank, worker._failure, worker._exchange = 0, None, StepExchange(None)
    worker._comm, worker._requests = SimpleNamespace(close=lambda: None), None
    worker.begin_step(step(1))
    with pytest.raises(AttributeError):
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


def test_a_model_is_compiled_with_as_many_rows_as_a_step_may_have_and_with_positions_that_all_models_have(worker):
    ran = []
    worker._run_model = lambda *arguments: ran.append(arguments)
    worker._warm_up()
    assert not ran, "nothing is compiled"
    worker.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
    worker._warm_up()
    ((metadata, token_ids, positions),) = ran
    assert isinstance(metadata, WarmUp)
    assert token_ids.shape == positions.shape == (1024,)
    assert not positions.any()


def test_attention_gives_zeros_only_while_a_model_is_compiled():
    attention, ones = StepAttentionImpl(4, 32, 0.1), torch.ones(3, 4, 32)
    kv = torch.ones(3, 2, 32)
    assert not attention.forward(None, ones, kv, kv, None, WarmUp(), ones.clone()).any()
    with pytest.raises(AttributeError):
        attention.forward(SimpleNamespace(layer_name="attn"), ones, kv, kv, None, None, ones.clone())
