"""The scheduler: decides once, for all ranks, what the next step computes.

Holds the queues, and who takes part in a plan. Must not know torch, processes, text or clocks: the same calls give the
same plans.
Read next: `longspan.scheduler.plan_writer`, which writes the plan; `longspan.engine.engine`, which drives this.

Note [Lanes]
    A plan names its ranks, and plans on disjoint ranks run at the same time. `schedule` therefore returns plans until
    no request's ranks are all idle. A request that must wait for a busy rank claims its other ranks, so that a stream
    of requests on single ranks cannot starve one that needs several.

Note [What a step mixes]
    Tokens of many requests share the weights that a step reads, so a step takes all it can: every decode on its ranks,
    and chunks of prompts while token budgets and `max_step_ms` last. Only what moves must be of one kind, because a
    step has one strategy: decodes with keys on several ranks never share a step with such chunks. They take turns.

Note [Preemption]
    When no rank has room for the next page of a decode, cached pages have gone first, then every rank was tried, and
    now the youngest running request gives all its pages back and waits at the head of the queue. Its tokens are kept:
    it is computed again, often from pages that are still cached. The oldest request is preempted only if it is alone
    and has outgrown a rank that is smaller than others, so all end.

    A request is also preempted, once at most, where RoPE has other frequencies for its length than before
    (`RopeLengths.is_recomputed`), and then finds nothing of its own in the cache.

Note [Running ahead]
    A rank that has to wait for its next plan after every token waits longest where steps are shortest. So, with
    `async_scheduling`, while a plan of decodes is in flight and no request waits for its ranks, the next one is
    submitted behind it: the same requests, one token further, each token `SampledBy` the plan before. A request that
    ends meanwhile has computed one token in vain. Its pages are free at once all the same: a rank runs its plans in
    order, so whatever takes them comes later.

Note [Lost ranks]
    When the ranks are lost (`restart`), every running request goes back to the queue, as after a preemption. Whoever
    was in flight may have been the reason. After two such losses since which it got no further, a request is a suspect:
    suspects run one at a time and nobody beside them, until they get further than before. So if the ranks are lost
    twice more, the one in flight is to blame, and the others are not. Once more may be chance.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from operator import attrgetter
from typing import NamedTuple

from longspan.config import EngineConfig
from longspan.costmodel.parameters import Costs
from longspan.costmodel.step_time import StepTime
from longspan.plan.moves import Moved
from longspan.plan.types import Plan, PlanResult, SampledToken
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.chunks import Chunks
from longspan.scheduler.drafting import Drafting
from longspan.scheduler.filling import ChosenStep, fill_step
from longspan.scheduler.intake import Intake
from longspan.scheduler.lanes import Lanes
from longspan.scheduler.load import RankLoad
from longspan.scheduler.loading import Loading
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.plan_writer import PlanWriter
from longspan.scheduler.request import Constraint, Request
from longspan.scheduler.run_ahead import RunAhead
from longspan.scheduler.step_graphs import StepGraphs
from longspan.scheduler.suspects import Suspects
from longspan.scheduler.turns import Turns
from longspan.types import Adapter, FinishReason, ModelSpec, Phase, SamplingParams

_by_age = attrgetter("request_id")


class InFlight(NamedTuple):
    """A plan that has not come back."""

    plan: Plan
    requests: list[Request]
    """That it computes."""
    flops: float
    """Of the busiest rank (`Chunks.busiest`)."""


class Scheduler:
    """Continuous batching: first come first served at admission, then whoever waited longest leads the next step.

    So no request starves, and a token waits for one chunk of prefill per rank at most, however long a prompt is and
    however many wait.
    """

    def __init__(self, model: ModelSpec, config: EngineConfig, num_pages: Sequence[Sequence[int]]) -> None:
        """Begin without requests.

        Args:
            model: its KV groups, vocabulary and limits.
            config: of the engine.
            num_pages: pages of every pool, [rank][KV group]; behind a rank's groups slots of states, if the model has
                recurrent layers.
        """
        self.model, self.config = model, config
        self.memory = KVMemory(model, config, num_pages)
        self.step_time = StepTime(model, config.num_threads)
        self._graphs = StepGraphs(model, config, num_pages)
        self.writer = PlanWriter(model, config, self.memory, self._graphs)
        self.intake = Intake(model, config, self.memory.placer)
        """Checks requests; any thread may use it."""
        self._chunks = Chunks(config, self.memory.placer.geometry, self.step_time)
        self._turns = Turns(config.context_parallel_size)
        self._lanes = Lanes(self._turns, config.context_parallel_size)
        self._idle: dict[int, Request] = {}
        """Running requests that are neither in flight nor ready: new ones, and those that lack a page."""
        self._held: dict[int, Request] = {}
        """Running requests that wait for drafts."""
        self.drafting = Drafting(model, config, self._chunks)
        """Drafts of running requests."""
        self._ahead = RunAhead(config.page_size, self._chunks, self._extend, self.drafting.pays)
        self._load = RankLoad(config.context_parallel_size)
        self._suspects = Suspects()
        self.loading = Loading(self.memory, self.step_time)
        """Running requests that wait for pages of a tier."""
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """The oldest first."""
        self.requests: dict[int, Request] = {}
        """All requests that have not ended, by their numbers."""
        self.in_flight: dict[int, InFlight] = {}
        """Plans that have not come back, by their numbers."""
        self.busy_ranks: set[int] = set()
        """Ranks with a plan in flight."""
        self._num_plans = [0] * config.context_parallel_size
        """Plans in flight per rank."""
        self.cancelled: set[int] = set()
        """Numbers of requests that end when a plan that computes them comes back."""
        self.num_preemptions = 0
        self.next_plan_id = 0
        self.next_request_id = 0
        self._unreported: dict[int, set[int]] = {rank: set() for rank in range(config.context_parallel_size)}

    def use_costs(self, costs: Costs, striped_from: int | None, weights: Sequence[float] | None = None) -> None:
        """Choose by what the ranks measured: a scheduler is there before they are. Call it before the first plan.

        Args:
            costs: what ranks and links can do.
            striped_from: length from which on prompts are striped by default; None leaves it as it is.
            weights: what every rank's part of a prompt is in proportion to; None leaves it as it is.
        """
        self.writer.use_costs(costs)
        if weights is not None:
            self.memory.placer.weigh(weights)
            self._chunks.use_geometry(self.memory.placer.geometry)
        if striped_from is not None:
            self.memory.placer.stripe_from(striped_from)

    # -- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        page_hashes: list[bytes] | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            prompt_token_ids: the prompt.
            params: how to continue it.
            constraint: which tokens are allowed next, or None.
            page_hashes: what `Intake.check` returned, if it has been called already.
            adapter: what it is continued with beside the model, which all ranks have loaded; None for none.

        Raises:
            ConfigError: the prompt is empty, too long for the model, or holds a token that it does not know.
            CapacityError: it would not fit even on empty ranks.
        """
        prompt = list(prompt_token_ids)
        request = self.intake.take(self.next_request_id, prompt, params, constraint, page_hashes, adapter)
        self.next_request_id += 1
        self.requests[request.request_id] = request
        self.drafting.begin(request)
        self._enqueue(request)
        return request

    def _enqueue(self, request: Request) -> None:
        """Put a request in its place among those that wait."""
        if not self.waiting or self.waiting[-1].queue_key <= request.queue_key:
            self.waiting.append(request)
        else:
            self.waiting.insert(bisect_right(self.waiting, request.queue_key, key=lambda r: r.queue_key), request)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.waiting or self.running)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, whatever its state, and free its pages. A plan that computes it changes nothing any more."""
        request.end(reason)
        self.cancelled.discard(request.request_id)
        self.requests.pop(request.request_id, None)
        if request.drafter is not None:
            request.drafter.proposer.end()
        if request.allocation is None:
            self.waiting.remove(request)
        else:
            self._stop(request)
        if self.memory.tiers is not None:
            self.memory.tiers.note_used(request.page_hashes)
        for rank in request.delivery.involved_ranks:
            self._unreported[rank].add(request.request_id)

    def cancel(self, request: Request) -> None:
        """End a request that nobody waits for any more, at any moment; `update` does not return it again.

        Its pages are free before the next step that would have computed it.
        """
        if request.finish_reason is not None:
            return
        if request.in_flight:
            self.cancelled.add(request.request_id)
        else:
            self.finish(request, FinishReason.ABORT)

    def _stop(self, request: Request) -> None:
        """Take a request from those that run, and all pages from it."""
        index = bisect_left(self.running, request.request_id, key=lambda r: r.request_id)
        assert self.running[index] is request
        del self.running[index]
        self._lanes.discard((request,))
        self._idle.pop(request.request_id, None)
        self._held.pop(request.request_id, None)
        self._load.remove(request)
        if request in self.loading:
            self.loading.leave(request)
        else:
            self.memory.free(request)

    def _preempt(self, request: Request) -> None:
        """Take all pages from a running request that is not in flight; it will be computed again."""
        self._stop(request)
        request.preempt()
        self.num_preemptions += 1
        self._enqueue(request)

    def restart(self) -> None:
        """The ranks were lost, and new ones hold nothing: compute all running requests again, with their tokens kept.

        See Note [Lost ranks]. Plans in flight are forgotten; the caller hands in no result of theirs any more.
        """
        in_flight = {request.request_id for flight in self.in_flight.values() for request in flight.requests}
        self.in_flight.clear()
        self.busy_ranks.clear()
        self._num_plans = [0] * self.config.context_parallel_size
        self._ahead.clear()
        for request in [request for request in self.running if request.request_id in self.cancelled]:
            self.finish(request, FinishReason.ABORT)
        for request in self.running:
            request.lose_ranks(was_in_flight=request.request_id in in_flight)
        for request in self.waiting:
            request.forget_ranks()
        self.waiting = deque(sorted([*self.waiting, *self.running], key=lambda request: request.queue_key))
        self.running = []
        self._lanes.clear()
        self._idle.clear()
        self._held.clear()
        self._load.clear()
        self._suspects.note_loss()
        self.loading.clear()
        self.memory.forget_all()
        for unreported in self._unreported.values():
            unreported.clear()
        self._turns.forget_ranks()
        self._graphs.forget_ranks()

    def take_over(self, other: "Scheduler") -> None:
        """Go on with the requests of a scheduler for other ranks, which has lost them: all of them wait.

        Args:
            other: not to be used any more.
        """
        assert not other.running, "restart comes first"
        self.waiting, self.requests = other.waiting, other.requests
        self._suspects.note_loss()
        self.num_preemptions = other.num_preemptions
        self.next_plan_id, self.next_request_id = other.next_plan_id, other.next_request_id
        self.writer.take_over(other.writer)
        self.memory.take_over(other.memory)
        self.drafting.take_over(other.drafting)

    # -- plans -------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next plan to submit, or None when nothing can start now."""
        self._admit()  # also while all ranks are busy: whoever has a place does not wait for one
        if len(self.busy_ranks) == self.config.context_parallel_size:
            return self._run_ahead()
        suspect = self._suspects.find(self.requests.values(), self.running)
        if suspect is not None:
            return self._schedule_alone(suspect)
        self._make_ready()
        lead = self._lanes.lead(self.busy_ranks, self.next_plan_id, len(self.running))
        if lead is None:
            if not self.running and self.waiting and self.waiting[0] is not self.memory.refused:
                return self.schedule()  # the only one has outgrown its rank, and is let in again on a larger one
            return self._run_ahead()
        ready = self._lanes.members(lead, self.next_plan_id, len(self.running))
        return self._write_plan(fill_step(lead, ready, self.config, self._chunks, self.running))

    def _make_ready(self) -> None:
        """Give idle requests their next page, the oldest first: who is preempted for it is younger."""
        if not self._idle:
            return
        idle, self._idle = sorted(self._idle.values(), key=_by_age), {}
        has_drafts, page_size = self.drafting.is_on, self.config.page_size
        ready: list[tuple[Request, AbstractSet[int]]] = []
        for request in idle:
            allocation = request.allocation
            if allocation is None:
                continue  # preempted for an older one
            if len(request.token_ids) <= allocation.num_pages * page_size or self._has_page(request, allocation):
                if has_drafts:
                    self._place_drafts(request, allocation)
                ready.append((request, self._chunks.next_ranks(request, allocation)))
            elif request.allocation is not None:
                self._idle[request.request_id] = request
        self._lanes.put(ready)

    def _schedule_alone(self, request: Request) -> Plan | None:
        """The next plan of a request with nobody beside it."""
        if self.in_flight:
            return self._run_ahead()
        if request in self.loading:
            return None
        allocation = request.allocation
        assert allocation is not None
        if not self._has_page(request, allocation):
            if request in self.running:
                return self._run_ahead()
            return self.schedule()  # it gave its pages to those that it kept waiting
        self._place_drafts(request, allocation)
        ranks = self._chunks.next_ranks(request, allocation)
        lead = self._turns.of(request, ranks, self.next_plan_id, len(self.running))
        return self._write_plan(fill_step(lead, [lead], self.config, self._chunks, self.running))

    def _run_ahead(self) -> Plan | None:
        """The plan behind one of decodes that is in flight, unless a request waits for a rank or for a page."""
        if not self.config.async_scheduling or self._idle or self._held or len(self._lanes):
            return None
        found = self._ahead.find(self.cancelled)
        if found is None:
            return None
        plan, chosen = found
        return self._write_plan(ChosenStep(set(plan.ranks), chosen, Phase.DECODE, behind=plan))

    def _admit(self) -> None:
        """Let requests in, in order, while they fit."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return
        if self.waiting[0] is self.memory.refused:
            return
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            if not self.memory.admit(self.waiting[0], self._load.per_rank(self.memory.placer.geometry.tokens_per_rank)):
                return
            request = self.waiting.popleft()
            request.delivery.wait_from(self.next_plan_id - 1)  # -1 would overtake all others
            insort(self.running, request, key=lambda r: r.request_id)
            self._load.note(request)
            if not self.loading.begin(request):
                self._let_go_on(request)

    def _extend(self, request: Request) -> bool:
        """Place one more page of a request; False when no rank has room."""
        is_placed = self.memory.extend(request)
        if is_placed:
            self._load.note(request)
        return is_placed

    def _has_page(self, request: Request, allocation: Allocation) -> bool:
        """Make sure that the request's next token has a page, at the cost of younger requests if need be."""
        while len(request.token_ids) > allocation.num_pages * allocation.page_size:
            if self._extend(request):
                continue
            if self.running[-1] is request:
                self._preempt(request)  # also if it is alone: it has outgrown a smaller rank, and goes to a larger one
                return False
            idle = [r for r in self.running if r.request_id > request.request_id and not r.in_flight]
            if not idle:
                return False  # a younger one is in flight: its turn to give comes when it is back
            self._preempt(idle[-1])
        return True

    def _place_drafts(self, request: Request, allocation: Allocation) -> None:
        """Place pages for the drafts of a request whose next token has one, while ranks have room."""
        end = len(request.token_ids) + self.drafting.num_wanted(request)
        while end > allocation.num_pages * allocation.page_size and self._extend(request):
            pass

    def _write_plan(self, step: ChosenStep) -> Plan:
        """The plan of a step that is decided; it is in flight from now on."""
        if step.behind is None and self.drafting.is_on:
            step = self.drafting.choose(step)
        ranks, chosen, movers, flops, behind = step
        released: set[int] = set()
        for rank in ranks:
            if unreported := self._unreported[rank]:
                released |= unreported
                unreported.clear()
        plan = self.writer.write(self.next_plan_id, ranks, chosen, movers, released, behind)
        self.next_plan_id += 1
        self._turns.note_plan(plan)
        if plan.phase is Phase.PREFILL:
            self._lanes.note_prefill(ranks)
        self.busy_ranks |= ranks
        for rank in ranks:
            self._num_plans[rank] += 1
        requests = [request for request, _ in chosen]
        self._lanes.discard(requests)
        if self._idle or self._held:
            for request in requests:
                self._idle.pop(request.request_id, None)
                self._held.pop(request.request_id, None)
        self._ahead.note_plan(plan, requests, behind)
        self.in_flight[plan.plan_id] = InFlight(plan, requests, flops)
        return plan

    # -- results -----------------------------------------------------------------------------------------------------

    def update(self, result: PlanResult) -> list[Request]:
        """Take in what a plan's ranks answered.

        Returns:
            The requests that the plan advanced, without those that were cancelled meanwhile. Those with a
            `finish_reason` have ended; `finish` has been called.
        """
        plan, requests, flops = self.in_flight.pop(result.plan_id)
        for rank in plan.ranks:
            self._num_plans[rank] -= 1
            if not self._num_plans[rank]:
                self.busy_ranks.discard(rank)
        self._ahead.note_end(plan.plan_id)
        self._graphs.note_result(result)
        if plan.phase is Phase.PREFILL and (self.config.max_step_ms is not None or self.memory.tiers is not None):
            flops = flops or self._chunks.flops_of(plan.query_runs)
            self.step_time.learn(flops, max(rank_result.step_s for rank_result in result.ranks))
        self.drafting.note(plan, result)
        requests = [request for request in requests if request.finish_reason is None]  # the others have ended meanwhile
        failed = self._take_sampled(plan, result, requests)
        computed = {run.request_id: run.end for run in plan.query_runs}
        for request in requests:
            is_prompt = request.num_computed < request.prompt_len
            request.note_computed(computed[request.request_id])
            if is_prompt:
                self._load.note(request)
            self.memory.release_copied(request)
        for request in requests:
            if request.request_id in failed and request.finish_reason is FinishReason.ERROR:
                self.memory.withdraw(request)
            else:
                self.memory.publish(request)
        scored = sorted((run for r in result.ranks for run in r.scored), key=lambda run: (run.request_id, run.position))
        for run in scored:
            if (going_on := self.requests.get(run.request_id)) is not None:
                going_on.add_prompt_logprobs(run.logprobs)
        advanced = list(self._settle(requests))
        if plan.phase is Phase.DECODE and self.drafting.source is not None:
            self._ask_for_drafts(advanced)
        return advanced

    def _ask_for_drafts(self, advanced: Sequence[Request]) -> None:
        """Hold requests of a decode step back whose drafts come later, if that pays."""
        going_on = [r for r in advanced if r.finish_reason is None and r.allocation is not None]
        for request in self.drafting.ask(going_on):
            if self._idle.pop(request.request_id, None) is not None:
                self._held[request.request_id] = request

    def take_drafts(self, requests: Iterable[Request]) -> None:
        """Let requests go on for which there are drafts now, or none will come."""
        for request in requests:
            if self._held.pop(request.request_id, None) is not None:
                self._idle[request.request_id] = request

    def follow(self, request: Request, token_ids: Sequence[int], pauses_at: int) -> None:
        """Let a request go on behind another one's tokens. Arguments as in `Request.follow`.

        Args:
            request: has not ended, and is not in flight.
        """
        request.follow(token_ids, pauses_at, self.config.page_size)
        if request.allocation is not None:
            self.memory.slide(request)  # as far as it was given more, before pages for these are taken
            self._lanes.discard((request,))
            self._let_go_on(request)

    def _let_go_on(self, request: Request) -> None:
        """Let a running request that is not in flight take its next step, unless it waits to be given more tokens."""
        self._idle.pop(request.request_id, None)
        if not request.is_paused:
            self._idle[request.request_id] = request

    def _take_sampled(self, plan: Plan, result: PlanResult, requests: Iterable[Request]) -> set[int]:
        """Give requests the tokens that a plan sampled for them; return the numbers of those with a row that failed."""
        asked = {row.request_id for row in plan.samples}
        sampled: dict[int, dict[int, SampledToken]] = {}
        for rank_result in result.ranks:
            for token in rank_result.sampled:
                sampled.setdefault(token.request_id, {})[token.position] = token
        rows = sorted((row for r in result.ranks for row in r.failed), key=lambda row: row.position, reverse=True)
        failed = {row.request_id: row.reason for row in rows}  # the first one's
        for request in requests:
            request_id = request.request_id
            if request_id in asked:
                num_drafts = len(request.drafts)
                num_right = request.take_sampled(sampled.get(request_id, {}), failed.get(request_id))
                if num_drafts:
                    self.drafting.note_checked(num_drafts, num_right)
        return set(failed)

    def take_moved(self, moved: Moved) -> list[Request]:
        """Take in a rank's answer to a move of pages.

        Returns:
            The request that goes on with it, unless it was cancelled meanwhile.
        """
        assert self.memory.tiers is not None
        ended = self.loading.take(*self.memory.tiers.take(moved))
        if ended is None or not ended.is_wanted:
            return []
        request = ended.request
        if request.request_id in self.cancelled:
            self.finish(request, FinishReason.ABORT)
            return []
        if not ended.has_all:
            self._stop(request)
            request.give_back()
            self._enqueue(request)
            return []
        self._load.note(request)
        request.delivery.wait_from(self.next_plan_id - 1)
        self._let_go_on(request)
        return [request]

    def _settle(self, requests: Iterable[Request]) -> Iterable[Request]:
        """End what has ended; the others lose the pages that their windows have left."""
        for request in requests:
            if request.request_id in self.cancelled:
                self.finish(request, FinishReason.ABORT)
                continue
            if request.finish_reason is not None:
                self.finish(request, request.finish_reason)
            elif request.crosses(len(request.token_ids)):
                self._preempt(request)
                request.cross()
            else:
                self.memory.slide(request)
                if not (request.in_flight or request.is_paused):
                    self._idle[request.request_id] = request
            yield request
