"""Rows that a strategy moves between all ranks in one layer, counted from the keys that runs see.

Holds counts, for makers of plans and for tests. Must not know tensors, costs, or in how many messages rows travel.
Read next: `longspan.plan.group_step`, what ranks are told of it; `longspan.costmodel.predict`, how long it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.plan.step_keys import Counts, StepKeys
from longspan.plan.types import Operand
from longspan.types import Strategy


@dataclass(frozen=True, eq=False)
class DirectExchange:
    """Point-to-point messages among ranks, once per layer."""

    operand: Operand
    ranks: Sequence[int]
    num_rows: Counts
    """[P, P] rows that rank i of `ranks` sends to rank j, in all; no message is sent for 0."""


@dataclass(frozen=True, eq=False)
class RingExchange:
    """K and V of every participant go once round the ring of participants, once per layer.

    Participant i sends to i + 1. A participant's rows are cut into blocks of `block_len`. In round r every
    participant's block r makes `len(participants) - 1` hops.
    """

    participants: Sequence[int]
    num_rows: Sequence[int]
    """Rows that each participant contributes."""
    block_len: int


Exchange = DirectExchange | RingExchange


def count_exchanges(
    strategy: Strategy, keys: StepKeys, block_len: int, nodes: Sequence[Sequence[int]]
) -> tuple[Exchange, ...]:
    """Count what a strategy moves; nothing if no query sees a key of another rank.

    Args:
        strategy: the movement strategy.
        keys: keys that the step's runs see.
        block_len: rows per block of a ring.
        nodes: the participants, node by node, for `tree`.
    """
    if not keys.participants:
        return ()
    if strategy is Strategy.PASS_KV:
        rows = contributed_rows(keys)
        column = {rank: i for i, rank in enumerate(keys.ranks)}
        return (RingExchange(keys.participants, [int(rows[column[rank]]) for rank in keys.participants], block_len),)
    if strategy is Strategy.GATHER_KV:
        return (DirectExchange("kv", keys.ranks, gathered_rows(keys)),)
    if strategy is Strategy.PASS_Q:
        there = [query_rows(keys)]
    elif strategy is Strategy.TREE:
        there = list(tree_rows(keys, nodes))
    else:
        raise AssertionError(f"{strategy} cannot serve queries and keys on different ranks")
    exchanges = [DirectExchange("query", keys.ranks, rows) for rows in there]
    exchanges += [DirectExchange("partial", keys.ranks, rows.T) for rows in reversed(there)]
    return tuple(exchanges)


def contributed_rows(keys: StepKeys) -> Counts:
    """[P] keys of each rank that queries of any other rank see."""
    seen = keys.seen_by
    by_others = seen.sum(axis=1, keepdims=True) > seen
    found: Counts = np.where(by_others, keys.counts, 0).sum(axis=0)
    return found


def gathered_rows(keys: StepKeys) -> Counts:
    """[P, P] keys of rank i that queries of rank j see; 0 where i is j."""
    found = keys.counts.T.astype(np.float64) @ keys.seen_by.astype(np.float64)  # exact, and faster than in integers
    np.fill_diagonal(found, 0)
    return found.astype(np.int64)


def query_rows(keys: StepKeys) -> Counts:
    """[P, P] queries of rank i in runs that see keys of rank j; 0 where i is j."""
    return keys.by_home((keys.remote > 0) * keys.num_queries[:, None])


def tree_rows(keys: StepKeys, nodes: Sequence[Sequence[int]]) -> tuple[Counts, Counts]:
    """[P, P] queries that homes send to owners of their node and to leaders of others, and that leaders pass on.

    See Note [Hops] in `longspan.plan.query_units`.
    """
    direct = query_rows(keys)
    meets = keys.remote > 0
    column = {rank: i for i, rank in enumerate(keys.ranks)}
    members_of = [np.array([column[rank] for rank in node], dtype=np.int64) for node in nodes]
    sent, relayed = np.zeros_like(direct), np.zeros_like(direct)
    homes: NDArray[Any] = np.array([home for members in members_of for home in members], dtype=np.int64)
    place: NDArray[Any] = np.array([i for members in members_of for i in range(len(members))], dtype=np.int64)
    node_of = np.array([n for n, members in enumerate(members_of) for _ in members], dtype=np.int64)
    for n, members in enumerate(members_of):
        inside = np.ix_(members, members)
        sent[inside] = direct[inside]
        crossing = keys.by_home(meets[:, members].any(axis=1) * keys.num_queries)  # [P] rows that see keys of the node
        far = np.flatnonzero((node_of != n) & (crossing[homes] > 0))
        rows = direct[np.ix_(homes[far], members)]  # [far homes, members]
        owns = rows > 0
        nth = np.cumsum(owns, axis=1)
        wanted = place[far] % nth[:, -1] + 1 if len(far) else nth[:, -1]
        leaders = np.argmax(owns & (nth == wanted[:, None]), axis=1)
        sent[homes[far], members[leaders]] += crossing[homes[far]]
        for home, leader in enumerate(leaders):
            passed_on = rows[home].copy()
            passed_on[leader] = 0
            relayed[members[leader], members] += passed_on
    return sent, relayed
