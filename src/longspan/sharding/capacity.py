"""Number of pages that each KV group's pool gets from a rank's memory, and of slots for states.

Holds arithmetic. Must not know tensors or free memory.
Read next: `longspan.kv.allocator`.
"""

from collections.abc import Sequence

from longspan.errors import ConfigError
from longspan.types import ModelSpec

STATE_SHARE = 4
"""States get at most one part in so many of a rank's KV memory: a state is as large as hundreds or thousands of
tokens' KV, and a request that runs has one, but the more states are kept of prompts, the more is found again."""

MIN_SNAPSHOT_LEN = 512
"""Fewest tokens between two kept states of a prompt by default: each takes a copy of the state."""


def window_pages(reach: int, page_size: int, max_num_batched_tokens: int) -> int:
    """Most pages that one request holds at once on one rank in a group with a sliding window, or with chunks.

    Pages are freed after the step that moved the window past them, so a request holds the `reach` tokens of a window or
    a chunk, one step's new tokens, and a page cut at either end.
    """
    return -(-(reach + max_num_batched_tokens) // page_size) + 2


def pages_by_group(model: ModelSpec, num_pages: int, page_size: int, max_num_batched_tokens: int) -> tuple[int, ...]:
    """Pages of every KV group's pool where groups with full attention get `num_pages`.

    A group with a window or chunks needs far fewer for long requests and as many for short ones: it gets a quarter of
    `num_pages`, but at least what one long request needs.
    """
    has_full = any(group.spec.reach is None for group in model.kv_groups)

    def pages_of(reach: int | None) -> int:
        if reach is None or not has_full:
            return num_pages
        return min(num_pages, max(num_pages // 4, window_pages(reach, page_size, max_num_batched_tokens)))

    return tuple(pages_of(group.spec.reach) for group in model.kv_groups)


def pool_bytes(model: ModelSpec, num_pages: int, page_size: int, max_num_batched_tokens: int) -> int:
    """Bytes of one rank's pools, slots of states included. Arguments: `pages_by_group`."""
    pages_bytes = _pages_bytes(model, num_pages, page_size, max_num_batched_tokens)
    if not model.state_groups:
        return pages_bytes
    one_page = _pages_bytes(model, 1, page_size, max_num_batched_tokens)
    beside_share = -(-pages_bytes * STATE_SHARE // (STATE_SHARE - 1))
    beside_one_each = -(-pages_bytes * (one_page + model.state_bytes) // one_page)
    return max(pages_bytes + model.state_bytes, min(beside_share, beside_one_each))


def pages_of_ranks(
    model: ModelSpec, memories: Sequence[int], page_size: int, max_num_batched_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Most pages that the KV memory of every rank holds.

    Args:
        model: the model, for its KV groups.
        memories: KV memory of every rank in bytes.
        page_size: tokens per page.
        max_num_batched_tokens: most tokens that one rank computes in one step.

    Returns:
        Pages, [rank][KV group].

    Raises:
        ConfigError: not even one page fits a rank.
    """
    known: dict[int, tuple[int, ...]] = {}
    for rank, memory in enumerate(memories):
        try:
            known[memory] = known.get(memory) or pool_pages(model, memory, page_size, max_num_batched_tokens)
        except ConfigError as error:
            if len(set(memories)) == 1:
                raise
            raise ConfigError(f"rank_weights: they leave rank {rank} without a page: {error}") from error
    return tuple([known[memory] for memory in memories])


def pool_pages(model: ModelSpec, kv_cache_memory: int, page_size: int, max_num_batched_tokens: int) -> tuple[int, ...]:
    """Most pages that a rank's KV memory holds, and slots for the states of recurrent layers beside them.

    Args:
        model: the model, for its KV groups and states.
        kv_cache_memory: KV memory of one rank in bytes.
        page_size: tokens per page.
        max_num_batched_tokens: most tokens that one rank computes in one step.

    Returns:
        Pages per KV group; behind them the slots, if the model has states.

    Raises:
        ConfigError: not even one page fits, or one state and one page.
    """
    one_page = _pages_bytes(model, 1, page_size, max_num_batched_tokens)
    if kv_cache_memory < model.state_bytes + one_page:
        needed = f"one page of {page_size} tokens"
        if model.state_groups:
            needed = f"one state of {model.state_bytes} bytes and {needed}"
        raise ConfigError(
            f"kv_cache_memory: got {kv_cache_memory} bytes per rank, legal is at least {model.state_bytes + one_page} "
            f"({needed})"
        )
    slots: tuple[int, ...] = ()
    if model.state_groups:
        share = kv_cache_memory // STATE_SHARE // model.state_bytes  # more than pages would be of no use
        slots = (max(1, min(share, kv_cache_memory // (model.state_bytes + one_page))),)
        kv_cache_memory -= slots[0] * model.state_bytes
    low, high = 0, kv_cache_memory // min(group.page_bytes(page_size) for group in model.kv_groups) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = _pages_bytes(model, middle, page_size, max_num_batched_tokens) <= kv_cache_memory
        low, high = (middle, high) if fits else (low, middle)
    return (*pages_by_group(model, low, page_size, max_num_batched_tokens), *slots)


def snapshot_len(model: ModelSpec, page_size: int) -> int:
    """Tokens from one kept state of a prompt to the next, unless the user says otherwise: a multiple of pages.

    So many that their KV is no less than a state, so that kept states at most double what a cached prefix takes.
    """
    equal = -(-model.state_bytes // sum(group.token_bytes for group in model.kv_groups))
    return -(-max(equal, MIN_SNAPSHOT_LEN) // page_size) * page_size


def _pages_bytes(model: ModelSpec, num_pages: int, page_size: int, max_num_batched_tokens: int) -> int:
    """Bytes of one rank's pages. Arguments: `pages_by_group`."""
    pages = pages_by_group(model, num_pages, page_size, max_num_batched_tokens)
    return sum(count * group.page_bytes(page_size) for count, group in zip(pages, model.kv_groups, strict=True))
