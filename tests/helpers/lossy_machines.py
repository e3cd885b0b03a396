"""Random histories of a scheduler whose ranks are lost, and whose pages outlive the pools: two more machines.

Read next: `scheduler_machine`, what happens without them.
"""

import random

from fake_ranks import VOCAB, assert_all_free
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from msgspec import structs
from scheduler_machine import REACHED, TEXTS, SchedulerMachine, configs, sampling_params

from longspan.config import EngineConfig
from longspan.types import FinishReason, SamplingParams


class CrashingMachine(SchedulerMachine):
    """A scheduler whose ranks may be lost at any moment."""

    @rule(num_times=st.sampled_from([1, 1, 2, 3]), num_steps=st.integers(0, 3))
    def crash(self, num_times: int, num_steps: int) -> None:
        """The ranks are lost, perhaps several times before much has been done."""
        for _ in range(num_times):
            self.submit()
            in_flight = {run.request_id for plan in self.ranks.in_flight.values() for run in plan.query_runs}
            cancelled = set(self.scheduler.cancelled)
            alive = {request.request_id: list(request.token_ids) for request in self.alive}
            REACHED["crashes with plans in flight"] += bool(in_flight)
            REACHED["crashes of cancelled requests"] += bool(cancelled)
            self.ranks.crash()
            self.last_plan.clear()
            left = {request.request_id: request.token_ids for request in self.scheduler.waiting}
            assert left == {key: tokens for key, tokens in alive.items() if key not in cancelled}
            assert_all_free(self.scheduler, ended=False)
            for _ in range(num_steps):
                if self.scheduler.has_requests:
                    self.step()


class TieredMachine(CrashingMachine):
    """A scheduler whose ranks may be lost, with tiers behind their pools, which fail; and others remove files."""

    @initialize(
        config=configs(),
        windows=st.sampled_from([(None,), (None, 5), (None, 20, 3), (7,), (1, 30)]),
        memory_tokens=st.sampled_from([100, 60, 200, 30]),
        wrong=st.sampled_from([0.3, 0.0, 1.0]),
        seed=st.integers(0, 1000),
        has_disk=st.sampled_from([True, True, False]),
        host_bytes=st.sampled_from([None, 10_000, 2000, 40]),
        failures=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    )
    def start_with_tiers(
        self,
        config: EngineConfig,
        windows: tuple[int | None, ...],
        memory_tokens: int,
        wrong: float,
        seed: int,
        has_disk: bool,
        host_bytes: int | None,
        failures: float,
    ) -> None:
        disk = "fake" if has_disk or host_bytes is None else None
        config = structs.replace(config, enable_prefix_caching=True, kv_disk=disk, kv_host_memory=host_bytes)
        self.begin(config, windows, memory_tokens, None, wrong, seed)
        self.ranks.tiers.failures = failures

    start = None

    @precondition(lambda self: self.ranks.tiers.moves)
    @rule()
    def a_move_ends(self) -> None:
        self.end_a_move()

    @precondition(lambda self: self.ranks.tiers.files)
    @rule(share=st.sampled_from([0.1, 0.5, 1.0]), is_told=st.booleans())
    def remove_files(self, share: float, is_told: bool) -> None:
        """Another engine needs room."""
        gone = self.ranks.tiers.lose_some(self.ranks.rng, share)
        if is_told:
            self.scheduler.memory.tiers.note_gone(gone)

    @rule(text=st.integers(0, len(TEXTS) - 1), length=st.sampled_from([17, 33, 64, 150]), params=sampling_params())
    def come_back_when_the_pools_hold_others(self, text: int, length: int, params: SamplingParams) -> None:
        """What a pool has forgotten a tier may have."""
        self.add(TEXTS[text][:length], params)
        self.go_on(60)
        for i in range(4):
            self.add([random.Random(f"{i} {len(self.requests)}").randrange(VOCAB) for _ in range(length)], params)
            self.go_on(60)
        self.add(TEXTS[text][: length + 5], params)
        self.go_on(20)

    @rule()
    def look_at_the_disk(self) -> None:
        self.scheduler.memory.tiers.note_found(self.ranks.tiers.files)

    @precondition(lambda self: self.scheduler.loading)
    @rule(data=st.data())
    def leave_while_pages_are_loaded(self, data: st.DataObject) -> None:
        waits = [request for request in self.alive if request in self.scheduler.loading]
        request = data.draw(st.sampled_from(waits)) if waits else None
        if request is not None and request.request_id not in self.ended_early:
            REACHED["left while pages were loaded"] += 1
            self.ended_early.add(request.request_id)
            if data.draw(st.booleans()):
                self.scheduler.finish(request, FinishReason.STOP)
            else:
                self.scheduler.cancel(request)
