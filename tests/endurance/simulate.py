"""Histories of an engine whose ranks are simulated: delays, deaths and reorderings come from a seed.

    python tests/endurance/simulate.py [--seeds 5000] [--first 0]

The engine is the real one, with its scheduler, allocators, prefix cache and recovery; its ranks compute nothing, check
every plan (`fake_ranks`), and answer when a seed says so. Requests come and are cancelled, plans end in any order that
ranks allow, answers are taken in late, ranks are lost at any moment (at work, idle, while they start, again and again
by the same request, or one of them for good). After every plan the books must balance. At the end every request has
ended with the tokens that it has alone, or with the error that it deserves, and nothing is held.

Ends with one line of JSON, and the command that repeats the first failure; exit status 0 if there is none.
"""

import argparse
import json
import logging
import multiprocessing
import random
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fake_ranks import VOCAB, FakeRanks, assert_all_free, check_finished, make_config, make_model, tokens_alone
from fake_tiers import FakeTiers

from longspan.config import EngineConfig
from longspan.engine import engine as engine_module
from longspan.engine import page_tiers
from longspan.engine import ranks as ranks_module
from longspan.engine.engine import Engine
from longspan.engine.executor import PendingMoves, PendingPlans
from longspan.engine.recovery import POISON_CRASHES
from longspan.errors import CapacityError, WorkerError
from longspan.group.messages import Start
from longspan.kv.page_directory import PageKey
from longspan.plan.moves import Move, Moved
from longspan.plan.types import Plan, PlanResult
from longspan.scheduler import tiers
from longspan.scheduler.request import Request
from longspan.types import FinishReason, SamplingParams

POISON = VOCAB - 1
"""A prompt that begins with this token kills the ranks whenever they compute it."""


class SimulatedRanks:
    """One generation of ranks: an executor."""

    def __init__(self, world: "World", start: Start) -> None:
        """Raises: WorkerError, if the world wants that."""
        self._world = world
        size = start.config.context_parallel_size
        world.count("starts")
        if size > world.most_ranks or (start.generation and world.rng.random() < world.bad_starts):
            world.count("starts that failed")
            raise WorkerError("rank 0 was killed by SIGKILL")
        self.hosts = ("here",) * size
        self.fake: FakeRanks | None = None
        self._pending, self._moves = PendingPlans(), PendingMoves()
        self._futures: dict[int, Future[PlanResult]] = {}
        self._written: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.is_doomed = False

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        if future.done():
            return future
        scheduler = self._world.engine.scheduler
        if self.fake is None:
            self.fake = FakeRanks(scheduler, self._world.rng, first_plan_id=plan.plan_id, tiers=self._world.tiers)
            self.fake.written = self._written
        self.fake.submit(plan)
        self._world.count("plans")
        self._world.counts["waits for pages"] += len(scheduler.loading)
        self._futures[plan.plan_id] = future
        for request in scheduler.running:
            if request.token_ids[0] == POISON and any(r.request_id == request.request_id for r in plan.query_runs):
                self.is_doomed = True
        return future

    def move(self, move: Move) -> "Future[Moved]":
        future = self._moves.add(move)
        if not future.done():
            self._world.tiers.begin(move, self._written, self._world.engine.config.page_size)
            self._world.count("moves")
        return future

    def end_one_move(self) -> bool:
        """Let a move end. Returns whether there is one."""
        world = self._world
        if world.tiers.moves:
            self._moves.answer(world.tiers.end(world.rng, self._written, world.engine.config.page_size))
            return True
        return False

    def done(self) -> list["Future[PlanResult]"]:
        """Of plans that have ended and were not taken in."""
        return [future for future in self._futures.values() if future.done()]

    def end_one(self) -> bool:
        """Let a plan end that can, as ranks run theirs in order. Returns whether there is one."""
        plans = [] if self.fake is None else [p for p in self.fake.in_flight.values() if not self._is_done(p)]
        first = [p for i, p in enumerate(plans) if not any(set(p.ranks) & set(before.ranks) for before in plans[:i])]
        if first:
            assert self.fake is not None
            for result in self.fake.answer(plan := self._world.rng.choice(first)).ranks:
                self._pending.answer(result)
            assert self._is_done(plan)
        return bool(first)

    def _is_done(self, plan: Plan) -> bool:
        return self._futures[plan.plan_id].done()

    def forget(self, futures: list["Future[PlanResult]"]) -> None:
        """Their results are taken in."""
        for plan_id in [plan_id for plan_id, future in self._futures.items() if future in futures]:
            del self._futures[plan_id]
            assert self.fake is not None
            del self.fake.in_flight[plan_id]

    def die(self) -> None:
        self._pending.fail(WorkerError("rank 0 was killed by SIGKILL"))
        self._moves.fail(WorkerError("rank 0 was killed by SIGKILL"))

    @property
    def failure(self) -> BaseException | None:
        return self._pending.error

    def close(self) -> None:
        self.die()

    def replace(self) -> None:
        self.close()
        self._world.tiers.lose_ranks()


class FakeKeeper:
    """In place of a thread that looks at a directory: says now and then which files there are."""

    def __init__(self, *_: object) -> None:
        self.world: World | None = None

    def news(self) -> list[tuple[set[PageKey], set[PageKey]]]:
        if self.world is None or self.world.rng.random() < 0.9:
            return []
        gone = self.world.tiers.lose_some(self.world.rng, self.world.rng.choice((0.0, 0.0, 0.1)))
        return [(set(self.world.tiers.files), set(gone if self.world.rng.random() < 0.5 else ()))]

    def note_used(self, _keys: object) -> None:
        pass

    def note_written(self, _num_bytes: int) -> None:
        pass

    def remove(self, keys: Sequence[PageKey]) -> None:
        assert self.world is not None
        for key in keys:
            self.world.tiers.files.pop(key, None)

    def close(self) -> None:
        pass


class World:
    """One history."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.bad_starts = rng.choice((0.0, 0.0, 0.2, 0.6))
        self.most_ranks = 99
        self.texts = [[rng.randrange(VOCAB // 2) for _ in range(160)] for _ in range(2)]
        self.tiers = FakeTiers(failures=rng.choice((0.0, 0.0, 0.02, 0.3)))
        self.requests: list[Request] = []
        self.ended_early: set[int] = set()
        page_size = rng.choice((4, 1, 2, 16))
        num_ranks = rng.choice((2, 3, 1, 4, 8))
        model = make_model(*rng.choice([(None,), (None, 5), (None, 20, 3), (7,)]), has_state=rng.random() < 0.4)
        is_cached = rng.random() < 0.8
        is_tiered = is_cached and not model.state_groups and rng.random() < 0.6
        config = make_config(
            num_ranks,
            page_size=page_size,
            stripe_size=page_size * rng.choice((2, 1, 4)),
            max_num_batched_tokens=rng.choice((16, 3, 8, 40)),
            max_num_seqs=rng.choice((64, 5, 2, 1)),
            placement=rng.choice(("auto", "auto", "packed", "striped", "spill")),
            max_step_ms=rng.choice((None, 1, 100)),
            enable_prefix_caching=is_cached,
            async_scheduling=rng.random() < 0.5,
            kv_cache_memory=rng.choice((60, 100, 200)) * sum(group.token_bytes for group in model.kv_groups),
            state_snapshot_tokens=None if not model.state_groups else page_size * rng.choice((1, 2, 8)),
            max_restarts=rng.choice((1000, 1000, 1000, 3)),
            min_ranks=rng.choice((None, num_ranks)),
            kv_disk="fake" if is_tiered and rng.random() < 0.7 else None,
            kv_host_memory=rng.choice((None, 100, 2000)) if is_tiered else None,
            measure="never",
            check_invariants=rng.choice((1, 1, 5)),
        )
        self.engine = self._make_engine(model, config)

    def _make_engine(self, model: object, config: EngineConfig) -> Engine:
        text, keeper = SimpleNamespace(hidden_size=1), FakeKeeper()
        keeper.world = self
        with (
            mock.patch.multiple(
                engine_module,
                load_config=lambda *_: (SimpleNamespace(get_text_config=lambda: text), None),
                inspect_model=lambda *_: model,
            ),
            mock.patch.multiple(
                page_tiers,
                open_directory=lambda *_: None,
                kv_fingerprint=lambda *_: bytes(16),
                ModelPages=mock.Mock(),
                DiskKeeper=lambda *_: keeper,
            ),
            mock.patch.object(
                tiers, "FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30}
            ),  # else nothing is loaded: the model computes nothing
            self._simulated_ranks(),
        ):
            return Engine(config)

    def _simulated_ranks(self) -> Any:
        return mock.patch.object(ranks_module, "start_executor", lambda start, *_: SimulatedRanks(self, start))

    def count(self, what: str) -> None:
        self.counts[what] += 1

    @property
    def ranks(self) -> SimulatedRanks:
        ranks = self.engine.executor
        assert isinstance(ranks, SimulatedRanks)
        return ranks

    # -- what may happen ---------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Returns whether the engine lived to the end."""
        rng = self.rng
        losses, gone = rng.choice((0.0, 0.02, 0.1)), rng.random() < 0.15
        with self._simulated_ranks():
            for step in range(rng.choice((30, 100))):
                if gone and step == 20:
                    self.most_ranks = rng.randrange(self.engine.config.context_parallel_size)
                    self.ranks.die()
                action = rng.choices((self.add, self.end_plans, self.cancel), (30, 60, 6))[0]
                action()
                if rng.random() < losses:
                    self.count("losses")
                    self.ranks.die()
                if not self.go_on():
                    return False
            for step in range(20_000):
                if not self.engine.has_requests:
                    self.ranks.end_one()  # a plan that ran ahead of its last token, or whose requests were cancelled
                    self.ranks.end_one_move()
                    self.take_in()
                    if (not self.ranks.fake or not self.ranks.fake.in_flight) and not self.engine.tiers:
                        return True
                    self.engine.submit_plans()
                    continue
                self.end_plans()
                if step < 200 and rng.random() < losses / 10:  # then peace: work must get done between two losses
                    self.ranks.die()
                if not self.go_on():
                    return False
        raise AssertionError("requests do not end")

    def add(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.choice((1, 2, 5, 15, 16, 33, 64, 100))]
        if rng.random() < 0.5:
            prompt = prompt + [rng.randrange(VOCAB // 2) for _ in range(rng.randrange(4))]
        if rng.random() < 0.02:
            prompt = [POISON, *prompt]
        params = SamplingParams(
            max_tokens=rng.choice((9, 1, 2, 30, 50)),
            seed=rng.randrange(200),
            ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice((None, 0)),
            prompt_logprobs=rng.choice((None, None, None, 0)),
        )
        try:
            self.requests.append(self.engine.add_request(prompt, params))
            self.count("requests")
        except CapacityError:
            self.count("refused")

    def end_plans(self) -> None:
        """One or two plans end; their results are taken in now or later."""
        if self.ranks.is_doomed:
            self.count("losses by poison")
            self.ranks.die()
            return
        for _ in range(self.rng.choice((1, 1, 2))):
            if not self.ranks.end_one() or self.rng.random() < 0.5:
                self.ranks.end_one_move()
        if self.rng.random() < 0.8:
            self.take_in()

    def take_in(self) -> None:
        done = self.ranks.done()
        self.rng.shuffle(done)
        self.ranks.forget(done)
        self.note(self.engine.take_in(done))
        if self.engine.tiers is not None:
            self.note(self.engine.tiers.take_in(self.engine.scheduler))

    def cancel(self) -> None:
        alive = [request for request in self.requests if request.finish_reason is None]
        if alive:
            request = self.rng.choice(alive)
            self.ended_early.add(request.request_id)
            if self.rng.random() < 0.7:
                self.engine.abort(request)
            else:
                self.engine.finish(request, FinishReason.STOP)

    def go_on(self) -> bool:
        """What the engine's thread does after every event. Returns whether the engine lives."""
        if self.engine.failure is not None:
            before = self.engine.config.context_parallel_size
            try:
                self.note(self.engine.recover())
            except WorkerError:
                self.count("engines that ended")
                assert self.engine.failure is not None
                return False
            self.count("recoveries")
            self.counts["ranks less"] += before - self.engine.config.context_parallel_size
        self.engine.submit_plans()
        return True

    def note(self, advanced: list[Request]) -> None:
        for request in advanced:
            assert request.request_id not in self.ended_early, "a request that was cancelled has advanced"

    # -- the end -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everybody has an answer, nothing is held."""
        for request in self.requests:
            assert request.finish_reason is not None, "a request has no end"
            wanted = tokens_alone(request)
            if request.finish_reason is FinishReason.ERROR:
                assert request.output_token_ids == wanted[: request.num_generated]
                assert request.error is not None
                if "times in a row" in request.error:
                    self.count("failed for losses")
                    assert request.num_crashes == POISON_CRASHES
                else:
                    self.count("failed for fewer ranks")
                    assert "the others cannot hold it" in request.error
                    assert self.counts["ranks less"]
            elif request.request_id in self.ended_early:
                assert request.output_token_ids == wanted[: request.num_generated]
            else:
                assert request.token_ids[0] != POISON, "poison has got an answer"
                check_finished(request)
                assert request.output_token_ids == wanted
                self.count("answered")
        if self.ranks.fake is not None:
            self.ranks.fake.check_cached()
        assert_all_free(self.engine.scheduler)


def run_seed(seed: int) -> tuple[int, Counter[str], str]:
    """Returns the seed, what happened, and a traceback if something was wrong."""
    logging.disable(logging.WARNING)
    counts: Counter[str] = Counter()
    try:
        world = World(seed)
        counts = world.counts
        if world.run():
            world.check()
        else:
            for request in world.requests:
                assert request.output_token_ids == tokens_alone(request)[: request.num_generated]
    except Exception:
        return seed, counts, traceback.format_exc()
    return seed, counts, ""


def run(seeds: int, first: int) -> dict[str, object]:
    """Returns the counts, with the first failure if there is one."""
    total: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    with multiprocessing.Pool() as pool:
        for seed, counts, trace in pool.imap_unordered(run_seed, range(first, first + seeds), chunksize=8):
            total += counts
            if trace:
                failed.append((seed, trace))
    found: dict[str, object] = {"seeds": seeds, "failed": len(failed), **dict(sorted(total.items()))}
    if failed:
        seed, trace = min(failed)
        found["first_failure"] = f"{trace}\nrepeat it with: python tests/endurance/simulate.py --seeds 1 --first {seed}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    found = run(**vars(parser.parse_args()))
    failure = found.pop("first_failure", None)
    if failure is not None:
        print(failure, file=sys.stderr)
    print(json.dumps(found))
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
