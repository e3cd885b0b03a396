"""Proves who is told what of a page table: all of it to a rank that missed something, else what is new."""

from longspan.plan.types import TableDelta
from longspan.scheduler.delivery import Delivery
from longspan.sharding.pages import PageRun, PageTable


def grow(table: PageTable, rank: int) -> list[list[PageRun]]:
    return [[table.append(rank, 7 + table.num_pages, 1)]]


def test_ranks_that_know_the_table_are_told_what_is_new_and_others_all_of_it():
    delivery, table = Delivery(), PageTable(4)
    first = delivery.tell(3, [table], grow(table, 0), {0, 1})
    assert first == [TableDelta(3, 0, True, (PageRun(0, 0, 7, 1),), 0)]
    second = delivery.tell(3, [table], grow(table, 1), {0, 1})
    assert second == [TableDelta(3, 0, False, (PageRun(1, 1, 8, 1),), 0)]
    third = delivery.tell(3, [table], grow(table, 1), {0})
    assert third == [TableDelta(3, 0, False, (PageRun(2, 1, 9, 1),), 0)]
    assert delivery.informed_ranks == {0}, "rank 1 missed the third"
    (fourth,) = delivery.tell(3, [table], [[]], {0, 1})
    assert (fourth.replace, fourth.added) == (True, tuple(table.runs))
    assert delivery.tell(3, [table], [[]], {0, 1}) == []
    assert delivery.involved_ranks == {0, 1}


def test_pages_that_a_window_has_left_are_not_told():
    delivery, table = Delivery(), PageTable(4)
    grow(table, 0)
    grow(table, 0)
    table.free_before(1)
    (delta,) = delivery.tell(3, [table], [[]], {0})
    assert (delta.added, delta.freed_before) == ((PageRun(1, 0, 8, 1),), 1)


def test_who_gives_pages_back_is_told_anew_and_ranks_that_heard_of_it_are_remembered():
    delivery, table = Delivery(), PageTable(4)
    delivery.tell(3, [table], grow(table, 0), {0, 1})
    delivery.last_plan_id, delivery.moves_queries = 5, True
    delivery.forget_tables()
    assert (delivery.informed_ranks, delivery.involved_ranks, delivery.moves_queries) == (set(), {0, 1}, False)
    delivery.wait_from(9)
    delivery.lose_ranks()
    assert (delivery.involved_ranks, delivery.last_plan_id) == (set(), 9)
