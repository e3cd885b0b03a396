"""States handed along a request's runs are those of one device, whatever ranks the runs lie on.

The layer is a sum with a decay, written out here in one loop per request; its channels do not meet, so that they can be
handed on one by one. Slots start as NaN, so that a state that nobody wrote cannot pass for one.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.cp.relay import Relay
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.kv.state_pool import StatePool
from longspan.plan.types import GroupStep, KeptState, Plan, QueryRun, StatePlace, StateStep
from longspan.types import Phase, Strategy

WIDTH, NUM_SLOTS, LAYERS = 3, 12, (1, 4)
GROUPS = (
    StateGroup(
        LAYERS,
        (StateComponent("conv", 0, (WIDTH, 2), "float64"), StateComponent("recurrent", 0, (WIDTH,), "float64", WIDTH)),
    ),
)


def compute(rows, state, is_new):
    """Decayed sums of rows [B, t, width], each beside the row two before."""
    halo, total = state
    if is_new:
        halo.zero_()
        total.zero_()
    outs = []
    for row in rows.unbind(1):
        total.mul_(0.5).add_(row)
        outs.append(total + halo[..., 0])
        halo.copy_(torch.stack([halo[..., 1], row], dim=-1))
    return torch.stack(outs, dim=1)


def compute_rows(hidden, rows, state, is_new, handover, by_heads=False):
    """The layer as ranks call it, over some of the packed rows [T, width]."""
    if not rows.are_of_one:
        return compute(hidden[rows.index][:, None], state, is_new)[:, 0]
    if handover is None or not by_heads:
        if handover is not None:
            handover.arrive()
        return compute(hidden[None, rows.index], state, is_new)[0]
    handover.arrive(0)
    halo = state[0].clone()
    if is_new:
        for part in (halo, *state):
            part.zero_()
    inputs = torch.cat([halo.transpose(1, 2), hidden[None, rows.index]], dim=1)  # [1, 2 + t, width]
    state[0].copy_(inputs[:, -2:].transpose(1, 2))
    handover.note_written(0)
    outs = []
    for heads in handover.heads(1):
        some = slice(heads.start, heads.stop)
        before = [inputs[:, :2, some].transpose(1, 2).clone(), state[1][:, some]]
        outs.append(compute(inputs[:, 2:, some], before, False)[0])
    return torch.cat(outs, dim=-1)


def alone(rows):
    """The same for one request [T, width] on one device, with the state behind every row."""
    state = [torch.full((1, WIDTH, 2), 0.0, dtype=torch.float64), torch.zeros(1, WIDTH, dtype=torch.float64)]
    outs, states = [], []
    for row in rows:
        outs.append(compute(row[None, None], state, False)[0, 0])
        states.append([part[0].clone() for part in state])
    return torch.stack(outs), states


def make_plan(plan_id, runs, states, ranks):
    return Plan(
        plan_id=plan_id,
        phase=Phase.PREFILL,
        ranks=tuple(ranks),
        num_tokens=(0,) * len(ranks),
        query_runs=tuple(runs),
        table_deltas=(),
        groups=(GroupStep(Strategy.LOCAL),),
        samples=(),
        states=tuple(states),
    )


class Ranks:
    """Slots of some ranks that are threads."""

    def __init__(self, size, *, by_heads=False):
        self.by_heads = by_heads
        self.comms = [RecordingCommunicator(comm) for comm in thread_group(size, timeout_s=20.0)]
        self.pools = [StatePool(GROUPS, NUM_SLOTS, torch.device("cpu")) for _ in range(size)]
        for pool in self.pools:
            for tensors in pool.tensors.values():
                for tensor in tensors:
                    tensor.fill_(float("nan"))

    def run(self, plan, tokens):
        """Outputs of every run, by layer; `tokens` holds the rows [T, width] of every request."""

        def one(rank):
            own = [run for run in plan.query_runs if run.compute_rank == rank]
            relay = Relay(plan, self.pools[rank], self.comms[rank])
            if not own:
                return {}
            rows = torch.cat([tokens[run.request_id][run.position : run.end] for run in own])
            found = {}
            for layer in LAYERS:
                out = relay.run_layer(layer, partial(compute_rows, rows, by_heads=self.by_heads))
                out = out.split([run.num_tokens for run in own])
                found.update({(layer, run.request_id, run.position): part for run, part in zip(own, out, strict=True)})
            return found

        with ThreadPoolExecutor(len(self.comms)) as pool:
            found = list(pool.map(one, plan.ranks))
        return {key: out for of_rank in found for key, out in of_rank.items()}

    def state(self, place, layer):
        return [part[0] for part in self.pools[place.rank].state(layer, place.slot)]


@pytest.mark.parametrize(
    ("size", "num_parts", "by_heads"),
    [
        (1, 1, False),
        (2, 1, False),
        (3, 1, True),
        (5, 1, False),
        (2, 3, True),
        (3, 2, True),
        (5, 7, True),
        (3, 2, False),
    ],
)
def test_states_and_outputs_are_those_of_one_device(size, num_parts, by_heads):
    """Several requests, several steps: runs of any length on any ranks, states that move between steps and are kept,
    handed on in any number of parts, whether or not what computes takes parts."""
    rng, ranks = random.Random(size), Ranks(size, by_heads=by_heads)
    generator = torch.Generator().manual_seed(size)
    tokens = [torch.randn(40, WIDTH, dtype=torch.float64, generator=generator) for _ in range(3)]
    references = [alone(rows) for rows in tokens]
    places: list[StatePlace | None] = [None] * 3
    done = [0, 0, 0]
    for plan_id in range(9):
        runs, states, free = [], [], [list(range(NUM_SLOTS)) for _ in range(size)]
        for place in places:
            if place is not None:
                free[place.rank].remove(place.slot)
        for request_id in range(3):
            start = position = done[request_id]
            for _ in range(rng.choice([1, 1, 2, 4])):
                length = min(rng.choice([1, 1, 2, 3]), 40 - position)
                if length:
                    runs.append(QueryRun(request_id, position, length, rng.randrange(size), None))
                    position += length
            if position == start:
                continue
            rank, source = runs[-1].compute_rank, places[request_id]
            target = source if source is not None and source.rank == rank else StatePlace(rank, free[rank].pop())
            owners = {p: run.compute_rank for run in runs if run.request_id == request_id for p in range(*span(run))}
            kept = [
                KeptState(p + 1, StatePlace(owner, free[owner].pop()))
                for p, owner in owners.items()
                if rng.random() < 0.2
            ]
            states.append(StateStep(request_id, source, target, tuple(kept), num_parts))
            places[request_id], done[request_id] = target, position
        if not runs:
            continue
        found = ranks.run(make_plan(plan_id, runs, states, range(size)), tokens)
        for (_, request_id, position), out in found.items():
            torch.testing.assert_close(out, references[request_id][0][position : position + len(out)])
        for step in states:
            behind = [(done[step.request_id], step.target), *((kept.position, kept.place) for kept in step.kept)]
            for position, place in behind:
                for layer in LAYERS:
                    wanted_state = references[step.request_id][1][position - 1]
                    for part, wanted in zip(ranks.state(place, layer), wanted_state, strict=True):
                        torch.testing.assert_close(part, wanted)
    assert min(done) > 10


def span(run):
    return run.position, run.end


def test_a_source_that_is_kept_is_not_changed_and_may_lie_on_a_rank_without_rows():
    ranks = Ranks(2)
    tokens = [torch.randn(8, WIDTH, dtype=torch.float64)]
    first = StatePlace(0, 3)
    ranks.run(make_plan(0, [QueryRun(0, 0, 4, 0, None)], [StateStep(0, None, first)], [0, 1]), tokens)
    second = StateStep(0, first, StatePlace(1, 5))
    found = ranks.run(make_plan(1, [QueryRun(0, 4, 1, 1, None)], [second], [0, 1]), tokens)
    outs, states = alone(tokens[0])
    torch.testing.assert_close(found[LAYERS[0], 0, 4], outs[4:5])
    for place, position in ((first, 4), (second.target, 5)):
        for part, wanted in zip(ranks.state(place, LAYERS[1]), states[position - 1], strict=True):
            torch.testing.assert_close(part, wanted)


def test_single_rows_of_many_requests_are_one_call_and_no_message():
    ranks, calls = Ranks(1), []
    tokens = [torch.randn(4, WIDTH, dtype=torch.float64) for _ in range(5)]
    places = [StatePlace(0, slot) for slot in (7, 2, 9, 0, 4)]
    begin = [StateStep(i, None, place) for i, place in enumerate(places)]
    ranks.run(make_plan(0, [QueryRun(i, 0, 3, 0, None) for i in range(5)], begin, [0]), tokens)
    relay = Relay(
        make_plan(
            1, [QueryRun(i, 3, 1, 0, None) for i in range(5)], [StateStep(i, p, p) for i, p in enumerate(places)], [0]
        ),
        ranks.pools[0],
        ranks.comms[0],
    )

    hidden = torch.stack([rows[3] for rows in tokens])

    def counted(rows, state, is_new, handover):
        calls.append(rows.index)
        return compute_rows(hidden, rows, state, is_new, handover)

    out = relay.run_layer(LAYERS[0], counted)
    assert calls == [slice(0, 5)]
    torch.testing.assert_close(out, torch.stack([alone(rows)[0][3] for rows in tokens]))
    assert ranks.comms[0].bytes_sent == 0
