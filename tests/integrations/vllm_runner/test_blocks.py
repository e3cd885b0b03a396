"""vLLM's blocks of all ranks become page tables, and the ids of this rank's blocks here."""

from types import SimpleNamespace

import pytest

from longspan.errors import LongspanError
from longspan.integrations.vllm.runner.blocks import RequestBlocks


def new(req_id, *block_ids):
    return SimpleNamespace(req_id=req_id, block_ids=(list(block_ids),))


def step(new_reqs=(), cached=(), finished=(), preempted=None, **more):
    """A stand-in of SchedulerOutput; `cached` are (request, block ids or None)."""
    return SimpleNamespace(
        scheduled_new_reqs=list(new_reqs),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[req_id for req_id, _ in cached],
            new_block_ids=[None if ids is None else (ids,) for _, ids in cached],
            resumed_req_ids=more.pop("resumed", set()),
        ),
        finished_req_ids=set(finished),
        preempted_req_ids=preempted,
        kv_cache_block_copies=None,
        new_block_ids_to_zero=None,
        scheduled_spec_decode_tokens={},
        **more,
    )


@pytest.fixture
def blocks():
    """Of rank 1 of 2: ids 0 to 9 are rank 0's, 10 to 19 its own."""
    return RequestBlocks(num_blocks=20, num_ranks=2, rank=1, block_size=16)


def test_new_requests_keep_this_ranks_blocks(blocks):
    given = step([new("a", 3, 10, 12, 4), new("b", 7)])
    local = blocks.add(given)
    assert [r.block_ids for r in local.scheduled_new_reqs] == [([0, 2],), ([],)]
    assert [r.block_ids for r in given.scheduled_new_reqs] == [([3, 10, 12, 4],), ([7],)], "the argument is unchanged"
    assert [blocks["a"].page(i) for i in range(4)] == [(0, 3), (1, 0), (1, 2), (0, 4)]


def test_running_requests_get_more(blocks):
    blocks.add(step([new("a", 3), new("b", 11)]))
    local = blocks.extend(step(cached=[("b", [5, 19]), ("a", None)]))
    assert local.scheduled_cached_reqs.new_block_ids == [([9],), None]
    assert [blocks["b"].page(i) for i in range(3)] == [(1, 1), (0, 5), (1, 9)]


def test_a_resumed_request_starts_anew(blocks):
    blocks.add(step([new("a", 3, 10)]))
    blocks.forget(step(preempted={"a"}))
    assert len(blocks) == 0
    blocks.add(step([new("a", 11)]))
    assert blocks["a"].num_pages == 1


def test_finished_requests_are_forgotten(blocks):
    blocks.add(step([new("a", 3), new("b", 4)]))
    blocks.forget(step(finished={"a", "unknown"}))
    assert len(blocks) == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"kv_cache_block_copies": [1]},
        {"new_block_ids_to_zero": [1]},
        {"scheduled_spec_decode_tokens": {"a": [1]}},
    ],
)
def test_rejects_what_is_refused_at_start(blocks, asked):
    given = step()
    vars(given).update(asked)
    with pytest.raises(LongspanError, match=next(iter(asked))):
        blocks.extend(given)


def test_rejects_requests_that_are_resumed_by_id(blocks):
    with pytest.raises(LongspanError, match="resumes"):
        blocks.extend(step(resumed={"a"}))
