"""Decode steps in fixed shapes, in Triton's interpreter: the tokens are Transformers', captured or not.

A CUDA graph needs a GPU. What stands in for one here launches again when it is replayed, and asserts that every launch
has the arguments of the first replay: shapes, numbers, and the addresses of what outlives a step.
"""

import functools
import gc
import itertools
import threading
import weakref
from collections import Counter

import pytest
import torch
from attention_cases import DEVICE
from tiny_models import (
    FAMILIES,
    TinyModel,
    all_pairs,
    generate_reference,
    greedy,
    memory_for,
    model_root,
    random_prompt,
    run_all,
    tiny_engine,
    tiny_model,
    write_model,
)

from longspan.attention.triton import power_of_two
from longspan.comm.recording import RecordingCommunicator
from longspan.cp import fixed
from longspan.cp.fixed import FixedStepAttention
from longspan.cp.fixed_buffers import FixedInputs, PlacedTiles
from longspan.errors import LongspanError
from longspan.plan.fixed_shape import fixed_shape
from longspan.scheduler import step_graphs
from longspan.worker.graphs import FixedSteps
from longspan.worker.runner import ModelRunner

OPTIONS = {"attention_backend": "triton", "page_size": 16, "stripe_size": 16, "max_num_batched_tokens": 48}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Two splits of a row's keys: each program takes the interpreter milliseconds, on a GPU it takes none."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fixed, "MIN_FIXED_SPLITS", 2)
        monkeypatch.setattr(fixed, "num_processors", lambda device: 1)


@pytest.fixture
def steps(monkeypatch):
    """(rank, shape, plan) of all fixed steps."""
    seen = []
    run = ModelRunner.run

    def note(self, plan):
        if self.fixed is not None and plan.graph is not None:
            shape = fixed_shape(plan)
            seen.append((self.rank, shape, plan))
        return run(self, plan)

    monkeypatch.setattr(ModelRunner, "run", note)
    return seen


class StandIn:
    """For a CUDA graph of one rank. What it sends passes through the communicator and is counted there."""

    def __init__(self, comm, replays):
        self._comm, self._replays = comm, replays
        self._launch = self._launches = self._logits = None

    def capture(self, launch):
        self._launch = launch  # a capture sends nothing, and changes no page
        if self._comm.rank in FAILING:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        LOG.launches = []
        logits, launches, LOG.launches = self._launch(), LOG.launches, None
        self._replays.append((self._comm.rank, self._comm.traffic))
        if self._launches is None:
            self._launches, self._logits = launches, logits
        assert self._launches == launches, "a graph would have repeated the first ones"
        if logits is not None:
            self._logits.copy_(logits)  # a graph writes where it wrote when it was captured
        return self._logits


FAILING: set[int] = set()
"""Ranks that cannot capture."""

LOG = threading.local()
"""Launches of a thread since its last replay began."""


def shown(argument, outlives):
    """What a graph freezes of an argument."""
    if isinstance(argument, torch.Tensor):
        return (tuple(argument.shape), argument.dtype, argument.stride(), argument.data_ptr() if outlives else None)
    if isinstance(argument, (list, tuple)):
        return tuple(shown(one, outlives) for one in argument)
    return argument


def logged(function, lasting=()):
    """`function`, noted with its arguments; those at places `lasting` are buffers."""

    def call(*args, **kwargs):
        if getattr(LOG, "launches", None) is not None:
            found = tuple(shown(argument, i in lasting) for i, argument in enumerate(args))
            LOG.launches.append((function.__name__, found, tuple(kwargs.items())))
        return function(*args, **kwargs)

    return call


@pytest.fixture
def captured(monkeypatch):
    """Every rank captures; returns (rank, traffic behind it) of every replay, as counted message by message."""
    replays = []
    init, run = FixedSteps.__init__, ModelRunner.run
    monkeypatch.setattr(step_graphs, "is_captured", lambda config: True)

    def capturing(self, forward, pools, comm, make_graph):
        init(self, forward, pools, comm, lambda: StandIn(comm, replays))

    def checked(self, plan):
        num_before = 0 if self.fixed is None else self.fixed.num_replays
        result = run(self, plan)
        if self.fixed is not None and self.fixed.num_replays > num_before:
            assert self.comm.traffic == [traffic for rank, traffic in replays if rank == self.rank][-1]
        return result

    monkeypatch.setattr(fixed, "attention", logged(fixed.attention, lasting=(1, 2, 3, 4)))  # pools and tables
    monkeypatch.setattr(fixed, "store", logged(fixed.store, lasting=(0, 1, 4)))
    monkeypatch.setattr(fixed, "merge", logged(fixed.merge))
    monkeypatch.setattr(RecordingCommunicator, "exchange", logged(RecordingCommunicator.exchange))
    monkeypatch.setattr(FixedSteps, "__init__", capturing)
    monkeypatch.setattr(ModelRunner, "run", checked)
    return replays


PROMPT_LENS = (1, 24, 40)
"""Up to three stripes: the interpreter takes seconds for a hundred tokens."""


@functools.cache
def reference(path, length):
    """Of a prompt."""
    return generate_reference(path, random_prompt(length, length), 24)


@functools.cache
def one_layer(family):
    """A family's model with its first layer alone, for what does not depend on the family."""
    model_type, fields = FAMILIES[family]
    path = write_model(model_root() / f"{family}-one-layer", model_type, **{**fields, "num_hidden_layers": 1})
    return TinyModel(f"{family}-one-layer", path, [])


def generate(engine, model, num_tokens=6):
    references = [reference(model.path, length) for length in PROMPT_LENS]
    running = [engine.add_request(r.prompt, greedy(num_tokens)) for r in references]
    run_all(engine)
    assert [request.output_token_ids for request in running] == [r.token_ids[:num_tokens] for r in references]


CASES = all_pairs(
    {
        "family": ("llama", "qwen2", "gemma2", "smollm3-window", "llama-one-kv-head", "youtu"),
        "context_parallel_size": (1, 2, 3),
        "placement": ("striped", "packed", "spill"),
        "strategy": ("pass_q", "tree", "auto"),
    }
)


def check(case, num_tokens=6):
    options = {**OPTIONS, **case}
    model = tiny_model(options.pop("family"))
    if options["placement"] == "spill":
        options["kv_cache_memory"] = memory_for(model, 400 // options["context_parallel_size"])
    with tiny_engine(model, **options) as engine:
        generate(engine, model, num_tokens)
        replays = [runner.fixed.num_replays for runner in engine.executor.runners]
    assert any(replays) == (DEVICE == "cuda" and options["context_parallel_size"] == 1), "real graphs on real GPUs"


@pytest.mark.cover(cases=1)
@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: "-".join(map(str, case.values())))
def test_fixed_steps_give_the_tokens_of_transformers(case, steps):
    check(case)
    assert steps


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], *CASES[4:]], ids=lambda case: "-".join(map(str, case.values())))
def test_fixed_steps_give_the_tokens_of_transformers_all_pairs(case, steps):
    check(case, 24)
    assert steps


@pytest.mark.cover
@pytest.mark.parametrize(
    ("family", "size", "placement"),
    [
        pytest.param("llama", 3, "striped", marks=pytest.mark.slow),
        pytest.param("gemma2", 2, "striped", marks=pytest.mark.slow),
        pytest.param("qwen2", 1, "packed", marks=pytest.mark.slow),
        ("youtu", 2, "striped"),
    ],
)
def test_replayed_steps_give_them_too_and_count_what_they_send(family, size, placement, captured):
    model = tiny_model(family)
    with tiny_engine(model, **OPTIONS, context_parallel_size=size, placement=placement, strategy="pass_q") as engine:
        generate(engine, model, 9)
        sent = [stats.bytes_sent for stats in engine.rank_stats()]
    assert {rank for rank, _ in captured} == set(range(size))
    with tiny_engine(
        model, **OPTIONS, context_parallel_size=size, placement=placement, strategy="pass_q", cuda_graphs="never"
    ) as engine:
        generate(engine, model, 9)
        exact = [stats.bytes_sent for stats in engine.rank_stats()]
    for padded_bytes, exact_bytes in zip(sent, exact, strict=True):
        assert exact_bytes <= padded_bytes <= 2 * exact_bytes  # rows are padded to powers of two


@pytest.mark.cover
@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_latents_answer_two_other_homes_at_once(size, steps):
    """Their messages lie apart, which one message alone cannot show."""
    model = one_layer("youtu")
    references = [reference(model.path, length) for length in (40, 24, 41, 25, 8)]
    with tiny_engine(model, **OPTIONS, context_parallel_size=size, placement="striped", strategy="pass_q") as engine:
        running = [engine.add_request(r.prompt, greedy(4)) for r in references]
        run_all(engine)
    assert any(len({*shape.homes} & {*shape.participants[0]} - {rank}) >= 2 for rank, shape, _ in steps)
    assert [request.output_token_ids for request in running] == [r.token_ids[:4] for r in references]


@pytest.mark.cover
def test_a_rank_that_cannot_capture_has_all_ranks_launch(captured, steps, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "FAILING", {1})
    model = one_layer("llama")
    with tiny_engine(model, **OPTIONS, context_parallel_size=2, placement="striped", strategy="pass_q") as engine:
        generate(engine, model, 6)
    assert not captured, "nobody replays"
    assert [rank for rank, _, plan in steps if plan.graph.run == "capture"] in ([0, 1], [1, 0]), "nobody tries again"
    said = capsys.readouterr().err
    assert said.count("rank 1 cannot capture decode steps as CUDA graphs, so all ranks launch") == 1
    assert "operation not permitted when stream is capturing" in said


@pytest.mark.cover
def test_an_argument_that_changes_between_replays_is_noticed(captured, monkeypatch):
    turns = itertools.count()
    monkeypatch.setattr(fixed, "fixed_splits", lambda *_: 1 + next(turns) // 7 % 2)
    model = tiny_model("llama")
    with (
        pytest.raises(LongspanError, match="a graph would have repeated the first ones"),
        tiny_engine(model, **OPTIONS, async_scheduling=False) as engine,
    ):
        generate(engine, model, 8)


@pytest.mark.cover
def test_the_shape_that_was_not_used_for_longest_makes_room(steps, monkeypatch):
    monkeypatch.setattr(step_graphs, "MAX_SHAPES", 2)
    kept = weakref.WeakSet()
    init = FixedStepAttention.__init__
    monkeypatch.setattr(FixedStepAttention, "__init__", lambda self, *args: kept.add(self) or init(self, *args))
    model = one_layer("llama")
    with tiny_engine(model, **OPTIONS, context_parallel_size=2, placement="striped", strategy="pass_q") as engine:
        references = [reference(model.path, length) for length in PROMPT_LENS]
        running = [engine.add_request(r.prompt, greedy(n)) for r, n in zip(references, (8, 5, 2), strict=True)]
        run_all(engine)
        gc.collect()
        per_rank = Counter(attention.rank for attention in kept)
    assert [r.output_token_ids for r in running] == [
        r.token_ids[:n] for r, n in zip(references, (8, 5, 2), strict=True)
    ]
    assert len({shape for _, shape, _ in steps}) > 2
    assert per_rank == {0: 2, 1: 2}


@pytest.mark.cover
def test_requests_that_share_pages_and_come_and_go_change_shapes(steps):
    model = one_layer("llama")
    with tiny_engine(model, **OPTIONS, context_parallel_size=2, placement="striped", strategy="pass_q") as engine:
        prompt = random_prompt(40, 1)
        counts = (3, 1, 4, 2)
        alone = engine.add_request(prompt, greedy(4))
        run_all(engine)
        running = [engine.add_request(prompt, greedy(count)) for count in counts]
        run_all(engine)
        assert [r.output_token_ids for r in running] == [alone.output_token_ids[:count] for count in counts]
        assert running[0].num_cached > 0
    assert len({shape for _, shape, _ in steps}) >= 3


def test_splits_fill_the_processors_whatever_the_rows():
    assert fixed.fixed_splits(8, 132) == 32
    assert fixed.fixed_splits(1, 132) == fixed.MAX_SPLITS
    assert fixed.fixed_splits(256 * 8, 132) == fixed.MIN_FIXED_SPLITS
    assert {power_of_two(n) for n in range(65)} == {1, 2, 4, 8, 16, 32, 64}, "each is compiled once"


def _drop_a_tile(monkeypatch):
    make = fixed.tile_tables

    def tables(*args, **kwargs):
        found = make(*args, **kwargs)
        found.query_tiles[:, 6] -= found.query_tiles[:, 6] > found.query_tiles[:, 3]
        return found

    monkeypatch.setattr(fixed, "tile_tables", tables)


def _store_in_the_next_row(monkeypatch):
    store = fixed.store
    monkeypatch.setattr(fixed, "store", lambda pool_k, pool_v, k, v, rows: store(pool_k, pool_v, k, v, rows + 1))


def _ignore_lse(monkeypatch):
    merge = fixed.merge
    monkeypatch.setattr(
        fixed, "merge", lambda parts, lses, *rest: merge(parts, torch.where(lses.isneginf(), lses, 0.0), *rest)
    )


def _keep_old_positions(monkeypatch):
    put = FixedInputs.put_tokens

    def stale(self, *args):
        before = self.positions.clone()
        put(self, *args)
        self.positions.copy_(before)

    monkeypatch.setattr(FixedInputs, "put_tokens", stale)


def _swap_homes(monkeypatch):
    put = FixedInputs.put_tiles

    def swapped(self, group_idx, placed):
        tables = [tables for _, tables in reversed(placed)]
        return put(self, group_idx, [PlacedTiles(row, t) for (row, _), t in zip(placed, tables, strict=True)])

    monkeypatch.setattr(FixedInputs, "put_tiles", swapped)


@pytest.mark.cover
@pytest.mark.parametrize(
    "mutate",
    [
        _drop_a_tile,
        *(
            pytest.param(mutate, marks=pytest.mark.slow)  # each takes as long as all other tests of a room
            for mutate in (_store_in_the_next_row, _ignore_lse, _keep_old_positions, _swap_homes)
        ),
    ],
)
def test_a_broken_fixed_step_changes_tokens(mutate, monkeypatch):
    mutate(monkeypatch)
    model = one_layer("llama")
    with tiny_engine(model, **OPTIONS, context_parallel_size=3, placement="striped", strategy="pass_q") as engine:
        references = [reference(model.path, length) for length in PROMPT_LENS]
        running = [engine.add_request(r.prompt, greedy(6)) for r in references]
        run_all(engine)
    assert [request.output_token_ids for request in running] != [r.token_ids[:6] for r in references]
