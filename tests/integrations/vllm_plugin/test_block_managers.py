"""Blocks of requests with one and with several block tables, by vLLM's own managers."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool

from longspan.integrations.vllm.groups import divide_layers
from longspan.integrations.vllm.placement import Striping, block_rank
from longspan.integrations.vllm.requests import Requests
from longspan.integrations.vllm.spec import PlacedSpec, PlacedWindowSpec, PlacingManager, PlacingWindowManager
from longspan.kv.layout import KVSpec
from longspan.sharding.geometry import StepGeometry

SIZE, WINDOW = 32, 100
SHAPE = {"block_size": SIZE, "num_kv_heads": 2, "head_size": 32, "head_size_v": 32, "dtype": torch.float32}


def striping(num_ranks):
    geometry = StepGeometry(num_ranks=num_ranks, page_size=SIZE, stripe_len=128, chunk_len=128 * num_ranks)
    return Striping(geometry, min_striped_blocks=16)


class Tables:
    """A request's tables under vLLM's managers, which are called as vLLM's coordinator calls them."""

    def __init__(self, num_ranks, num_windows, num_blocks):
        self.pool = BlockPool(num_blocks, False, SIZE)
        self.num_blocks, self.num_ranks = num_blocks, num_ranks
        ours = {"striping": striping(num_ranks), "spare_blocks": num_ranks if num_windows else 0}
        specs = [(PlacingManager, PlacedSpec(**SHAPE, **ours))]
        specs += [(PlacingWindowManager, PlacedWindowSpec(**SHAPE, **ours, sliding_window=WINDOW))] * num_windows
        self.managers = [
            cls(
                kv_cache_spec=spec,
                block_pool=self.pool,
                enable_caching=False,
                kv_cache_group_id=i,
                scheduler_block_size=SIZE,
            )
            for i, (cls, spec) in enumerate(specs)
        ]
        self.lengths = {}

    def grow(self, request_id, num_tokens):
        """Let a request have `num_tokens`, if vLLM would. Returns whether it has."""
        computed = self.lengths.get(request_id, 0)
        for manager in self.managers:
            manager.remove_skipped_blocks(request_id, computed)
        needed = sum(
            manager.get_num_blocks_to_allocate(request_id, num_tokens, [], computed, computed, num_tokens)
            for manager in self.managers
        )
        if needed > self.pool.get_num_free_blocks():
            return False
        for manager in self.managers:
            manager.allocate_new_blocks(request_id, num_tokens, num_tokens)
            manager.num_cached_block[request_id] = 0  # it runs, as vLLM's `cache_blocks` notes
        self.lengths[request_id] = num_tokens
        return True

    def free(self, request_id):
        self.lengths.pop(request_id, None)
        for manager in self.managers:
            self.pool.free_blocks(reversed(manager.pop_blocks_for_free(request_id)))

    def ranks(self, request_id):
        """Rank of every block in every table; None behind windows."""
        return [
            [None if b.is_null else block_rank(b.block_id, self.num_blocks, self.num_ranks)[0] for b in blocks]
            for blocks in (manager.req_to_blocks.get(request_id, []) for manager in self.managers)
        ]


@pytest.mark.parametrize(("num_ranks", "num_windows", "num_blocks"), [(2, 1, 61), (3, 1, 90), (2, 3, 120), (5, 2, 200)])
def test_a_blocks_rank_is_the_same_in_all_tables_whatever_is_free(num_ranks, num_windows, num_blocks):
    rng = random.Random(num_blocks)
    tables = Tables(num_ranks, num_windows, num_blocks)
    refused = 0
    for step in range(600):
        request_id = f"r{rng.randrange(6)}"
        have = tables.lengths.get(request_id, 0)
        if have and rng.random() < 0.12:
            tables.free(request_id)
            continue
        grown = tables.grow(request_id, have + rng.choice((1, 1, 31, 200, 640)))
        refused += not grown
        if not grown and step % 3:
            tables.free(request_id)
        full, *windows = tables.ranks(request_id)
        for window in windows:
            assert len(window) == len(full)
            first = next((i for i, rank in enumerate(window) if rank is not None), len(full))
            assert window[first:] == full[first:]
            assert window[:first] == [None] * first
    assert refused, "memory was short at times"
    for request_id in list(tables.lengths):
        tables.free(request_id)
    assert tables.pool.get_num_free_blocks() == num_blocks - 1
    assert tables.pool.free_block_queue.room == [
        len([i for i in range(1, num_blocks) if block_rank(i, num_blocks, num_ranks)[0] == rank])
        for rank in range(num_ranks)
    ]


def test_a_lone_request_of_the_longest_length_never_starves():
    """Blocks for exactly what the specs say that one request needs."""
    tables = Tables(3, 2, 1 + 40 + 2 * (-(-(WINDOW - 1 + 64) // SIZE) + 1) + 3 * 3)
    for end in range(64, 40 * SIZE + 1, 64):
        assert tables.grow("r", end), end
    full, *windows = tables.ranks("r")
    assert len(full) == 40
    assert all(sum(rank is not None for rank in window) <= 6 for window in windows)


def test_a_request_that_has_lost_its_blocks_is_placed_anew():
    tables = Tables(2, 0, 201)
    assert tables.grow("r", 640)
    assert len(set(tables.ranks("r")[0])) == 2, "striped"
    tables.free("r")
    assert tables.grow("other", 3200)
    assert tables.grow("r", 64)
    assert len(set(tables.ranks("r")[0])) == 1, "packed: it is short now"


def specs(*windows):
    return [KVSpec.uniform(2, 32, 32, "float32", window) for window in windows]


def test_tables_of_unlike_layers_use_one_memory_and_a_table_of_all_layers_does_not():
    several = divide_layers(specs(None, 9, 9, None, 9), 4, [[0, 3], [1, 4], [2]])
    assert [group.layers for group in several.groups] == [(0, 3), (1, 4), (2,)]
    assert [several.table_spec(i).window for i in range(3)] == [None, 9, 9]
    full, one, other = several.make_pools(4, 8, torch.device("cpu"))
    assert full.k[0].data_ptr() == one.k[1].data_ptr() == other.k[2].data_ptr()
    assert full.v[3].data_ptr() == one.v[4].data_ptr()
    assert full.k[0].data_ptr() != full.k[3].data_ptr()

    single = divide_layers(specs(None, 9, 9, None, 9), 4, [[0, 1, 2, 3, 4]])
    assert [group.layers for group in single.groups] == [(0, 3), (1, 2, 4)]
    assert single.tables == (0, 0)
    assert single.table_spec(0) is None, "nothing is freed while the request runs"
    full, windows = single.make_pools(4, 8, torch.device("cpu"))
    assert len({tensor.data_ptr() for tensor in [*full.k.values(), *windows.k.values()]}) == 5


def schedule(new=(), cached=(), num_computed=0, block_ids=None):
    """A step of vLLM's scheduler for one request, `r`."""
    return SimpleNamespace(
        kv_cache_block_copies=None,
        new_block_ids_to_zero=None,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(),
        scheduled_new_reqs=list(new),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached),
            resumed_req_ids=set(),
            new_block_ids=[block_ids],
            num_computed_tokens=[num_computed],
            num_output_tokens=[0],
        ),
    )


def test_null_blocks_and_blocks_behind_windows_have_no_page():
    full, window = specs(None, WINDOW)
    requests = Requests(100, 2, SIZE, [full, window])
    new = SimpleNamespace(
        req_id="r",
        prompt_token_ids=[1] * 400,
        sampling_params=SamplingParams(),
        block_ids=([1, 2, 3, 4, 5], [0, 0, 52, 53, 54]),  # the first tokens were in the prefix cache
        num_computed_tokens=128,
        prefill_token_ids=None,
        lora_request=None,
    )
    requests.update(schedule(new=[new]))
    everywhere, here = requests["r"].tables
    assert [everywhere.page(i) for i in range(5)] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    assert [here.page(i) for i in range(5)] == [None, None, (1, 2), (1, 3), (1, 4)]
    requests.update(schedule(cached=["r"], num_computed=160, block_ids=([6], [55])))
    assert here.page(5) == (1, 5)
    requests.update(schedule(cached=["r"], num_computed=5 * SIZE + WINDOW - 1))  # it sees from block 5 on
    assert [here.page(i) for i in (4, 5)] == [None, (1, 5)]
    assert everywhere.page(0) == (0, 1)
