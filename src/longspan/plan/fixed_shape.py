"""Fixed shape of a decode step, which a CUDA graph can repeat, and which engines have such steps.

Holds pure functions. Must not know tensors, buffers or graphs.
Read next: `longspan.scheduler.step_graphs`, which decides what is captured; `longspan.cp.fixed`, the attention of such
steps.

Note [Fixed shapes]
    Every rank of a plan makes the same `FixedShape` of it, or all make none: it depends on what all are told alone.
    Scores and packed runs are told to one rank; but a decode scores nothing (`build_plan` asserts it), and its runs are
    one token each, but where it checks drafts: such steps are not fixed.
    Rows are padded to a bucket on all ranks, so messages have the same sizes however many requests a rank has. A
    padding row is token 0 at position 0, sees no key, is stored nowhere and never sampled.

    Three ranks decode two requests of rank 1, whose keys lie on all three, and none of rank 0 and 2: `homes` is (1,),
    `num_rows` 2. In every layer

        rank 1            sends 2 queries to 0 and 2, computes its own partials meanwhile, gets 2 from each, merges
        ranks 0 and 2     get 2 queries, compute, send 2 partials; they do not run the model
"""

from typing import NamedTuple

from longspan.config import EngineConfig
from longspan.plan.types import Plan
from longspan.types import ModelSpec, Phase, Strategy

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Legal numbers of rows of one rank; a step with more rows is not fixed."""

OWN_DECODE = ("triton", "flashinfer", "cudnn")
"""Attention backends whose decode is computed by our own kernels, which fixed steps launch."""

MOST_SHARED = 8
"""Times that a step's requests together may look at every page of a pool, on average: a rank's buffer of key tiles has
room for so many. Without shared prefixes they look at a page once. A tile is 16 bytes, beside 8 MB of keys and values
in an 8 B Llama."""


class FixedShape(NamedTuple):
    """Shape of a step, on which its buffers and launches depend."""

    num_rows: int
    """Rows of every rank that has any, padded to a bucket."""
    homes: tuple[int, ...]
    """Ranks that have rows, ascending."""
    participants: tuple[tuple[int, ...], ...]
    """Ranks between which queries and partials move, per KV group; empty where every key is on its query's rank."""


def fixed_shape(plan: Plan) -> FixedShape | None:
    """Shape of a decode step, or None for a step that is not fixed. See Note [Fixed shapes]."""
    if plan.phase is not Phase.DECODE or plan.scores or plan.last_layer is not None or not any(plan.num_tokens):
        return None
    if plan.has_drafts or any(run.num_tokens != 1 for run in plan.query_runs):
        return None
    homes = tuple([rank for rank, count in zip(plan.ranks, plan.num_tokens, strict=True) if count])
    participants: list[tuple[int, ...]] = []
    for step in plan.groups:
        if step.strategy is Strategy.LOCAL:
            participants.append(())
        elif step.strategy is Strategy.PASS_Q or (step.strategy is Strategy.TREE and len(step.nodes) == 1):
            participants.append(step.participants)
        else:
            return None
    bucket = next((bucket for bucket in BUCKETS if bucket >= max(plan.num_tokens)), None)
    return None if bucket is None else FixedShape(bucket, homes, tuple(participants))


def has_adapters(plan: Plan) -> bool:
    """Whether a row of a step is computed with an adapter, whose products a graph of the model alone has not. A rank is
    not told of others' packed requests, so that the driver alone may ask."""
    return any(run.adapter_id is not None for run in plan.query_runs)


def has_fixed_steps(config: EngineConfig, model: ModelSpec) -> bool:
    """Whether decode steps have fixed shapes: our kernels run them, and all rows are launched alike.

    Rows that differ in frequencies of RoPE are not, nor are those whose states go from rank to rank.
    """
    kernels = (*OWN_DECODE, "auto") if config.device == "cuda" else OWN_DECODE
    are_alike = model.rope_lengths is None and not model.state_groups
    return config.cuda_graphs == "auto" and config.attention_backend in kernels and are_alike


def is_captured(config: EngineConfig) -> bool:
    """Whether steps of fixed shape are captured: not where ranks wait for each other in Python, as threads do, nor yet
    where the processes of a rank add up their parts."""
    are_threads = config.executor == "threads" and config.context_parallel_size > 1
    return config.device == "cuda" and not are_threads and config.tensor_parallel_size == 1
