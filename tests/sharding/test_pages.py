"""Proves that `PageTable` tells the same story as a dictionary from page index to (rank, slot).

Random histories of growth and freeing, with holes; and the same table rebuilt from its deltas, as workers do.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.sharding.pages import KeyRun, PageRun, PageTable

Model = dict[int, tuple[int, int]]
"""Page index to (rank, slot): what a page table means."""


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, tuple[int, ...]]]]:
    """Page size and operations: append (rank, slot, pages) or free before a page."""
    page_size = draw(st.sampled_from([1, 2, 3, 16]))
    operations: list[tuple[str, tuple[int, ...]]] = []
    num_pages, last = 0, (0, 0)
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["append", "continue", "free"]))
        if kind == "free":
            operations.append(("free", (draw(st.integers(0, num_pages + 2)),)))
            continue
        rank, slot = last if kind == "continue" else (draw(st.integers(0, 2)), draw(st.integers(0, 40)))
        count = draw(st.integers(1, 4))
        operations.append(("append", (rank, slot, count)))
        num_pages, last = num_pages + count, (rank, slot + count)
    return page_size, operations


def build(page_size: int, operations: list[tuple[str, tuple[int, ...]]]) -> tuple[PageTable, Model, list[PageRun]]:
    """Table, model, and all pages that were dropped."""
    table, model, dropped = PageTable(page_size), {}, []
    for kind, arguments in operations:
        if kind == "append":
            rank, slot, count = arguments
            added = table.append(rank, slot, count)
            assert added == PageRun(table.num_pages - count, rank, slot, count)
            model |= {added.page_idx + i: (rank, slot + i) for i in range(count)}
        else:
            (page_idx,) = arguments
            freed = table.free_before(page_idx)
            dropped += freed
            assert pages_of(freed) == {i: page for i, page in model.items() if i < page_idx}
            model = {i: page for i, page in model.items() if i >= page_idx}
    return table, model, dropped


def pages_of(runs: list[PageRun]) -> Model:
    pages: Model = {}
    for run in runs:
        for i in range(run.num_pages):
            assert run.page_idx + i not in pages, "a page twice"
            pages[run.page_idx + i] = (run.rank, run.slot + i)
    return pages


def tokens_of(model: Model, page_size: int, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Position to (rank, row) of the positions that have a page."""
    return {
        position: (model[position // page_size][0], model[position // page_size][1] * page_size + position % page_size)
        for position in range(start, end)
        if position // page_size in model
    }


ranges = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair)))


@given(histories())
def test_a_table_holds_the_pages_that_were_appended_and_not_freed(history):
    page_size, operations = history
    table, model, dropped = build(page_size, operations)
    assert pages_of(table.runs) == model
    assert table.num_pages == sum(arguments[2] for kind, arguments in operations if kind == "append")
    appended = sum(run.num_pages for run in dropped) + len(model)
    assert appended == table.num_pages, "a page was lost"


@given(histories())
def test_pages_that_continue_each_other_are_one_run(history):
    table, _, _ = build(*history)
    for a, b in zip(table.runs, table.runs[1:], strict=False):
        assert (a.page_idx + a.num_pages, a.rank, a.slot + a.num_pages) != (b.page_idx, b.rank, b.slot)
        assert a.page_idx + a.num_pages <= b.page_idx


@given(histories(), ranges, st.integers(0, 2))
def test_key_runs_and_counts_name_every_stored_token_once(history, positions, rank):
    page_size, operations = history
    table, model, _ = build(page_size, operations)
    start, end = positions
    expected = tokens_of(model, page_size, start, end)
    found: dict[int, int] = {}
    runs = table.key_runs(rank, start, end)
    for run in runs:
        assert run.num_tokens > 0
        for i in range(run.num_tokens):
            assert run.position + i not in found
            found[run.position + i] = run.row + i
    assert found == {position: row for position, (owner, row) in expected.items() if owner == rank}
    assert [run.position for run in runs] == sorted(run.position for run in runs)
    owners = [owner for owner, _ in expected.values()]
    assert table.count_on(rank, start, end) == owners.count(rank)
    assert table.ranks_with(start, end) == sorted(set(owners))


@given(histories(), st.integers(0, 60))
def test_a_page_is_found_by_its_index_and_is_none_in_a_hole_or_behind_the_end(history, page_idx):
    table, model, _ = build(*history)
    assert table.page(page_idx) == model.get(page_idx)


@given(histories(), ranges)
def test_owners_cut_a_range_where_the_rank_changes_or_say_which_position_has_no_page(history, positions):
    page_size, operations = history
    table, model, _ = build(page_size, operations)
    start, end = positions
    expected = tokens_of(model, page_size, start, end)
    missing = [position for position in range(start, end) if position not in expected]
    if missing:
        with pytest.raises(KeyError, match=f"position {missing[0]} has no page"):
            table.owners(start, end)
        return
    pieces = table.owners(start, end)
    assert {p: rank for rank, first, last in pieces for p in range(first, last)} == {
        position: rank for position, (rank, _) in expected.items()
    }
    assert all(first < last for _, first, last in pieces)
    assert all(a[2] == b[1] and a[0] != b[0] for a, b in itertools.pairwise(pieces))


@given(histories())
def test_a_table_rebuilt_from_its_runs_equals_the_original(history):
    page_size, operations = history
    table, _, _ = build(page_size, operations)
    mirror = PageTable(page_size)
    mirror.apply(list(table.runs))
    assert mirror.runs == table.runs


@given(histories())
def test_a_mirror_fed_with_deltas_equals_the_original_after_every_step(history):
    """Frees travel late, with the next added pages, as between driver and workers."""
    page_size, operations = history
    table, mirror = PageTable(page_size), PageTable(page_size)
    for kind, arguments in operations:
        if kind == "free":
            table.free_before(arguments[0])
            continue
        added = [table.append(*arguments)]
        mirror.free_before(table.runs[0].page_idx)
        mirror.apply(added)
        assert mirror.runs == table.runs
        assert mirror.num_pages == table.num_pages


def test_the_drawing_of_the_module_holds():
    table = PageTable(4)
    for rank, slot, count in [(0, 0, 2), (1, 0, 2), (0, 2, 1)]:
        table.append(rank, slot, count)
    assert table.key_runs(0, 0, 20) == [KeyRun(0, 0, 8), KeyRun(16, 8, 4)]
    assert table.key_runs(1, 9, 13) == [KeyRun(9, 1, 4)]
    assert table.owners(3, 18) == [(0, 3, 8), (1, 8, 16), (0, 16, 18)]


@pytest.mark.parametrize("page_size", [1, 4])
def test_an_empty_table_has_nothing_anywhere(page_size):
    table = PageTable(page_size)
    assert table.key_runs(0, 0, 9) == []
    assert table.ranks_with(0, 9) == []
    assert table.owners(3, 3) == []
    assert table.free_before(5) == []
    with pytest.raises(KeyError, match="position 0 has no page"):
        table.owners(0, 1)


def test_a_table_refuses_pages_that_it_has_already():
    table = PageTable(4)
    table.append(0, 0, 3)
    with pytest.raises(AssertionError, match="in the table already"):
        table.apply([PageRun(2, 1, 0, 1)])


def test_freeing_in_the_middle_of_a_run_keeps_its_end_in_place():
    table = PageTable(4)
    table.append(1, 10, 5)
    assert table.free_before(3) == [PageRun(0, 1, 10, 3)]
    assert table.runs == [PageRun(3, 1, 13, 2)]
    assert table.key_runs(1, 0, 99) == [KeyRun(12, 52, 8)]


@pytest.mark.cover
@given(
    page_size=st.sampled_from([1, 4]),
    runs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=12),
    consecutive=st.lists(st.booleans(), min_size=12, max_size=12),
    freed=st.integers(0, 10),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
)
def test_row_runs_and_counts_agree_with_a_walk_over_all_tokens(page_size, runs, consecutive, freed, start, length):
    """Some runs continue the last one of their rank in slots, though other ranks have pages in between."""
    table = PageTable(page_size)
    next_slot: dict[int, int] = {}
    slot_of: list[tuple[int, int]] = []
    for (rank, slot, num_pages), follows in zip(runs, consecutive, strict=False):
        slot = next_slot.get(rank, slot) if follows else slot
        table.append(rank, slot, num_pages)
        next_slot[rank] = slot + num_pages
        slot_of += [(rank, slot + i) for i in range(num_pages)]
    table.free_before(freed)
    end = start + length
    for rank in range(3):
        rows = [
            slot * page_size + position % page_size
            for position in range(start, min(end, len(slot_of) * page_size))
            for owner, slot in [slot_of[position // page_size]]
            if owner == rank and position // page_size >= freed
        ]
        found = table.row_runs(rank, start, end)
        assert [row + i for row, count in found for i in range(count)] == rows
        assert all(a + count != b for (a, count), (b, _) in itertools.pairwise(found)), "runs could be longer"
        assert table.count_on(rank, start, end) == len(rows)


@given(histories(), st.integers(0, 60), st.integers(0, 60))
def test_tokens_per_rank_are_the_models(history, start, end):
    page_size, operations = history
    table, model, _ = build(page_size, operations)
    counts: dict[int, int] = {}
    for position in range(start, end):
        if position // page_size in model:
            rank, _ = model[position // page_size]
            counts[rank] = counts.get(rank, 0) + 1
    assert table.tokens_per_rank(start, end) == counts
    assert table.ranks_with(start, end) == sorted(counts)
    assert table.ranks == sorted({rank for rank, _ in model.values()})
    for rank in range(3):
        last = max((page_idx for page_idx, (owner, _) in model.items() if owner == rank), default=None)
        assert table.slot_after(rank) == (None if last is None else model[last][1] + 1)
        assert table.is_on(rank) == (table.ranks == [rank])
