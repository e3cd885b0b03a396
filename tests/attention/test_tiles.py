"""Tile tables: whatever the kernel makes of them is what the segments say."""

import numpy as np
import pytest
from attention_cases import BAND, CAUSAL, FULL, NONE, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention import tiles
from longspan.attention.base import RowSegment
from longspan.attention.tiles import TileTables, tile_tables


def seen_pairs(tables: TileTables, keys_per_tile: int, window: int | None) -> dict[tuple[int, int], int]:
    """(query row, key row) to how often a kernel that follows the tables looks at the pair."""
    pairs: dict[tuple[int, int], int] = {}
    for row, count, position, a, b, c, d in tables.query_tiles.tolist():
        assert a <= b <= c <= d or a == d
        assert count <= tables.queries_per_tile
        assert d - a <= tables.most_key_tiles
        for index in range(a, d):
            key_row, num_keys, key_position, visibility = tables.key_tiles[index].tolist()
            assert 0 < num_keys <= keys_per_tile
            for i in range(count):
                for j in range(num_keys):
                    distance = position + i - key_position - j
                    is_seen = visibility == tiles.ALL or (
                        distance >= 0 and (visibility == tiles.CAUSAL or distance < window)
                    )
                    if b <= index < c:
                        assert num_keys == keys_per_tile, "a tile without a mask is whole"
                        assert is_seen, "and all of it is seen"
                    if is_seen:
                        pairs[row + i, key_row + j] = pairs.get((row + i, key_row + j), 0) + 1
    return pairs


def meant_pairs(segments, window) -> dict[tuple[int, int], int]:
    pairs: dict[tuple[int, int], int] = {}
    for s in segments:
        for i in range(s.num_queries):
            for j in range(s.num_keys):
                distance = None if s.key_position is None else s.query_position + i - s.key_position - j
                if s.visibility is FULL or (
                    s.visibility is not NONE and distance >= 0 and (s.visibility is CAUSAL or distance < window)
                ):
                    pairs[s.query_row + i, s.key_row + j] = pairs.get((s.query_row + i, s.key_row + j), 0) + 1
    return pairs


@pytest.mark.cover
@settings(max_examples=400, deadline=None)
@given(case=cases(), queries_per_tile=st.integers(1, 9), keys_per_tile=st.sampled_from([1, 2, 4, 8]))
def test_tables_show_exactly_the_pairs_of_the_segments(case, queries_per_tile, keys_per_tile):
    num_rows, _, segments, params = case
    tables = tile_tables(
        segments, num_rows, queries_per_tile=queries_per_tile, keys_per_tile=keys_per_tile, window=params.window
    )
    assert seen_pairs(tables, keys_per_tile, params.window) == meant_pairs(segments, params.window)
    rows = [row + i for row, count, *_ in tables.query_tiles.tolist() for i in range(count)]
    assert sorted(rows) == list(range(num_rows)), "every row is written once"
    assert tables.query_tiles.dtype == tables.key_tiles.dtype == np.int32


def test_the_example_of_the_note_is_true():
    segments = [RowSegment(0, 64, 64, 0, 70, None, FULL), RowSegment(0, 64, 64, 70, 58, 70, CAUSAL)]
    tables = tile_tables(segments, 64, queries_per_tile=32, keys_per_tile=64, window=None)
    assert tables.key_tiles.tolist() == [[64, 6, 0, tiles.ALL], [0, 64, 0, tiles.ALL], [70, 58, 70, tiles.CAUSAL]]
    bounds = {row: (a, b, c, d) for row, _, _, a, b, c, d in tables.query_tiles.tolist()}
    assert bounds == {0: (0, 1, 2, 3), 32: (0, 1, 2, 3)}


def test_whole_causal_tiles_behind_the_queries_need_no_mask():
    tables = tile_tables(
        [RowSegment(0, 8, 100, 0, 108, 0, CAUSAL)], 8, queries_per_tile=8, keys_per_tile=16, window=None
    )
    ((_, _, _, a, b, c, d),) = tables.query_tiles.tolist()
    assert (a, b, c, d) == (0, 0, 6, 7)  # 16 * 6 = 96 keys are older than position 100


def test_keys_that_have_left_the_window_are_not_looked_at():
    tables = tile_tables([RowSegment(0, 8, 1000, 0, 1008, 0, BAND)], 8, queries_per_tile=8, keys_per_tile=16, window=64)
    ((_, _, _, a, b, c, d),) = tables.query_tiles.tolist()
    assert d - a <= 6
    assert c - b >= 3


@pytest.mark.parametrize("num_keys", [0, 1, 15, 16, 17])
def test_a_run_is_cut_into_whole_tiles_and_a_rest(num_keys):
    tables = tile_tables(
        [RowSegment(0, 1, 0, 3, num_keys, None, FULL)], 1, queries_per_tile=8, keys_per_tile=16, window=None
    )
    assert sorted(count for _, count, _, _ in tables.key_tiles.tolist()) == sorted(
        [16] * (num_keys // 16) + ([num_keys % 16] if num_keys % 16 else [])
    )
