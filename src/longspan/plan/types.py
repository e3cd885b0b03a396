"""Plan types: the tokens that one step computes, their ranks, and how queries and keys meet.

Holds integers only; a plan is a message from the driver to the ranks it names. Must not know torch, or how a plan is
made or run.
Read next: `longspan.plan.build`, which makes plans; `longspan.worker.runner`, which runs them.

Note [A plan by example]
    Two ranks, page size 4, positions 0..3 cached on rank 0 and 4..7 on rank 1; this step computes prompt tokens 8..11
    (rank 1) and 12..15 (rank 0), with `pass_q`:

        query_runs   (8..11 on rank 1), (12..15 on rank 0)
        groups       pass_q between ranks 0 and 1, which send 4 rows each, and receive 4

    From this and the page tables every rank derives its own part, of which this is all:

        segments     8..11  on rank 1  x  keys 0..7   on rank 0   full
                     8..11  on rank 1  x  keys 0..7   on rank 1   full
                     8..11  on rank 1  x  keys 8..11  on rank 1   causal
                     12..15 on rank 0  x  keys 0..11  on rank 0   full     (and on rank 1)
                     12..15 on rank 0  x  keys 12..15 on rank 0   causal
        exchanges    query    rank 1 -> 0: 4 rows, rank 0 -> 1: 4 rows
                     partial  rank 0 -> 1: 4 rows, rank 1 -> 0: 4 rows

    A segment names keys by position; "keys 0..7 on rank 0" are those of keys 0..7 that rank 0 stores.
"""

from typing import Literal, TypeAlias

import msgspec

from longspan.sharding.pages import PageRun
from longspan.sharding.visibility import Visibility
from longspan.types import Phase, Strategy, TokenLogprobs

Range: TypeAlias = tuple[int, int, int]
"""Positions `[start, end)` of a request, as (request_id, start, end)."""

Operand: TypeAlias = Literal["query", "partial", "kv"]
"""Kind of rows that an exchange moves."""


FIRST_DRAFT_PLAN = 2**62
"""Number of the draft model's first plan: a rank with two models knows by its number whose plan it is. Both count on
from their first ones."""


def is_draft_plan(plan_id: int) -> bool:
    """Whether a plan is the draft model's."""
    return plan_id >= FIRST_DRAFT_PLAN


class Literals(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="literal"):
    """Input tokens that the driver knows, or proposes: drafts of tokens that are not sampled yet."""

    token_ids: tuple[int, ...]


class SampledBy(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="sampled"):
    """One input token that an earlier plan samples (asynchronous scheduling)."""

    plan_id: int


Tokens: TypeAlias = Literals | SampledBy
"""Input tokens of a query run."""


class QueryRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Consecutive positions of one request that one rank computes in this step.

    The rank's packed rows are its query runs in plan order.
    """

    request_id: int
    position: int
    """Global position of the first token."""
    num_tokens: int
    compute_rank: int
    """Rank that computes the tokens; the page table says where their KV is stored."""
    tokens: Tokens | None
    """None where they are not named: on a rank, in the runs of other ranks."""
    rope_len: int = 0
    """Length that counts for RoPE in every row, but where `position + 1` is more; 0 where it does not matter."""
    adapter_id: int | None = None
    """LoRA adapter of the request (`longspan.types.Adapter`); None for none."""

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.position + self.num_tokens


class TableDelta(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Changes of one request's page table in one KV group since the request's last plan."""

    request_id: int
    group_idx: int
    replace: bool
    """Whether the receiver forgets its table first, because a rank of this plan did not see the earlier deltas."""
    added: tuple[PageRun, ...]
    freed_before: int
    """Index before which pages were freed; they may be another request's by now."""


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


class GroupStep(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Attention of one KV group in this step: every layer of the group does the same.

    Which rows move, every rank derives for itself, and asserts that their number is the one that is said here.
    """

    strategy: Strategy
    nodes: tuple[tuple[int, ...], ...] = ()
    """Participants of the exchanges, node by node; but in a `tree`, every rank is a node of its own."""
    block_len: int = 0
    """Rows per block of a ring; most rows of one message of `pass_q` and `tree`, unless a single query run has more."""
    num_sent: tuple[int, ...] = ()
    """Rows that each participant, in ascending order, sends of its own or passes on, in one layer: keys or queries. In
    a ring, those that it contributes."""
    num_received: tuple[int, ...] = ()
    """Rows that each participant receives; empty for a ring."""
    num_blocks: int = 0
    """Messages of `pass_q` and `tree` that one rank's queries for one other rank take at most."""
    num_ahead: int = 0
    """Units of `pass_q` and `tree` whose queries may be under way before those of an earlier one are taken in."""

    @property
    def participants(self) -> tuple[int, ...]:
        """Ranks that exchange something, ascending."""
        return tuple(sorted([rank for node in self.nodes for rank in node]))


class PageCopy(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Copy whole pages of one KV group, before anything else of the step."""

    group_idx: int
    source: PageRun
    target: PageRun


class StatePlace(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Slot of one rank that holds the state of a request in all recurrent layers."""

    rank: int
    slot: int


class KeptState(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Copy of a state that outlives the request, so that later requests may go on from it."""

    position: int
    """Number of tokens that the state has seen."""
    place: StatePlace
    """On the rank that computes the last of them."""


class StateStep(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """State of one request in this step: it is read where it lies, handed along the request's query runs in the order
    of positions, and left in a slot of the rank that computes the last run."""

    request_id: int
    source: StatePlace | None
    """State before the step's first token, which is not changed unless it is `target`; None at position 0."""
    target: StatePlace
    """State behind the step's last token."""
    kept: tuple[KeptState, ...] = ()
    """In the order of positions."""
    num_parts: int = 1
    """Parts of heads in which it goes from rank to rank (`longspan.cp.handover`)."""


class GraphStep(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """How all ranks run a decode step of fixed shape (`longspan.scheduler.step_graphs`)."""

    slot: int
    """Slot in which ranks keep what belongs to the shape; another shape that is there makes room."""
    run: Literal["launch", "capture", "replay"]
    """Kernel by kernel; the same, and then captured as a CUDA graph; or as the graph that was captured last."""


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
    """Most probable tokens whose log-probabilities are reported beside the sampled one's; None reports nothing."""
    banned_token_ids: tuple[int, ...]
    """Tokens that are not sampled (end tokens before `min_tokens`)."""
    allowed: bytes | None = None
    """Mask of tokens that may be sampled: token i is bit i % 8 of byte i // 8, ids past the end are forbidden. None
    allows all."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs (token id, number added to its logit)."""
    repetition_penalty: float = 1.0
    seen: bytes | None = None
    """Mask of the tokens in prompt and output, laid out as `allowed`; None if `repetition_penalty` is 1."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    generated_token_ids: tuple[int, ...] = ()
    """Distinct tokens generated so far, if the request has a presence or frequency penalty."""
    generated_counts: tuple[int, ...] = ()
    """Number of times that each of `generated_token_ids` was generated."""


class ScoreRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Report log-probabilities of known tokens: row `position + i` predicts `targets[i]`."""

    request_id: int
    position: int
    targets: tuple[int, ...]
    num_logprobs: int


class Plan(msgspec.Struct, frozen=True, gc=False):
    """One step: the tokens that its ranks compute, exchange, store and sample."""

    plan_id: int
    phase: Phase
    ranks: tuple[int, ...]
    """Participants, ascending. Those without tokens run the plan too: otherwise the others would wait for ever."""
    num_tokens: tuple[int, ...]
    """Tokens that each of `ranks` computes: all of them know it, also of requests that they are told nothing of."""
    query_runs: tuple[QueryRun, ...]
    table_deltas: tuple[TableDelta, ...]
    groups: tuple[GroupStep, ...]
    """Step of each KV group."""
    samples: tuple[SampleRow, ...]
    """Rows that are sampled from; these and the rows of `scores` need logits. A request has several where the step
    checks drafts: one behind its last known token, and one behind each draft."""
    scores: tuple[ScoreRun, ...] = ()
    page_copies: tuple[PageCopy, ...] = ()
    states: tuple[StateStep, ...] = ()
    """State of every request of the step, if the model has recurrent layers."""
    released: tuple[int, ...] = ()
    """Requests that ended: the ranks may forget their tables."""
    last_layer: GroupStep | None = None
    """Attention of the model's last layer, for `read_runs`. None: all rows, as in the other layers of its KV group."""
    read_runs: tuple[QueryRun, ...] = ()
    """Parts of query runs that need logits, if `last_layer` is given (`longspan.plan.read_runs`)."""
    packed: tuple[int, ...] = ()
    """Requests whose pages all lie on the rank that computes them: other ranks are told nothing of them. Their query
    runs come last, so that other ranks know the packed rows of all other runs."""
    has_drafts: bool = False
    """Whether a request has drafts. All ranks know it, also where it is one that they are told nothing of."""
    follows: int | None = None
    """Number of the plan that this one takes one token further, all else being equal (`longspan.plan.advance`)."""
    graph: GraphStep | None = None
    """How the step runs in fixed shape; None: in any shape."""


class SampledToken(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Token that a request continues with."""

    request_id: int
    position: int
    """Position that the token will take: one past the row it was sampled from."""
    token_id: int
    logprobs: TokenLogprobs | None


class FailedRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Row that cannot be sampled: its request ends, the other requests go on. Behind a draft that is wrong, it does not
    matter."""

    request_id: int
    position: int
    """Position that the token would take: one past the row."""
    reason: str


class ScoredRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Log-probabilities that answer a `ScoreRun`."""

    request_id: int
    position: int
    """Position of the first scored token."""
    logprobs: tuple[TokenLogprobs, ...]


class RankResult(msgspec.Struct, frozen=True, gc=False):
    """Answer of one rank to a plan."""

    plan_id: int
    rank: int
    sampled: tuple[SampledToken, ...]
    scored: tuple[ScoredRun, ...]
    tokens_computed: int
    """Tokens computed since the worker started, without those that only keep shapes fixed."""
    bytes_sent: int
    """Bytes sent since the worker started, as the communicator counts them."""
    step_s: float = 0.0
    """Seconds that this rank took for the plan, waits for peers included."""
    busy_s: float = 0.0
    """Seconds that this rank took for all plans since the worker started, waits for peers included."""
    failed: tuple[FailedRow, ...] = ()
    capture_failed: bool = False
    """Whether the rank was asked to capture the step, and could not."""
    strategy_bytes: dict[str, int] = {}
    """Bytes sent per strategy, and for states of recurrent layers as `states`, since the worker started."""


class PlanResult(msgspec.Struct, frozen=True, gc=False):
    """Answers of all ranks of a plan."""

    plan_id: int
    ranks: tuple[RankResult, ...]
