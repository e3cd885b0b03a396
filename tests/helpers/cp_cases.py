"""Random requests on random ranks, for the tests of segments, policy and strategies: integers only.

A `Cluster` holds page tables whose pages lie anywhere, and makes steps: several requests, chunks that start in the
middle of a page, decode rows, ranks without a token. Must not know tensors.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longspan.costmodel.choose import predict_strategy
from longspan.costmodel.parameters import Costs
from longspan.costmodel.predict import Prediction
from longspan.costmodel.work import count_work
from longspan.kv.layout import KVGroup, KVSpec
from longspan.plan.exchanges import Exchange, count_exchanges
from longspan.plan.step_keys import StepKeys
from longspan.plan.types import Literals, QueryRun
from longspan.sharding.pages import PageTable
from longspan.types import Strategy

RANK_COUNTS = (1, 2, 3, 4, 5, 8)
NODE_COUNTS = (1, 2, 4)


class StepCase(NamedTuple):
    """A step of one KV group under a strategy."""

    strategy: Strategy
    keys: StepKeys
    block_len: int
    tables: Mapping[int, PageTable] | None = None

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """What moves between ranks on one node."""
        return count_exchanges(self.strategy, self.keys, self.block_len, (self.keys.participants,))

    def predict(self, group: KVGroup, costs: Costs) -> Prediction:
        """Predict one layer."""
        work = count_work(self.keys, group, costs.rates)
        return predict_strategy(self.strategy, self.keys, group, costs, work, self.block_len).prediction


def attention_time(step: StepCase, group: KVGroup, costs: Costs) -> float:
    """Predicted seconds of one layer of a KV group, until the last rank is done."""
    return step.predict(group, costs).total_s


def spread(num_ranks: int, num_nodes: int) -> tuple[int, ...]:
    """Node of every rank: as equal as can be, ranks of a node together."""
    num_nodes = min(num_nodes, num_ranks)
    return tuple(rank * num_nodes // num_ranks for rank in range(num_ranks))


@dataclass
class Cluster:
    """Page tables of some requests over `num_ranks` ranks, one per KV group, and how far each is computed."""

    rng: random.Random
    num_ranks: int
    page_size: int
    windows: Sequence[int | None]
    """One KV group per entry."""
    num_requests: int
    pages_per_rank: int = 256
    owner_style: str = "random"
    """`random`: any rank per page; `striped`: round the ranks; `packed`: one rank per request."""
    tables: list[dict[int, PageTable]] = field(default_factory=list)
    """[group][request]"""
    computed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = [{r: PageTable(self.page_size) for r in range(self.num_requests)} for _ in self.windows]
        self.computed = dict.fromkeys(range(self.num_requests), 0)
        self._free = [[self._shuffled_slots() for _ in range(self.num_ranks)] for _ in self.windows]

    def _shuffled_slots(self) -> list[int]:
        """Slots in an order with some consecutive runs: both one-run and scattered requests occur."""
        runs = [list(range(first, first + 4)) for first in range(0, self.pages_per_rank, 4)]
        self.rng.shuffle(runs)
        return [slot for run in runs for slot in (run if self.rng.random() < 0.7 else run[::-1])]

    def owner(self, request_id: int, page_idx: int) -> int:
        """The rank that a request's next page lies on."""
        if self.owner_style == "random":
            return self.rng.randrange(self.num_ranks)
        if self.owner_style == "packed":
            return request_id % self.num_ranks
        return (request_id + page_idx) % self.num_ranks

    def step(self, new_tokens: dict[int, int]) -> list[QueryRun]:
        """Query runs of a step that computes so many tokens of each request, in shuffled order; tables grow."""
        runs: list[QueryRun] = []
        for request_id, count in new_tokens.items():
            start, end = self.computed[request_id], self.computed[request_id] + count
            while self.tables[0][request_id].num_pages * self.page_size < end:
                rank = self.owner(request_id, self.tables[0][request_id].num_pages)
                for group_idx, tables in enumerate(self.tables):
                    tables[request_id].append(rank, self._free[group_idx][rank].pop(), 1)
            runs += [
                QueryRun(request_id, first, last - first, rank, Literals((0,) * (last - first)))
                for rank, first, last in self.tables[0][request_id].owners(start, end)
            ]
            self.computed[request_id] = end
        self.rng.shuffle(runs)
        return runs

    def slide(self) -> None:
        """Free the pages behind the windows; later pages may take their slots."""
        for group_idx, (window, tables) in enumerate(zip(self.windows, self.tables, strict=True)):
            if window is None:
                continue
            for request_id, table in tables.items():
                oldest = max(0, self.computed[request_id] - window + 1)
                for run in table.free_before(oldest // self.page_size):
                    self._free[group_idx][run.rank] += range(run.slot, run.slot + run.num_pages)


def random_cluster(
    rng: random.Random, *, num_ranks: int | None = None, windows: Sequence[int | None] | None = None
) -> Cluster:
    """A cluster whose pages, ranks, windows and placement are drawn at random."""
    if windows is None:
        windows = rng.choice([[None], [None], [rng.randint(1, 12)], [None, rng.randint(1, 12)]])
    return Cluster(
        rng,
        num_ranks=num_ranks or rng.choice(RANK_COUNTS),
        page_size=rng.choice([1, 2, 3, 4, 7]),
        windows=windows,
        num_requests=rng.randint(1, 3),
        owner_style=rng.choice(["random", "random", "random", "striped", "striped", "packed"]),
    )


def random_chunk(rng: random.Random, cluster: Cluster) -> dict[int, int]:
    """New tokens per request of one step; at least one token, decode rows and chunks mixed."""
    requests = [r for r in cluster.computed if rng.random() < 0.8] or [0]
    return {r: rng.choice([1, 2, rng.randint(3, 20), rng.randint(3, 20)]) for r in requests}


def make_group(
    layers: Sequence[int],
    *,
    query_heads: int = 2,
    kv_heads: int = 1,
    k_width: int = 4,
    v_width: int = 4,
    dtype: str = "float64",
    window: int | None = None,
) -> KVGroup:
    """A KV group of some layers."""
    return KVGroup(tuple(layers), KVSpec.uniform(kv_heads, k_width, v_width, dtype, window), query_heads)
