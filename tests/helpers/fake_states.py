"""Simulated states of recurrent layers: a slot holds the tokens that its state has seen."""

from collections.abc import Callable, Sequence

from longspan.kv.prefix import CachingAllocator, extend_hashes
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.plan.types import Plan, StatePlace

STATE_GROUP = StateGroup((0,), (StateComponent("recurrent", 0, (4,), "float32"),))
"""16 bytes a state, of the first layer."""


class FakeStates:
    """Slots of all ranks."""

    def __init__(self) -> None:
        self.seen: dict[StatePlace, tuple[int, ...]] = {}
        """Place to the tokens that the state there has seen."""

    def run(self, plan: Plan, tokens_of: Callable[[int], Sequence[int]]) -> None:
        """Check the states of a plan, and hand them on.

        Args:
            plan: has a state for every request.
            tokens_of: function from a request's number to its tokens.
        """
        spans: dict[int, tuple[int, int, int]] = {}  # request to start, end and last rank
        for run in plan.query_runs:
            start = spans[run.request_id][0] if run.request_id in spans else run.position
            spans[run.request_id] = (start, run.end, run.compute_rank)
        assert sorted(step.request_id for step in plan.states) == sorted(spans)
        written = [place for step in plan.states for place in (step.target, *(kept.place for kept in step.kept))]
        assert len(set(written)) == len(written), "two states in one slot"
        sources = {step.source for step in plan.states if step.source not in (None, step.target)}
        assert not sources & set(written), "a state is overwritten before it is read"
        for step in plan.states:
            start, end, rank = spans[step.request_id]
            tokens = tuple(tokens_of(step.request_id))
            assert (step.source is None) == (start == 0)
            if step.source is not None:
                assert self.seen[step.source] == tokens[:start], "not the state behind these tokens"
                assert step.source.rank in plan.ranks
            if step.request_id in plan.packed:
                assert step.source is None or step.source.rank == rank
            assert step.target.rank == rank
            self.seen[step.target] = tokens[:end]
            for kept in step.kept:
                assert start < kept.position <= end
                owner = next(r for r in plan.query_runs if r.request_id == step.request_id and r.end >= kept.position)
                assert kept.place.rank == owner.compute_rank
                self.seen[kept.place] = tokens[: kept.position]

    def check_cached(self, allocators: Sequence[CachingAllocator], page_size: int) -> None:
        """Every state that the prefix cache offers has seen the tokens that its hash says."""
        for rank, allocator in enumerate(allocators):
            for slot, page_hash in allocator._hash_of.items():
                hashes: list[bytes] = []
                seen = self.seen[StatePlace(rank, slot)]
                extend_hashes(hashes, seen, page_size)
                assert len(hashes) * page_size == len(seen)
                assert hashes[-1] == page_hash
