"""Placement: the rank of each page of a request.

Holds pure functions of integers. Must not know slots, requests or time.
Read next: `longspan.sharding.geometry`; `longspan.scheduler.page_placer`, which places a request's pages.

Note [Snake order]
    Striped placement lays stripes on ranks 0, 1, .., N-1, N-1, .., 1, 0, 0, 1, .. so that early (cheap) and late
    (dear) stripes pair up. Causal attention work of stripe i grows as 2i + 1. With N = 2 and 4 equal stripes:

        stripe        0  1  2  3        work  rank 0: 1 + 7 = 8
        rank          0  1  1  0              rank 1: 3 + 5 = 8      (round-robin: 6 and 10)

    The excess is 0 whenever the number of stripes is a multiple of 2N; `stripe_lengths` cuts chunks that way.
"""

from collections.abc import Iterator, Sequence

from longspan.types import Placement


def snake_order(ranks: Sequence[int]) -> Iterator[int]:
    """Endless sequence of ranks: forwards, backwards, forwards, ..."""
    while True:
        yield from ranks
        yield from reversed(ranks)


def snake_rank(stripe_idx: int, home: int, num_ranks: int) -> int:
    """Rank of one stripe in the snake order that starts at rank `home`."""
    step = stripe_idx % (2 * num_ranks)
    return (home + (step if step < num_ranks else 2 * num_ranks - 1 - step)) % num_ranks


def chunk_len(max_tokens_per_rank: int, stripe_len: int, num_ranks: int) -> int:
    """Tokens of a full striped chunk: the most that keeps every rank at or under its budget.

    The chunk is a multiple of `2 * num_ranks` stripes where the budget admits one, else of `num_ranks` stripes. The
    budget holds a stripe at least.
    """
    per_rank = max_tokens_per_rank // stripe_len
    if per_rank > 1:
        per_rank -= per_rank % 2
    return per_rank * stripe_len * num_ranks


def stripe_lengths(num_pages: int, stripe_pages: int, chunk_pages: int, num_ranks: int, tail_pages: int) -> list[int]:
    """Cut `num_pages` pages of prompt, then `tail_pages` of generated tokens, into stripes.

    Full chunks take stripes of `stripe_pages`. A last, shorter chunk is cut into the fewest stripes of at most
    `stripe_pages` whose number is a multiple of `2 * num_ranks`. These are as equal as pages allow (some are empty when
    there are fewer pages than stripes), so that the chunk balances too and snake order starts anew behind it.

    Returns:
        Pages per stripe, in sequence order; they sum to `num_pages + tail_pages`.
    """
    lengths: list[int] = []
    left = num_pages
    while left >= chunk_pages:
        lengths += [stripe_pages] * (chunk_pages // stripe_pages)
        lengths += [chunk_pages % stripe_pages] * (chunk_pages % stripe_pages > 0)
        left -= chunk_pages
    if left:
        cycle = 2 * num_ranks
        num_stripes = cycle * -(-left // (cycle * stripe_pages))
        short, longer = divmod(left, num_stripes)
        lengths += [short + 1] * longer + [short] * (num_stripes - longer)
    lengths += [stripe_pages] * (tail_pages // stripe_pages)
    if tail_pages % stripe_pages:
        lengths.append(tail_pages % stripe_pages)
    return lengths


def place(placement: Placement, stripes: Sequence[int], room: Sequence[int], home: int) -> list[tuple[int, int]] | None:
    """Choose the rank of every page of a request, before its first token is computed.

    Args:
        placement: the policy.
        stripes: pages per stripe, in sequence order.
        room: free pages per rank.
        home: rank that packed and spill fill first, and where snake order starts.

    Returns:
        Runs `(rank, num_pages)` in sequence order, or None when the pages do not fit. A stripe whose rank has no room
        left goes on to the next rank in snake order that has room.
    """
    left = list(room)
    num_ranks = len(room)
    num_pages = sum(stripes)
    order = [(home + i) % num_ranks for i in range(num_ranks)]
    if num_pages > (left[home] if placement is Placement.PACKED else sum(left)):
        return None
    runs: list[tuple[int, int]] = []

    def put(rank: int, pages: int) -> int:
        """Place up to `pages` pages on a rank; return how many did not fit."""
        taken = min(pages, left[rank])
        if taken:
            left[rank] -= taken
            if runs and runs[-1][0] == rank:
                runs[-1] = (rank, runs[-1][1] + taken)
            else:
                runs.append((rank, taken))
        return pages - taken

    if placement is not Placement.STRIPED:
        for rank in order:
            num_pages = put(rank, num_pages)
        return runs
    snake = snake_order(order)
    for stripe in stripes:
        pages = put(next(snake), stripe)
        while pages:
            pages = put(next(snake), pages)
    return runs
