"""A simulator of the ranks: executes plans without computing, and checks everything that ranks rely on.

It mirrors page tables per rank from the plans' deltas only, so what it checks is also the protocol between driver and
workers. Instead of KV, a row holds the tokens that its key depends on. No torch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from fake_states import STATE_GROUP, FakeStates
from fake_tiers import FakeTiers
from msgspec import structs

from longspan.config import EngineConfig
from longspan.group.messages import decode_to_worker
from longspan.group.plans import PlanReceiver, PlanSender
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.prefix import extend_hashes
from longspan.plan.fixed_shape import MOST_SHARED, FixedShape, fixed_shape
from longspan.plan.segments import make_segments
from longspan.plan.types import (
    GroupStep,
    Literals,
    PageCopy,
    Plan,
    PlanResult,
    RankResult,
    SampledBy,
    SampledToken,
    SampleRow,
    ScoredRun,
)
from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Request
from longspan.scheduler.sampling import sample_row
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_pages
from longspan.sharding.pages import PageRun, PageTable
from longspan.types import AttentionParams, FinishReason, ModelSpec, Phase, TokenLogprobs

VOCAB = 50
EOS = 1


def make_model(*windows: int | None, max_position: int | None = None, has_state: bool = False) -> ModelSpec:
    """One layer and one KV group per window, 8 bytes per token and layer; the first may have a state as well."""
    groups = tuple(KVGroup((i,), KVSpec.uniform(1, 1, 1, "float32", window), 4) for i, window in enumerate(windows))
    params = tuple(AttentionParams(1.0, window=window) for window in windows)
    states = (STATE_GROUP,) if has_state else ()
    return ModelSpec("fake", len(windows), VOCAB, max_position, (EOS,), groups, params, state_groups=states)


def make_config(num_ranks: int = 2, **options) -> EngineConfig:
    defaults = {"page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 16, "async_scheduling": False}
    return EngineConfig(model="fake", context_parallel_size=num_ranks, **{**defaults, **options})


def make_scheduler(model: ModelSpec, config: EngineConfig, memory_tokens: int) -> Scheduler:
    """Ranks with memory for `memory_tokens` tokens in every group together."""
    num_bytes = memory_tokens * sum(group.token_bytes for group in model.kv_groups)
    num_pages = pool_pages(model, num_bytes, config.page_size, config.max_num_batched_tokens)
    return Scheduler(model, config, pools_of(config, num_pages))


def pools_of(config: EngineConfig, num_pages: Sequence[int]) -> list[tuple[int, ...]]:
    """Pools [rank][KV group] where the rank with the largest weight has `num_pages`."""
    weights = config.known_weights or (1.0,) * config.context_parallel_size
    return [tuple(max(1, int(pages * weight / max(weights))) for pages in num_pages) for weight in weights]


def runs_from(table: PageTable, page_idx: int) -> list[PageRun]:
    """A table's runs behind a page: what is left of a mirror when late frees are taken into account."""
    copy = PageTable(table.page_size)
    copy.apply(list(table.runs))
    copy.free_before(page_idx)
    return copy.runs


def with_drafts(request: Request) -> list[int]:
    """A request's tokens, and the drafts that a plan in flight checks."""
    return request.token_ids + [draft.token_id for draft in request.drafts]


def fake_token(row: SampleRow) -> int:
    """Depends on the request's seed and the position only; every tenth or so ends a request."""
    token = random.Random(f"{row.seed} {row.position}").randrange(VOCAB // 2)
    return 2 if token in row.banned_token_ids else token


def tokens_alone(request: Request) -> list[int]:
    """The output of a request with nothing beside it: the simulator's tokens depend on seed and position only."""
    prompt, eos_token_ids = request.token_ids[: request.prompt_len], request.eos_token_ids
    alone = Request(0, request.params, request.seed, prompt, request.prompt_len, eos_token_ids)
    while alone.finish_reason is None:
        alone.add_token(fake_token(sample_row(alone, len(alone.token_ids) - 1)), None)
    return alone.output_token_ids


def _logprobs(token_id: int, row: SampleRow) -> TokenLogprobs | None:
    """Tells the position, if asked for."""
    return None if row.num_logprobs is None else TokenLogprobs(token_id, -float(row.position), 1, ())


@dataclass
class Kept:
    """What a rank keeps of a shape."""

    shape: FixedShape
    captured_by: tuple[int, tuple[int, ...]] | None = None
    """Number and ranks of the plan that captured it last."""


@dataclass
class FakeRanks:
    """Executes plans without computing, and checks everything that ranks rely on."""

    scheduler: Scheduler
    rng: random.Random
    checks_books: bool = True
    """With every plan; a caller that does so itself, less often, may turn it off."""
    mirrors: list[list[dict[int, PageTable]]] = field(default_factory=list)
    """[rank][KV group][request]"""
    in_flight: dict[int, Plan] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    first_plan_id: int = 0
    sender: PlanSender = field(default_factory=PlanSender)
    receivers: list[PlanReceiver] = field(default_factory=list)
    """Per rank, what puts its plans together."""
    written: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)
    """(KV group, rank, row) to the tokens up to the one whose key lies there: what the key depends on."""
    states: FakeStates = field(default_factory=FakeStates)
    kept: list[dict[int, Kept]] = field(default_factory=list)
    """[rank][slot]: what a rank keeps of a shape."""
    cannot_capture: set[int] = field(default_factory=set)
    """Ranks whose captures fail."""
    tiers: FakeTiers = field(default_factory=FakeTiers)
    """What outlives the ranks."""

    def __post_init__(self) -> None:
        groups = self.scheduler.model.kv_groups
        everyone = range(self.scheduler.config.context_parallel_size)
        self.mirrors = [[{} for _ in groups] for _ in everyone]
        self.receivers = [PlanReceiver(rank) for rank in everyone]
        self.kept = [{} for _ in everyone]

    # -- a plan arrives ---------------------------------------------------------------------------------------------

    def submit(self, plan: Plan) -> None:
        config = self.scheduler.config
        assert list(plan.ranks) == sorted(set(plan.ranks))
        assert plan.ranks
        before = [other for other in self.in_flight.values() if set(plan.ranks) & set(other.ranks)]
        assert len(before) <= 1, "ranks run two plans, and then another"
        for other in before:
            assert plan.ranks == other.ranks
            assert all(run.tokens == SampledBy(other.plan_id) for run in plan.query_runs), "ranks run two plans"
            assert {run.request_id for run in plan.query_runs} <= {row.request_id for row in other.samples}
        assert before or not any(isinstance(run.tokens, SampledBy) for run in plan.query_runs)
        assert plan.plan_id == self.first_plan_id + len(self.plans)
        tokens = dict.fromkeys(plan.ranks, 0)
        for run in plan.query_runs:
            tokens[run.compute_rank] += run.num_tokens
        assert max(tokens.values()) <= config.max_num_batched_tokens
        assert sum(tokens.values()) > 0
        for copy in plan.page_copies:
            self._copy(plan, copy)
        for rank, message in self.sender.messages(plan).items():
            received = self.receivers[rank].take(decode_to_worker(message))
            self._check_received(plan, received, rank)
            self._apply(received, rank)
            self._check_graph(received, rank)
        self._check_tables(plan)
        self._check_requests(plan)
        self._check_keys(plan)
        requests = {request.request_id: request for request in self.scheduler.running}
        if self.scheduler.model.state_groups:
            self.states.run(plan, lambda request_id: self._tokens(requests[request_id]))
        self.in_flight[plan.plan_id] = plan
        self.plans.append(plan)

    def _check_received(self, plan: Plan, received: Plan, rank: int) -> None:
        """A rank knows its own part whole, and of the other ranks' what concerns it."""
        own = [run for run in plan.query_runs if run.compute_rank == rank]
        assert [run for run in received.query_runs if run.compute_rank == rank] == own
        shared = [r for r in plan.query_runs if r.compute_rank != rank and r.request_id not in plan.packed]
        assert [r for r in received.query_runs if r.compute_rank != rank] == [
            structs.replace(run, tokens=None) for run in shared
        ]
        kept = {run.request_id for run in received.query_runs}
        assert [r.request_id for r in received.query_runs] == [
            r.request_id for r in plan.query_runs if r.request_id in kept
        ]
        read = [structs.replace(run, tokens=None) for run in plan.read_runs if run.request_id in kept]
        assert list(received.read_runs) == read
        here = {(run.request_id, position) for run in own for position in range(run.position, run.end)}
        assert received.samples == tuple(row for row in plan.samples if (row.request_id, row.position) in here)
        assert received.scores == tuple(run for run in plan.scores if (run.request_id, run.position) in here)
        assert set(received.table_deltas) == {delta for delta in plan.table_deltas if delta.request_id in kept}
        assert set(received.states) == {state for state in plan.states if state.request_id in kept}
        assert fixed_shape(received) == fixed_shape(plan), "all ranks make one shape"
        for field_name in (
            "plan_id",
            "phase",
            "ranks",
            "num_tokens",
            "groups",
            "page_copies",
            "released",
            "last_layer",
            "graph",
        ):
            assert getattr(received, field_name) == getattr(plan, field_name)

    def _check_graph(self, plan: Plan, rank: int) -> None:
        """Ranks that replay a step hold the graph of one capture of it, which all of them took part in; and every rank
        has room for its key tiles."""
        if plan.graph is None:
            return
        shape, slots, slot = fixed_shape(plan), self.kept[rank], plan.graph.slot
        assert shape is not None
        if plan.graph.run == "launch" and (slot not in slots or slots[slot].shape != shape):
            slots[slot] = Kept(shape)
        kept = slots[slot]
        assert kept.shape == shape
        if plan.graph.run == "capture" and rank not in self.cannot_capture:
            kept.captured_by = (plan.plan_id, plan.ranks)
        if plan.graph.run == "replay":
            assert kept.captured_by is not None
            others = [self.kept[other][slot].captured_by for other in plan.ranks if other < rank]
            assert all(other == kept.captured_by for other in others), "graphs of different captures would talk"
            assert kept.captured_by[1] == plan.ranks
        for group_idx, tables in enumerate(self.mirrors[rank]):
            seen = sum(
                table.count_on(rank, 0, run.end) // self.scheduler.config.page_size
                for run in plan.query_runs
                if (table := tables.get(run.request_id)) is not None
            )
            assert seen <= MOST_SHARED * self.scheduler.memory.allocators[rank][group_idx].num_pages

    def _copy(self, plan: Plan, copy: PageCopy) -> None:
        source, target, size = copy.source, copy.target, self.scheduler.config.page_size
        assert {source.rank, target.rank} <= set(plan.ranks)
        assert source.num_pages == target.num_pages
        for i in range(target.num_pages):
            self.tiers.check_free(copy.group_idx, target.rank, target.slot + i)
        for i in range(source.num_pages * size):
            key = self.written[copy.group_idx, source.rank, source.slot * size + i]
            self.written[copy.group_idx, target.rank, target.slot * size + i] = key

    def _apply(self, plan: Plan, rank: int) -> None:
        """As `ModelRunner` does."""
        for request_id in plan.released:
            for tables in self.mirrors[rank]:
                tables.pop(request_id, None)
        for delta in plan.table_deltas:
            tables = self.mirrors[rank][delta.group_idx]
            if delta.replace or delta.request_id not in tables:
                tables[delta.request_id] = PageTable(self.scheduler.config.page_size)
            tables[delta.request_id].free_before(delta.freed_before)
            tables[delta.request_id].apply(list(delta.added))

    def _check_tables(self, plan: Plan) -> None:
        """Every rank of the plan knows the scheduler's tables of the plan's requests; every owner of a page counts."""
        requests = {request.request_id: request for request in self.scheduler.running}
        for request_id in {run.request_id for run in plan.query_runs}:
            for group_idx, table in enumerate(requests[request_id].allocation.tables):
                first = table.runs[0].page_idx
                for rank in self._told(plan, request_id):
                    mirror = self.mirrors[rank][group_idx][request_id]
                    assert runs_from(mirror, first) == table.runs, f"rank {rank} missed something"
        if self.checks_books:
            check_books(self.scheduler)

    def _told(self, plan: Plan, request_id: int) -> Sequence[int]:
        """Ranks that a plan tells of a request."""
        if request_id not in plan.packed:
            return plan.ranks
        (owner,) = {run.compute_rank for run in plan.query_runs if run.request_id == request_id}
        return [owner]

    def check_cached(self) -> None:
        """Every page that the prefix cache offers holds the keys of the tokens that its hash says."""
        size = self.scheduler.config.page_size
        for rank, allocators in enumerate(self.scheduler.memory.allocators):
            for group_idx, allocator in enumerate(allocators[: len(self.mirrors[rank])]):
                for slot, page_hash in allocator._hash_of.items():
                    keys = [self.written[group_idx, rank, slot * size + i] for i in range(size)]
                    assert all(keys[-1][: len(keys[-1]) - size + 1 + i] == key for i, key in enumerate(keys))
                    hashes: list[bytes] = []
                    extend_hashes(hashes, keys[-1], size)
                    assert len(hashes) * size == len(keys[-1])
                    assert hashes[-1] == page_hash
        slots = [pools[len(self.mirrors[0]) :] for pools in self.scheduler.memory.allocators]
        self.states.check_cached([allocator for of_rank in slots for allocator in of_rank], size)

    def _check_requests(self, plan: Plan) -> None:
        """Runs continue where the request stands, with its tokens; who computes a token stores it, in every group."""
        requests = {request.request_id: request for request in self.scheduler.running}
        starts: dict[int, int] = {}
        for run in plan.query_runs:
            request = requests[run.request_id]
            assert request.in_flight
            is_ahead = isinstance(run.tokens, SampledBy)
            assert run.position == starts.get(run.request_id, request.num_computed + is_ahead)
            if isinstance(run.tokens, Literals):
                assert run.tokens.token_ids == tuple(with_drafts(request)[run.position : run.end])
            else:
                sampling = self.plans[run.tokens.plan_id - self.first_plan_id]
                assert (run.position, run.num_tokens) == (len(request.token_ids), 1)
                (before,) = [other for other in sampling.query_runs if other.request_id == run.request_id]
                assert (before.end, before.compute_rank) == (run.position, run.compute_rank), "not known there"
            starts[run.request_id] = run.end
            for table in request.allocation.tables:
                assert table.owners(run.position, run.end) == [(run.compute_rank, run.position, run.end)]
        phases = {requests[request_id].phase for request_id in starts}
        assert plan.phase is (Phase.PREFILL if Phase.PREFILL in phases else Phase.DECODE)
        moving = {
            run.request_id
            for group_idx, group in enumerate(self.scheduler.model.kv_groups)
            for run in plan.query_runs
            for table in [requests[run.request_id].allocation.tables[group_idx]]
            if set(table.ranks_with(group.spec.first_key(run.position), run.position)) - {run.compute_rank}
        }
        assert len({requests[request_id].phase for request_id in moving}) <= 1, "one strategy for two phases"
        to_sample = {r for r, end in starts.items() if end >= len(requests[r].token_ids)}
        assert [(row.request_id, row.position) for row in plan.samples] == [
            (r, position)
            for r in starts
            if r in to_sample
            for position in range(starts[r] - 1 - len(requests[r].drafts), starts[r])
        ]
        assert plan.has_drafts == any(requests[r].drafts for r in to_sample)
        for row in plan.samples:
            request = requests[row.request_id]
            num_generated = max(request.num_generated, row.position + 1 - request.prompt_len)  # drafts before it
            must_go_on = num_generated < request.params.min_tokens
            assert set(row.banned_token_ids) == (
                {*request.eos_token_ids, *request.params.stop_token_ids} if must_go_on else set()
            )
        for score in plan.scores:
            request = requests[score.request_id]
            first = score.position + 1
            assert score.targets == tuple(request.token_ids[first : first + len(score.targets)])
            assert first + len(score.targets) <= request.prompt_len

    def _check_keys(self, plan: Plan) -> None:
        """New keys go where they belong; every key that a query sees still lies where its table says."""
        requests = {request.request_id: request for request in self.scheduler.running}
        for group_idx, group in enumerate(self.scheduler.model.kv_groups):
            for run in plan.query_runs:
                table = requests[run.request_id].allocation.tables[group_idx]
                for keys in table.key_runs(run.compute_rank, run.position, run.end):
                    for i in range(keys.num_tokens):
                        size = self.scheduler.config.page_size
                        self.tiers.check_free(group_idx, run.compute_rank, (keys.row + i) // size)
                        tokens = self._tokens(requests[run.request_id])[: keys.position + i + 1]
                        self.written[group_idx, run.compute_rank, keys.row + i] = tuple(tokens)
            seen: dict[int, tuple[int, int]] = {}  # per request, hull of the keys seen
            for run in plan.query_runs:
                start = group.spec.first_key(run.position)
                low, high = seen.get(run.request_id, (start, run.end))
                seen[run.request_id] = (min(low, start), max(high, run.end))
            for request_id, (start, end) in seen.items():
                found = 0
                for rank in self._told(plan, request_id):
                    for keys in self.mirrors[rank][group_idx][request_id].key_runs(rank, start, end):
                        for i in range(keys.num_tokens):
                            found += 1
                            tokens = self._tokens(requests[request_id])[: keys.position + i + 1]
                            key = self.written[group_idx, rank, keys.row + i]
                            assert key == tuple(tokens), "not the key of this token behind these tokens"
                assert found == end - start, "the plan leaves out a rank that stores keys"
            step = plan.groups[group_idx]
            assert set(step.participants) <= set(plan.ranks)
            self._check_parts(plan, group_idx, step)

    def _check_parts(self, plan: Plan, group_idx: int, step: GroupStep) -> None:
        """Every rank derives segments between the plan's ranks, and participants are those whose segments cross."""
        crossing: set[int] = set()
        spec = self.scheduler.model.kv_groups[group_idx].spec
        for rank in plan.ranks:
            mirrors = self.mirrors[rank][group_idx]
            known = [r for r in plan.query_runs if r.compute_rank == rank or r.request_id not in plan.packed]
            segments = make_segments(known, mirrors, spec.window, spec.chunk, rank)
            assert {other for s in segments for other in (s.query_rank, s.key_rank)} <= set(plan.ranks)
            crossing |= {o for s in segments if s.query_rank != s.key_rank for o in (s.query_rank, s.key_rank)}
        assert tuple(sorted(crossing)) == step.participants

    def _tokens(self, request: Request) -> list[int]:
        """The tokens, and one more if a plan in flight samples it, or the drafts that it checks."""
        if request.drafts:
            return with_drafts(request)
        known = request.token_ids
        rows = [row for plan in self.in_flight.values() for row in plan.samples if row.request_id == request.request_id]
        return known + [fake_token(row) for row in rows if row.position == len(known) - 1]

    # -- all ranks are lost -------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """What was in flight is lost, and new ranks know and hold nothing."""
        self.scheduler.restart()
        self.in_flight.clear()
        self.written.clear()
        self.tiers.lose_ranks()
        self.states = FakeStates()
        self.mirrors = [[{} for _ in groups] for groups in self.mirrors]
        self.sender, self.receivers = PlanSender(), [PlanReceiver(rank) for rank in range(len(self.mirrors))]
        self.kept = [{} for _ in self.mirrors]
        assert not self.scheduler.running
        for allocators in self.scheduler.memory.allocators:
            for allocator in allocators:
                assert allocator.num_available == allocator.num_pages
                assert allocator.num_used == 0

    # -- a plan ends ------------------------------------------------------------------------------------------------

    def complete(self, plan: Plan) -> list[Request]:
        del self.in_flight[plan.plan_id]
        advanced = self.scheduler.update(self.answer(plan))
        self.scheduler.memory.check_integrity()
        return advanced

    def answer(self, plan: Plan) -> PlanResult:
        """What the plan's ranks say."""
        results = []
        token_of = self._sampled(plan)
        for rank in plan.ranks:
            mine = [run for run in plan.query_runs if run.compute_rank == rank]
            sampled = tuple(
                SampledToken(row.request_id, row.position + 1, token, _logprobs(token, row))
                for row, token in zip(plan.samples, token_of, strict=True)
                if any(run.request_id == row.request_id and run.position <= row.position < run.end for run in mine)
            )
            scored = tuple(
                ScoredRun(s.request_id, s.position + 1, tuple(TokenLogprobs(t, -1.0, 1, ()) for t in s.targets))
                for s in plan.scores
                if any(run.request_id == s.request_id and run.position <= s.position < run.end for run in mine)
            )
            failed = plan.graph is not None and plan.graph.run == "capture" and rank in self.cannot_capture
            step_s = self.rng.uniform(0.001, 1.0)
            results.append(RankResult(plan.plan_id, rank, sampled, scored, 0, 0, step_s=step_s, capture_failed=failed))
        assert sum(len(r.sampled) for r in results) == len(plan.samples), "one rank samples each row"
        assert sum(len(r.scored) for r in results) == len(plan.scores)
        self.rng.shuffle(results)
        return PlanResult(plan.plan_id, tuple(results))

    def _sampled(self, plan: Plan) -> list[int]:
        """Token of every row; behind a wrong draft one that no other row says, since it must not be kept."""
        inputs = {
            (run.request_id, run.position + i): token_id
            for run in plan.query_runs
            if isinstance(run.tokens, Literals)
            for i, token_id in enumerate(run.tokens.token_ids)
        }
        found: list[int] = []
        for i, row in enumerate(plan.samples):
            is_behind_draft = i > 0 and plan.samples[i - 1].request_id == row.request_id
            is_right = not is_behind_draft or inputs[row.request_id, row.position] == found[-1]
            found.append(fake_token(row) if is_right else VOCAB - 1 - row.position % 2)
        return found

    def first_plans(self) -> list[Plan]:
        """Those in flight that can end now: a rank runs its plans in order."""
        plans = list(self.in_flight.values())
        return [
            plan
            for i, plan in enumerate(plans)
            if not any(set(plan.ranks) & set(earlier.ranks) for earlier in plans[:i])
        ]

    # -- pages move --------------------------------------------------------------------------------------------------

    def send_moves(self) -> None:
        """Ranks take what they are told to move, behind all plans that they were told before."""
        for move in self.scheduler.memory.take_moves():
            self.tiers.begin(move, self.written, self.scheduler.config.page_size)

    def end_move(self) -> list[Request]:
        """A move ends, well or not."""
        moved = self.tiers.end(self.rng, self.written, self.scheduler.config.page_size)
        return self.scheduler.take_moved(moved)

    def submit_all(self) -> None:
        while True:
            plan = self.scheduler.schedule()
            self.send_moves()
            if plan is None:
                return
            self.submit(plan)

    def step(self) -> list[Request]:
        """Submit all that can start, then end one plan, or a move."""
        self.submit_all()
        assert self.in_flight or self.tiers.moves, "requests wait, but nothing runs"
        if self.tiers.moves and (not self.in_flight or self.rng.random() < 0.3):
            return self.end_move()
        return self.complete(self.rng.choice(self.first_plans()))

    def end_the_rest(self) -> None:
        """Plans of requests that have ended meanwhile, or that ran ahead of their last token; and moves."""
        for plan in list(self.in_flight.values()):
            assert self.complete(plan) == []
        self.send_moves()
        while self.tiers.moves:
            assert self.end_move() == []
            self.send_moves()

    def run_to_the_end(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_requests:
                self.end_the_rest()
                return
            self.step()
        raise AssertionError("requests do not end")


def assert_all_free(scheduler: Scheduler, *, ended: bool = True) -> None:
    """Assert that no page is held or promised, and nothing is in flight.

    Args:
        scheduler: whose.
        ended: whether no request is left either.
    """
    scheduler.memory.check_integrity()
    for rank, allocators in enumerate(scheduler.memory.allocators):
        for allocator in allocators:
            assert allocator.num_used == 0, f"rank {rank} lost pages"
            assert allocator.num_available == allocator.num_pages
    assert scheduler.memory.is_empty
    assert not scheduler.in_flight
    assert not scheduler.busy_ranks
    assert not (ended and scheduler.requests)
    assert not scheduler.cancelled


def check_finished(request: Request) -> None:
    params, output = request.params, request.output_token_ids
    ends = {*request.eos_token_ids, *params.stop_token_ids}
    if request.finish_reason is FinishReason.LENGTH:
        assert len(output) == params.max_tokens
        assert not ends & set(output)
    else:
        assert request.finish_reason is FinishReason.STOP
        assert output[-1] in ends
        assert not ends & set(output[:-1])
        assert len(output) > params.min_tokens or params.min_tokens == 0
    assert request.num_computed == len(request.token_ids) - 1
    if params.logprobs is not None:
        assert [entry.token_id for entry in request.logprobs] == output
        assert [entry.logprob for entry in request.logprobs] == [
            1.0 - position for position in range(request.prompt_len, len(request.token_ids))
        ]
    if params.prompt_logprobs is not None:
        assert [entry.token_id for entry in request.prompt_logprobs] == request.token_ids[1 : request.prompt_len]
        assert request.num_cached == 0
