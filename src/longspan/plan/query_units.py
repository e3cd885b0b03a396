"""Routes and order of the queries that `pass_q` and `tree` send in one layer, for all ranks.

Holds one pure function of segments. Must not know tensors, bytes or time. Makers of plans count rows with it, ranks
follow it; both see the same segments, so they agree by construction.
Read next: `longspan.cp.pass_q`, which runs the units.

Note [Hops]
    A query run goes from its *home* (the rank that computes it) to every *owner* (a rank with keys that it sees). In
    the home's own node it goes straight there. To another node it goes once, to a *leader*, which passes it on to the
    other owners of its node, merges their partials with its own, and sends one partial home:

        nodes {0, 1} and {2, 3}; a query of rank 0 sees keys everywhere
        queries    0 -> 1    0 -> 2    2 -> 3
        partials   1 -> 0    3 -> 2    2 -> 0   (of ranks 2 and 3, merged)

    So one row crosses to a node, whatever its number of ranks. The homes of a node have different leaders: home i of
    its node takes owner i of the other one. With every rank a node of its own nothing is passed on: that is `pass_q`.

Note [Units]
    One message per pair at once would need memory for a whole chunk's queries of every other rank. So the work is cut
    into units, the same list on every rank: first the shifts inside nodes (rank i to rank i + n), then the shifts
    between nodes (node i to node i + n), each in blocks of at most `block_len` rows. In one unit a rank sends its
    queries to one other, and all ranks are busy. A block holds whole query runs, so a run longer than `block_len` is a
    block of its own.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from longspan.plan.types import Range, Segment

Pair = tuple[int, int]
"""Ranks (sender, receiver)."""


class QueryUnit(NamedTuple):
    """Messages that are under way together. Partials take the same routes back."""

    queries: dict[Pair, list[Range]]
    """Query runs by (home, owner or leader) that they go from and to."""
    relayed: dict[Pair, list[Range]]
    """Query runs by (leader, owner in its node) that they are passed on from and to, those of lower homes first."""
    num_rows: int
    """Most rows that one rank receives in this unit, the same number on all ranks."""


def query_units(segments: Iterable[Segment], nodes: Sequence[Sequence[int]], block_len: int) -> list[QueryUnit]:
    """All units of a step, in order.

    Args:
        segments: the segments of one KV group.
        nodes: the participants, node by node. One rank per node gives `pass_q`.
        block_len: most rows of a block, unless a single query run has more.
    """
    meets: dict[Pair, dict[Range, None]] = {}  # (home, owner): runs that see keys there
    order: dict[Range, int] = {}
    for s in segments:
        if s.query_rank != s.key_rank:
            run = (s.request_id, s.query_start, s.query_end)
            order.setdefault(run, len(order))
            meets.setdefault((s.query_rank, s.key_rank), {})[run] = None

    units: list[QueryUnit] = []
    for shift in range(1, max((len(node) for node in nodes), default=0)):
        pairs: dict[Pair, list[Range]] = {}
        for node in nodes:
            for i, home in enumerate(node):
                pair = (home, node[(i + shift) % len(node)])
                if shift < len(node) and pair in meets:
                    pairs[pair] = list(meets[pair])
        units += _blocks(pairs, (), meets, block_len)
    for shift in range(1, len(nodes)):
        pairs = {}
        for node_idx, node in enumerate(nodes):
            other = nodes[(node_idx + shift) % len(nodes)]
            for i, home in enumerate(node):
                owners = [owner for owner in other if (home, owner) in meets]
                if owners:
                    runs = {run for owner in owners for run in meets[home, owner]}
                    pairs[home, owners[i % len(owners)]] = sorted(runs, key=order.__getitem__)
        units += _blocks(pairs, nodes, meets, block_len)
    return units


def _blocks(
    pairs: dict[Pair, list[Range]], nodes: Sequence[Sequence[int]], meets: dict[Pair, dict[Range, None]], block_len: int
) -> list[QueryUnit]:
    """Units of one shift, where leaders pass queries on inside `nodes`."""
    cut = {pair: _cut(runs, block_len) for pair, runs in sorted(pairs.items())}
    mates = {rank: [other for other in node if other != rank] for node in nodes for rank in node}
    units: list[QueryUnit] = []
    for index in range(max((len(blocks) for blocks in cut.values()), default=0)):
        queries = {pair: blocks[index] for pair, blocks in cut.items() if index < len(blocks)}
        relayed: dict[Pair, list[Range]] = {}
        for (home, leader), runs in queries.items():
            for owner in mates.get(leader, ()):
                wanted = meets.get((home, owner), {})
                passed_on = [run for run in runs if run in wanted]
                if passed_on:
                    relayed.setdefault((leader, owner), []).extend(passed_on)
        received: dict[int, int] = {}
        for messages in (queries, relayed):
            for (_, to), runs in messages.items():
                received[to] = received.get(to, 0) + num_rows(runs)
        units.append(QueryUnit(queries, relayed, max(received.values())))
    return units


def _cut(runs: Iterable[Range], block_len: int) -> list[list[Range]]:
    """Group whole runs into blocks of at most `block_len` rows."""
    blocks: list[list[Range]] = []
    room = 0
    for run in runs:
        count = run[2] - run[1]
        if not blocks or count > room:
            blocks.append([])
            room = block_len
        blocks[-1].append(run)
        room -= count
    return blocks


def num_rows(runs: Iterable[Range]) -> int:
    """Rows of a message of whole runs."""
    return sum(end - start for _, start, end in runs)
