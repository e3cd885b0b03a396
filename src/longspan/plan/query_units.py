"""Routes and order of the queries that `pass_q` and `tree` send in one layer.

Holds pure functions of query runs and page tables. Must not know tensors, bytes or time. Every rank derives its own
part of every unit; what is equal on all ranks (numbers of units, their order) follows from the plan's group step alone.
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
    into units, numbered alike on every rank: first the shifts inside nodes (rank i to rank i + n), then the shifts
    between nodes (node i to node i + n), each in blocks of at most `block_len` rows. In one unit a rank sends its
    queries to one other, and all ranks are busy. A block holds whole query runs, so a run longer than `block_len` is a
    block of its own. Every shift has numbers for as many blocks as any rank's queries may take
    (`GroupStep.num_blocks`); a rank leaves out the units in which it has no part.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from longspan.kv.layout import KVSpec
from longspan.plan.segments import cut_runs
from longspan.plan.types import GroupStep, QueryRun, Range, Segment
from longspan.sharding.pages import PageTable

Pair = tuple[int, int]
"""Ranks (sender, receiver)."""

Meets = dict[Pair, dict[Range, int]]
"""Query runs that see keys of another rank, by (rank that computes them, rank of the keys), with their places in the
plan's order, ascending."""


class QueryUnit(NamedTuple):
    """Messages that are under way together. Partials take the same routes back."""

    number: int
    """Place of the unit in the order, the same on all ranks."""
    has_relays: bool
    """Whether leaders pass queries on in this unit, if there are any: the same on all ranks."""
    queries: dict[Pair, list[Range]]
    """Query runs by (home, owner or leader) that they go from and to."""
    relayed: dict[Pair, list[Range]]
    """Query runs by (leader, owner in its node) that they are passed on from and to, those of lower homes first."""


def find_meetings(
    query_runs: Sequence[QueryRun],
    tables: Mapping[int, PageTable],
    spec: KVSpec,
    homes: Container[int],
    owners: Container[int],
) -> Meets:
    """Find which query runs see keys of which other ranks.

    Args:
        query_runs: a step's query runs.
        tables: page table per request of one KV group.
        spec: the group's window or chunks.
        homes: ranks whose runs are of interest, wherever the keys lie.
        owners: ranks whose keys are of interest, whosever runs see them.
    """
    meets: Meets = {}
    for place, run in enumerate(cut_runs(query_runs, spec.chunk)):
        table, home = tables[run.request_id], run.compute_rank
        if table.is_on(home):
            continue
        for owner in table.ranks_with(spec.first_key(run.position), run.position):
            if owner != home and (home in homes or owner in owners):
                meets.setdefault((home, owner), {})[run.request_id, run.position, run.end] = place
    return meets


def rank_units(
    rank: int,
    segments: Iterable[Segment],
    query_runs: Sequence[QueryRun],
    tables: Mapping[int, PageTable],
    spec: KVSpec,
    step: GroupStep,
) -> list[QueryUnit]:
    """One rank's part of the units of a step, in order; units in which it has no part are left out.

    Args:
        rank: the rank; it need not take part at all.
        segments: the rank's own segments.
        query_runs: the step's query runs.
        tables: page table per request of one KV group.
        spec: the group's window or chunks.
        step: the group's step.
    """
    own_node = next((node for node in step.nodes if rank in node), ())
    if any(len(node) > 1 for node in step.nodes):  # what leaders pass on is seen by their mates' keys
        meets = find_meetings(query_runs, tables, spec, (rank,), own_node)
    else:
        meets = {}
        for place, s in enumerate(segments):
            if s.query_rank != s.key_rank:
                runs = meets.setdefault((s.query_rank, s.key_rank), {})
                runs.setdefault((s.request_id, s.query_start, s.query_end), place)
    return query_units(meets, step.nodes, step.block_len, step.num_blocks, rank)


def query_units(
    meets: Meets, nodes: Sequence[Sequence[int]], block_len: int, num_blocks: int, rank: int | None = None
) -> list[QueryUnit]:
    """Cut a step's messages into units, in order.

    Args:
        meets: which runs see keys of which other ranks; for one rank, at least what it sends, and what its node gets.
        nodes: the participants, node by node. One rank per node gives `pass_q`.
        block_len: most rows of a block, unless a single query run has more.
        num_blocks: most blocks of one pair of ranks.
        rank: the rank whose part is wanted; None for all of them.
    """
    places = {member: (node_idx, i) for node_idx, node in enumerate(nodes) for i, member in enumerate(node)}
    if rank is not None and rank not in places:
        return []
    own = None if rank is None else places[rank][0]
    inside: dict[int, dict[Pair, list[Range]]] = {}  # shift in a node to what it sends
    between: dict[int, dict[int, list[tuple[int, int]]]] = {}  # shift of nodes to homes, with (place, owner) there
    for home, owner in meets:
        if home not in places or owner not in places:
            continue
        (home_node, i), (owner_node, j) = places[home], places[owner]
        if home_node == owner_node:
            if rank in (None, home, owner):
                shift = (j - i) % len(nodes[home_node])
                inside.setdefault(shift, {})[home, owner] = list(meets[home, owner])
        elif rank in (None, home) or owner_node == own:
            shift = (owner_node - home_node) % len(nodes)
            between.setdefault(shift, {}).setdefault(home, []).append((j, owner))
    units: list[QueryUnit] = []
    for shift in sorted(inside):
        units += _blocks(inside[shift], {}, meets, block_len, (shift - 1) * num_blocks, rank)
    largest = max(map(len, nodes), default=1)
    num_inside = largest - 1  # shifts
    mates = {member: [other for other in node if other != member] for node in nodes for member in node if largest > 1}
    for shift in sorted(between):
        pairs: dict[Pair, list[Range]] = {}
        for home, found in between[shift].items():
            owners = [found[0][1]] if len(found) == 1 else [owner for _, owner in sorted(found)]
            leader = owners[places[home][1] % len(owners)]
            pairs[home, leader] = _together([meets[home, owner] for owner in owners])
        units += _blocks(pairs, mates, meets, block_len, (num_inside + shift - 1) * num_blocks, rank)
    return units


def _together(found: Sequence[Mapping[Range, int]]) -> list[Range]:
    """Runs that see keys of some owner of a node, in the plan's order."""
    if len(found) == 1:
        return list(found[0])
    places = {run: place for of_owner in found for run, place in of_owner.items()}
    return sorted(places, key=places.__getitem__)


def _blocks(
    pairs: dict[Pair, list[Range]],
    mates: Mapping[int, Sequence[int]],
    meets: Meets,
    block_len: int,
    first: int,
    rank: int | None,
) -> list[QueryUnit]:
    """Units of one shift, where leaders pass queries on to their `mates`."""
    if len(pairs) == 1 and not mates:  # of many ranks, a decode's home sends one row to each
        ((pair, runs),) = pairs.items()
        return [QueryUnit(first + i, False, {pair: block}, {}) for i, block in enumerate(cut_blocks(runs, block_len))]
    cut = {pair: cut_blocks(runs, block_len) for pair, runs in sorted(pairs.items())}
    units: list[QueryUnit] = []
    for index in range(max((len(blocks) for blocks in cut.values()), default=0)):
        queries = {pair: blocks[index] for pair, blocks in cut.items() if index < len(blocks)}
        relayed: dict[Pair, list[Range]] = {}
        for (home, leader), runs in queries.items() if mates else ():
            for owner in mates.get(leader, ()):
                wanted = meets.get((home, owner), {})
                passed_on = [run for run in runs if run in wanted]
                if passed_on and rank in (None, leader, owner):
                    relayed.setdefault((leader, owner), []).extend(passed_on)
        if rank is not None:
            queries = {pair: runs for pair, runs in queries.items() if rank in pair}
        if queries or relayed:
            units.append(QueryUnit(first + index, bool(mates), queries, relayed))
    return units


def cut_blocks(runs: Iterable[Range], block_len: int) -> list[list[Range]]:
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


def moved_rows(units: Iterable[QueryUnit], rank: int) -> tuple[int, int]:
    """Rows of queries that a rank sends, those of others that it passes on included, and that it receives."""
    sent = received = 0
    for unit in units:
        for messages in (unit.queries, unit.relayed):
            for (source, target), runs in messages.items():
                sent += num_rows(runs) if source == rank else 0
                received += num_rows(runs) if target == rank else 0
    return sent, received
