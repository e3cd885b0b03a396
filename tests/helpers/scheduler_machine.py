"""A random history of one scheduler with simulated ranks: what hypothesis may do, and what must hold after each action.

Memory is so tight that eviction and preemption are ordinary. After every action the books must balance, and what the
prefix cache offers must be what it says; at the end every request has ended, with the tokens that it has alone.
"""

import random
from collections import Counter
from unittest import mock

import pytest
from drafts import SPECULATION, check_all_drafts, scripted
from fake_ranks import (
    VOCAB,
    FakeRanks,
    assert_all_free,
    check_finished,
    make_config,
    make_model,
    pools_of,
    tokens_alone,
)
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from longspan.config import EngineConfig
from longspan.errors import CapacityError
from longspan.plan.types import SampledBy
from longspan.scheduler import tiers
from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.scheduler.suspects import SUSPECT_CRASHES
from longspan.sharding.capacity import pages_by_group
from longspan.types import FinishReason, Phase, SamplingParams

TEXTS = tuple([[random.Random(f"{i} {j}").randrange(VOCAB) for j in range(160)] for i in range(3)])
"""Prompts begin with a part of one of these."""

REACHED: Counter[str] = Counter()
"""What happened in all runs of the machine."""


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    page_size, num_ranks = draw(st.sampled_from([4, 1, 2, 16])), draw(st.sampled_from([2, 3, 1, 4, 5, 8]))
    stripe_size, budget = page_size * draw(st.sampled_from([2, 1, 4, 16])), draw(st.sampled_from([16, 3, 8, 40, 1]))
    # A rank with less than half of the largest weight may be left without a page by a budget of one.
    least = 1.0 if budget < 2 * page_size else 0.5 if budget < 4 * page_size else 0.25
    weights = draw(
        st.none() | st.lists(st.sampled_from([1.0, 0.5, 0.7, least]), min_size=num_ranks, max_size=num_ranks)
    )
    return make_config(
        num_ranks,
        page_size=page_size,
        stripe_size=stripe_size,
        max_num_batched_tokens=budget,
        rank_weights=weights,
        max_num_seqs=draw(st.sampled_from([64, 5, 2, 1])),
        placement=draw(st.sampled_from(["auto", "auto", "packed", "striped", "spill"])),
        strategy=draw(st.sampled_from(["auto", "pass_q", "pass_kv", "gather_kv"])),
        decode_strategy=draw(st.sampled_from([None, "pass_q", "pass_kv", "gather_kv"])),
        max_step_ms=draw(st.sampled_from([None, 1, 100, 1000])),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        state_snapshot_tokens=page_size * draw(st.sampled_from([1, 2, 8])),
        async_scheduling=draw(st.booleans()),
        speculative_config=draw(st.sampled_from([SPECULATION, None, {**SPECULATION, "num_speculative_tokens": 9}])),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """A part of a common text, then a few tokens of one's own."""
    length = draw(st.sampled_from([1, 2, 5, 15, 16, 17, 31, 32, 33, 64, 65, 100, 150]))
    own = draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))
    return draw(st.sampled_from(TEXTS))[:length] + own


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.sampled_from([9, 1, 2, 30, 50]))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.sampled_from([0, 1, max_tokens])),
        seed=draw(st.integers(0, 200)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (3, 4)])),
        logprobs=draw(st.sampled_from([None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
    )


def all_tokens_alone(request: Request) -> list[int]:
    """Prompt and output of a request with nothing beside it."""
    return request.token_ids[: request.prompt_len] + tokens_alone(request)


def has_copies(request: Request) -> bool:
    """Whether pages of other ranks are to be copied for the request."""
    return request.allocation is not None and bool(request.allocation.copies)


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler with simulated ranks."""

    @initialize(
        config=configs(),
        windows=st.sampled_from([(None,), (None, 5), (None, 20, 3), (7,), (1, 30)]),
        memory_tokens=st.sampled_from([100, 60, 30, 200, 8]),
        num_slots=st.sampled_from([None, None, 2, 1, 5, 20]),
        wrong=st.sampled_from([0.3, 0.0, 1.0]),
        seed=st.integers(0, 1000),
    )
    def start(
        self,
        config: EngineConfig,
        windows: tuple[int | None, ...],
        memory_tokens: int,
        num_slots: int | None,
        wrong: float,
        seed: int,
    ) -> None:
        self.begin(config, windows, memory_tokens, num_slots, wrong, seed)

    def begin(
        self,
        config: EngineConfig,
        windows: tuple[int | None, ...],
        memory_tokens: int,
        num_slots: int | None,
        wrong: float,
        seed: int,
    ) -> None:
        model = make_model(*windows, has_state=num_slots is not None)
        num_pages = max(1, memory_tokens // config.page_size)
        pages = pages_by_group(model, num_pages, config.page_size, config.max_num_batched_tokens)
        pools = pools_of(config, pages)
        slots = () if num_slots is None else (num_slots,)
        self.scheduler = Scheduler(model, config, tuple([(*of_rank, *slots) for of_rank in pools]))
        self.scheduler.drafting.make_proposer = scripted(all_tokens_alone, wrong, VOCAB)
        self.ranks = FakeRanks(self.scheduler, random.Random(seed), checks_books=False)
        self.requests: list[Request] = []
        self.ended_early: set[int] = set()
        self.last_plan: dict[int, int] = {}

    @property
    def alive(self) -> list[Request]:
        return [request for request in self.requests if request.finish_reason is None]

    @rule(prompt=prompts(), params=sampling_params())
    def add(self, prompt: list[int], params: SamplingParams) -> None:
        try:
            self.requests.append(self.scheduler.add_request(prompt, params))
        except CapacityError:
            REACHED["refused"] += 1

    @rule(
        text=st.sampled_from(TEXTS),
        lengths=st.lists(st.integers(1, 80), min_size=2, max_size=10),
        params=sampling_params(),
    )
    def add_several(self, text: list[int], lengths: list[int], params: SamplingParams) -> None:
        """Prompts that begin alike, some of them the same."""
        for i, length in enumerate(lengths):
            self.add(text[:length] + [i] * (i % 3), params)

    @rule(
        text=st.sampled_from(TEXTS),
        length=st.integers(8, 60),
        num_steps=st.integers(0, 30),
        params=sampling_params(),
        cancels=st.booleans(),
    )
    def ask_again_and_again(
        self, text: list[int], length: int, num_steps: int, params: SamplingParams, cancels: bool
    ) -> None:
        """A common prompt that one rank has; then more requests with it than that rank should take."""
        self.add(text[:length], params)
        self.go_on(num_steps)
        for i in range(2 * self.scheduler.config.context_parallel_size):
            self.add(text[:length] + [i] * 3, params)
        self.submit()
        for request in self.alive if cancels else []:
            if has_copies(request) and not request.in_flight:
                self.cancel(request)

    @precondition(lambda self: any(r.num_generated for r in self.requests))
    @rule(data=st.data(), more=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), params=sampling_params())
    def continue_a_chat(self, data: st.DataObject, more: list[int], params: SamplingParams) -> None:
        before = data.draw(st.sampled_from([r for r in self.requests if r.num_generated]))
        self.add(before.token_ids + more, params)

    @rule()
    def submit(self) -> None:
        while True:
            plan = self.scheduler.schedule()
            self.ranks.send_moves()
            REACHED["waited for pages"] += len(self.scheduler.loading)
            if plan is None:
                return
            self.ranks.submit(plan)
            self.note_plan()

    @precondition(lambda self: self.ranks.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self.finish_plan(data.draw(st.sampled_from([plan.plan_id for plan in self.ranks.first_plans()])))

    @precondition(lambda self: self.alive)
    @rule(num_steps=st.integers(1, 60))
    def go_on(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.scheduler.has_requests:
                self.step()

    @rule(
        num_requests=st.integers(2, 12), length=st.integers(1, 20), num_steps=st.integers(10, 80), cancels=st.booleans()
    )
    def outgrow_the_memory(self, num_requests: int, length: int, num_steps: int, cancels: bool) -> None:
        """Short prompts with long answers; who is preempted may be cancelled at once."""
        for i in range(num_requests):
            self.add([i] * length, SamplingParams(max_tokens=50, seed=i, ignore_eos=True))
        for _ in range(num_steps):
            self.go_on(1)
            preempted = [request for request in self.scheduler.waiting if request.num_preemptions]
            if preempted and cancels:
                self.cancel(preempted[0])
                return

    @precondition(lambda self: any(request.in_flight for request in self.alive))
    @rule(data=st.data())
    def cancel_in_flight(self, data: st.DataObject) -> None:
        self.cancel(data.draw(st.sampled_from([request for request in self.alive if request.in_flight])))

    @precondition(lambda self: self.scheduler.waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        preempted = [request for request in self.scheduler.waiting if request.num_preemptions]
        self.cancel(data.draw(st.sampled_from(preempted or list(self.scheduler.waiting))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel_any(self, data: st.DataObject) -> None:
        """Those that have ended, or were cancelled before, too."""
        self.cancel(data.draw(st.sampled_from(self.requests)))

    def cancel(self, request: Request) -> None:
        if request.finish_reason is None:
            is_waiting = request in self.scheduler.waiting
            REACHED["cancelled in flight"] += request.in_flight
            REACHED["cancelled when waiting"] += is_waiting
            REACHED["cancelled when preempted"] += is_waiting and request.num_preemptions > 0
            REACHED["cancelled before its copies"] += has_copies(request) and not request.in_flight
            self.ended_early.add(request.request_id)
        self.scheduler.cancel(request)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def finish_early(self, data: st.DataObject) -> None:
        """As a stop string does."""
        request = data.draw(st.sampled_from(self.alive))
        self.ended_early.add(request.request_id)
        self.scheduler.finish(request, FinishReason.STOP)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "ranks"):
            check_books(self.scheduler)

    @invariant()
    def the_cache_tells_the_truth(self) -> None:
        if hasattr(self, "ranks"):
            self.ranks.check_cached()

    @invariant()
    def who_was_refused_would_be_refused_again(self) -> None:
        """The memory remembers a refusal; nothing that makes room or a hit may leave it standing."""
        memory = self.scheduler.memory if hasattr(self, "ranks") else None
        if memory is not None and memory.refused in self.scheduler.waiting:
            assert memory.choose(memory.refused, [0.0] * self.scheduler.config.context_parallel_size) is None
            REACHED["refused again"] += 1

    @invariant()
    def requests_are_let_in_in_the_order_they_came(self) -> None:
        """Whom a preemption sent back is first again, though a younger one may have been in flight at that moment."""
        if hasattr(self, "ranks"):
            waiting = [request.request_id for request in self.scheduler.waiting]
            assert waiting == sorted(waiting)
            new = [request.request_id for request in self.scheduler.waiting if not request.num_preemptions]
            assert all(request.request_id < new[0] for request in self.scheduler.running if new)

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.submit()
        moves, in_flight = self.ranks.tiers.moves, self.ranks.in_flight
        assert in_flight or moves, "requests wait, but nothing runs"
        if moves and (not in_flight or self.ranks.rng.random() < 0.3):
            self.end_a_move()
            return
        self.finish_plan(self.ranks.rng.choice(self.ranks.first_plans()).plan_id)

    def end_a_move(self) -> None:
        for request in self.ranks.end_move():
            assert request.request_id not in self.ended_early, "take_moved returns a request that was cancelled"

    def finish_plan(self, plan_id: int) -> None:
        for request in self.ranks.complete(self.ranks.in_flight[plan_id]):
            REACHED["ended by a plan that another stood behind"] += request.finish_reason is not None and any(
                run.request_id == request.request_id
                for plan in self.ranks.in_flight.values()
                for run in plan.query_runs
            )
            assert request.request_id not in self.ended_early, "update returns a request that was cancelled"

    def note_plan(self) -> None:
        """Count what is of interest, and how long requests wait for their turn."""
        plan = self.ranks.plans[-1]
        REACHED[f"{len(plan.ranks)} ranks"] += 1
        REACHED["plans"] += 1
        for step in plan.groups:
            REACHED[step.strategy.value] += 1
        copied = [copy for copy in plan.page_copies if copy.source.rank != copy.target.rank]
        REACHED["moved states"] += sum(
            step.source is not None and step.source.rank != step.target.rank for step in plan.states
        )
        REACHED["hits from states"] += sum(
            step.source not in (None, step.target) and step.source.rank == step.target.rank for step in plan.states
        )
        REACHED["kept states"] += sum(len(step.kept) for step in plan.states)
        REACHED["copied pages"] += sum(copy.source.num_pages for copy in copied)
        num_requests = len({run.request_id for run in plan.query_runs})
        in_flight = [r for r in self.scheduler.running if r.in_flight and r not in self.scheduler.loading]
        if any(request.num_crashes >= SUSPECT_CRASHES for request in in_flight):
            assert len(in_flight) == 1, "a suspect is not alone"
            REACHED["suspects alone"] += 1
        REACHED["batch"] += num_requests > 1
        REACHED["drafts"] += plan.has_drafts
        REACHED["drafts on several ranks"] += any(
            len({run.compute_rank for run in plan.query_runs if run.request_id == request.request_id}) > 1
            for request in in_flight
            if request.drafts
        )
        REACHED["drafts beside prompts"] += plan.has_drafts and plan.phase is Phase.PREFILL
        REACHED["ran ahead"] += isinstance(plan.query_runs[0].tokens, SampledBy)
        REACHED["mixed"] += (
            plan.phase is Phase.PREFILL
            and num_requests > 1
            and any(
                request.phase is Phase.DECODE and request.delivery.last_plan_id == plan.plan_id
                for request in self.scheduler.running
            )
        )
        for request in self.scheduler.running:
            since = self.last_plan.setdefault(request.request_id, plan.plan_id)
            if request.in_flight or any(other.num_crashes >= SUSPECT_CRASHES for other in self.scheduler.running):
                self.last_plan[request.request_id] = plan.plan_id
            else:
                waited = plan.plan_id - since
                REACHED["longest wait"] = max(REACHED["longest wait"], waited)
                num_ranks = self.scheduler.config.context_parallel_size
                assert waited <= 4 * num_ranks * (1 + len(self.scheduler.running)), "starved"
        for request in self.scheduler.waiting:
            self.last_plan.pop(request.request_id, None)

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return
        while self.scheduler.has_requests:
            self.step()
        self.ranks.end_the_rest()
        for request in self.requests:
            assert request.finish_reason is not None
            if request.request_id not in self.ended_early:
                check_finished(request)
                assert request.output_token_ids == tokens_alone(request)
            else:
                assert request.output_token_ids == tokens_alone(request)[: request.num_generated]
            REACHED["hit tokens"] += request.num_cached
            REACHED["requests"] += 1
        self.ranks.check_cached()
        assert_all_free(self.scheduler)
        REACHED["runs"] += 1
        REACHED["right drafts"] += self.scheduler.drafting.num_accepted
        REACHED["wrong drafts"] += self.scheduler.drafting.num_rejected
        REACHED.update({f"pages {what}": count for what, count in self.ranks.tiers.counts.items()})
        REACHED["preemptions"] += self.scheduler.num_preemptions
        allocators = [allocator for allocators in self.scheduler.memory.allocators for allocator in allocators]
        REACHED["evicted pages"] += sum(allocator.num_evicted for allocator in allocators)


def run_machine(
    max_examples: int,
    *,
    is_fixed: bool,
    base: type[SchedulerMachine] = SchedulerMachine,
    num_steps: int = 30,
    number: int = 0,
) -> None:
    """Run the machine. Args: `is_fixed` takes the examples of `number` every time, for one version of hypothesis."""
    REACHED.clear()
    with pytest.MonkeyPatch.context() as patch:
        check_all_drafts(patch)
        _run_machine(max_examples, is_fixed=is_fixed, base=base, num_steps=num_steps, number=number)


def _run_machine(
    max_examples: int, *, is_fixed: bool, base: type[SchedulerMachine], num_steps: int, number: int
) -> None:

    class Machine(base):
        pass

    with mock.patch.object(
        tiers, "FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30}
    ):  # else nothing is loaded: these models compute nothing
        run_state_machine_as_test(
            seed(number)(Machine) if is_fixed else Machine,
            settings=settings(
                max_examples=max_examples,
                stateful_step_count=num_steps,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
