"""How many pages each KV group's pool gets from a rank's memory.

Holds arithmetic. Must not know tensors, and never measures free memory itself.
Read next: `longspan.kvcache.allocator`.
"""

from longspan.errors import ConfigError
from longspan.types import KVGroup, ModelSpec


def window_pages(window: int, page_size: int, max_num_batched_tokens: int) -> int:
    """Most pages that one request holds at once on one rank in a group with a sliding window.

    Pages are freed after the step that moved the window past them, so a request holds the window, one step's new
    tokens, and a page cut at either end.
    """
    return -(-(window + max_num_batched_tokens) // page_size) + 2


def pool_pages(model: ModelSpec, kv_cache_memory: int, page_size: int, max_num_batched_tokens: int) -> tuple[int, ...]:
    """Split a rank's KV memory over the model's KV groups.

    Groups with full attention get the same number of pages. A group with a window needs far fewer for long requests
    and as many for short ones: it gets a quarter of that number, but at least what one long request needs.

    Args:
        model: the model's KV groups.
        kv_cache_memory: bytes of one rank.
        page_size: tokens per page.
        max_num_batched_tokens: most tokens that one rank computes in one step.

    Returns:
        Pages per KV group.

    Raises:
        ConfigError: not even one page fits.
    """
    has_full = any(group.spec.window is None for group in model.kv_groups)

    def pages_of(group: KVGroup, num_pages: int) -> int:
        window = group.spec.window
        if window is None or not has_full:
            return num_pages
        return min(num_pages, max(num_pages // 4, window_pages(window, page_size, max_num_batched_tokens)))

    def num_bytes(num_pages: int) -> int:
        return sum(pages_of(group, num_pages) * page_size * group.token_bytes for group in model.kv_groups)

    low, high = 0, kv_cache_memory // (page_size * max(1, min(group.token_bytes for group in model.kv_groups))) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_bytes(middle) <= kv_cache_memory else (low, middle)
    if low == 0:
        raise ConfigError(
            f"kv_cache_memory: got {kv_cache_memory} bytes per rank, legal is at least {num_bytes(1)} (one page of "
            f"{page_size} tokens)"
        )
    return tuple(pages_of(group, low) for group in model.kv_groups)
