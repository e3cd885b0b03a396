"""The relay between processes, whose sockets take only so many bytes that nobody has read."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from longspan.comm.connect import local_meeting
from longspan.comm.sockets import SMALL_BYTES, SocketCommunicator
from longspan.cp.relay import Relay
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.kv.state_pool import StatePool
from longspan.plan.types import GroupStep, KeptState, Plan, QueryRun, StatePlace, StateStep
from longspan.types import Phase, Strategy

NUM_HEADS = 32
GROUP = StateGroup(
    (0,),
    (
        StateComponent("conv", 0, (6144, 4), "float32"),
        StateComponent("recurrent", 0, (NUM_HEADS, 64, 128), "float32", NUM_HEADS),
    ),
)
"""Heads are small messages, more than a socket takes; what a convolution needs is a large one."""

KEPT = (
    [QueryRun(0, 0, 64, 0, None), QueryRun(0, 64, 128, 1, None), QueryRun(0, 192, 64, 0, None)],
    (StateStep(0, None, StatePlace(0, 1), (KeptState(128, StatePlace(1, 2)),), NUM_HEADS),),
)
"""One request that comes back to its first rank, cut where its state is kept."""
CROSSING = (
    [
        QueryRun(0, 0, 64, 0, None),
        QueryRun(0, 64, 64, 1, None),
        QueryRun(1, 0, 64, 1, None),
        QueryRun(1, 64, 64, 0, None),
    ],
    (
        StateStep(0, None, StatePlace(1, 1), (), NUM_HEADS),
        StateStep(1, None, StatePlace(0, 1), (), NUM_HEADS),
    ),
)
"""Two requests, one from rank 0 to rank 1 and one back."""


def run_rank(rank: int, directory: str, runs: list[QueryRun], states: tuple[StateStep, ...], late_s: float) -> None:
    torch.set_num_threads(1)
    comm = SocketCommunicator(rank, 2, local_meeting(Path(directory)), timeout_s=30.0)
    pool = StatePool([GROUP], 4, torch.device("cpu"))
    tokens = [sum(run.num_tokens for run in runs if run.compute_rank == r) for r in range(2)]
    plan = Plan(
        plan_id=0,
        phase=Phase.PREFILL,
        ranks=(0, 1),
        num_tokens=tuple(tokens),
        query_runs=tuple(runs),
        table_deltas=(),
        groups=(GroupStep(Strategy.LOCAL),),
        samples=(),
        states=states,
    )
    relay = Relay(plan, pool, comm)
    time.sleep(late_s)

    def count_pieces(rows, state, is_new, handover):
        """As a layer with a convolution and heads does."""
        conv, heads = state
        if is_new:
            conv.zero_()
            heads.zero_()
        if handover is not None:
            handover.arrive(0)
        conv += 1
        if handover is not None:
            handover.note_written(0)
        for part in [range(NUM_HEADS)] if handover is None else handover.heads(1):
            heads[:, part.start : part.stop] += 1
        return torch.zeros(rows.index.stop - rows.index.start, 3)

    relay.run_layer(0, count_pieces)
    for step in states:
        if step.target.rank == rank:
            num_pieces = sum(run.request_id == step.request_id for run in runs) + len(step.kept)
            for component in pool.state(0, step.target.slot):
                assert (component == num_pieces).all()
    comm.close()


@pytest.mark.processes
@pytest.mark.parametrize(("runs", "states"), [KEPT, CROSSING], ids=["kept", "crossing"])
def test_many_small_parts_to_a_rank_that_is_late_hold_nobody_up(tmp_path, runs, states):
    assert 4 * 64 * 128 <= SMALL_BYTES < 4 * 6144 * 4
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(r, str(tmp_path), runs, states, 1.0 * r)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0]
