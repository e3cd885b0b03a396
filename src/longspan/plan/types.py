"""Plan types: what one step computes, where, and what every rank exchanges.

Holds integers only; a plan is a message from the driver to the ranks it names. Must not know torch, or how a plan is
made or run.
Read next: `longspan.plan.segments` (who makes segments and exchanges), `longspan.worker.runner` (who runs plans).

Note: a plan by example
    Two ranks, page size 4, positions 0..3 cached on rank 0 and 4..7 on rank 1; this step computes prompt tokens 8..11
    (rank 1) and 12..15 (rank 0), with `pass_q`:

        query_runs   (8..11 on rank 1), (12..15 on rank 0)
        segments     8..11  on rank 1  x  keys 0..7   on rank 0   full
                     8..11  on rank 1  x  keys 0..7   on rank 1   full
                     8..11  on rank 1  x  keys 8..11  on rank 1   causal
                     12..15 on rank 0  x  keys 0..11  on rank 0   full     (and on rank 1)
                     12..15 on rank 0  x  keys 12..15 on rank 0   causal
        exchanges    query    rank 1 -> 0: 4 rows, rank 0 -> 1: 4 rows
                     partial  rank 0 -> 1: 4 rows, rank 1 -> 0: 4 rows

    A segment names keys by position; "keys 0..7 on rank 0" are those of them that rank 0 stores.
"""

from typing import Literal, TypeAlias

import msgspec

from longspan.sharding.pages import PageRun
from longspan.sharding.visibility import Visibility
from longspan.types import Phase, Strategy, TokenLogprobs

Range: TypeAlias = tuple[int, int, int]
"""(request_id, start, end) of positions."""

Operand: TypeAlias = Literal["query", "partial", "kv"]
"""What an exchange moves."""


class Literals(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="literal"):
    """Input tokens that the driver knows."""

    token_ids: tuple[int, ...]


class SampledBy(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="sampled"):
    """One input token that an earlier plan samples (asynchronous scheduling)."""

    plan_id: int


class QueryRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Consecutive positions of one request that one rank computes in this step.

    The rank's packed rows are its query runs in plan order.
    """

    request_id: int
    position: int
    """Global position of the first token."""
    num_tokens: int
    compute_rank: int
    """The rank that computes; where the token's KV is stored, the page table says."""
    tokens: Literals | SampledBy

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.position + self.num_tokens


class TableDelta(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What changed in one request's page table of one KV group since its last plan."""

    request_id: int
    group_idx: int
    replace: bool
    """The receiver forgets what it knew of this table: some rank of this plan did not see the earlier deltas."""
    added: tuple[PageRun, ...]
    freed_before: int
    """Pages before this index were freed and may be another request's by now."""


class Segment(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Queries of one run against the keys of one range that one rank stores."""

    request_id: int
    query_start: int
    query_end: int
    query_rank: int
    key_rank: int
    key_start: int
    key_end: int
    visibility: Visibility


class DirectExchange(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="direct"):
    """Point-to-point messages among participants, once per layer; every participant joins, also with nothing to say."""

    operand: Operand
    participants: tuple[int, ...]
    num_rows: tuple[tuple[int, ...], ...]
    """`num_rows[i][j]`: rows from participant i to participant j, in all; no message is sent for 0."""


class RingExchange(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="ring"):
    """K and V of every participant go once round the ring of participants, once per layer.

    Participant i sends to i + 1. A participant's rows are cut into blocks of `block_len`. In round r every
    participant's block r makes `len(participants) - 1` hops.
    """

    participants: tuple[int, ...]
    num_rows: tuple[int, ...]
    """Rows that each participant contributes."""
    block_len: int


class GroupStep(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Attention of one KV group in this step: every layer of the group does the same."""

    strategy: Strategy
    segments: tuple[Segment, ...]
    exchanges: tuple[DirectExchange | RingExchange, ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()
    """`pass_q` and `tree`: the participants, node by node; for `pass_q` every rank is a node of its own."""
    query_block_len: int = 0
    """`pass_q` and `tree`: most rows of one message, unless a single query run has more."""


class PageCopy(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Copy whole pages of one KV group, before anything else of the step."""

    group_idx: int
    source: PageRun
    target: PageRun


class SampleRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Sample the token that follows `position`; the row's logits exist on the rank that computes the position."""

    request_id: int
    position: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    num_logprobs: int | None
    """Report the token's log-probability and those of so many most probable tokens; None reports nothing."""
    banned_token_ids: tuple[int, ...]
    """Never sampled (end tokens before `min_tokens`)."""
    allowed: bytes | None = None
    """Nothing else is sampled: bit i % 8 of byte i // 8 is token i; ids past the end are forbidden. None allows all."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)."""
    repetition_penalty: float = 1.0
    seen: bytes | None = None
    """The tokens of prompt and output, in bits as in `allowed`; None if `repetition_penalty` is 1."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    generated_token_ids: tuple[int, ...] = ()
    """The distinct tokens generated so far, if the request uses a penalty on them."""
    generated_counts: tuple[int, ...] = ()
    """How often each of `generated_token_ids` was generated."""


class ScoreRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Report log-probabilities of known tokens: row `position + i` predicts `targets[i]`."""

    request_id: int
    position: int
    targets: tuple[int, ...]
    num_logprobs: int


class Plan(msgspec.Struct, frozen=True, gc=False):
    """One step: what its ranks compute, exchange, store and sample."""

    plan_id: int
    phase: Phase
    ranks: tuple[int, ...]
    """Participants, ascending. All of them run the plan, also those without tokens: the others would wait for ever."""
    query_runs: tuple[QueryRun, ...]
    table_deltas: tuple[TableDelta, ...]
    groups: tuple[GroupStep, ...]
    """One per KV group."""
    samples: tuple[SampleRow, ...]
    """With `scores`, the rows that need logits."""
    scores: tuple[ScoreRun, ...] = ()
    page_copies: tuple[PageCopy, ...] = ()
    released: tuple[int, ...] = ()
    """Requests that ended: the ranks may forget their tables."""
    last_layer: GroupStep | None = None
    """Attention of the model's last layer, where not all rows need logits: it is computed for those that do
    (`longspan.plan.read_runs`). None: as in its KV group's other layers."""


class SampledToken(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The token that a request continues with."""

    request_id: int
    position: int
    """Position that the token will take: one past the row it was sampled from."""
    token_id: int
    logprobs: TokenLogprobs | None


class FailedRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A row that cannot be sampled: the request ends, the others go on."""

    request_id: int
    reason: str


class ScoredRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Answer to a `ScoreRun`."""

    request_id: int
    position: int
    """Position of the first scored token."""
    logprobs: tuple[TokenLogprobs, ...]


class RankResult(msgspec.Struct, frozen=True, gc=False):
    """What one rank has to say after a plan."""

    plan_id: int
    rank: int
    sampled: tuple[SampledToken, ...]
    scored: tuple[ScoredRun, ...]
    tokens_computed: int
    """Since the worker started; tokens that a rank computes only to keep shapes fixed are left out."""
    bytes_sent: int
    """Since the worker started, counted by the communicator."""
    step_s: float = 0.0
    """Seconds that this rank took for the plan, waits for peers included."""
    busy_s: float = 0.0
    """The same over all plans since the worker started."""
    failed: tuple[FailedRow, ...] = ()
    strategy_bytes: dict[str, int] = {}
    """Bytes sent per strategy since the worker started."""


class PlanResult(msgspec.Struct, frozen=True, gc=False):
    """The answers of all ranks of a plan."""

    plan_id: int
    ranks: tuple[RankResult, ...]
