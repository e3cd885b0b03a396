"""Proves that the pools of all KV groups fit a rank's memory, use it, and all fit the longest request."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from longspan.errors import ConfigError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.sharding import capacity
from longspan.sharding.capacity import pool_pages, snapshot_len, window_pages
from longspan.types import AttentionParams, ModelSpec


def make_model(*groups: tuple[int, int, int | None]) -> ModelSpec:
    """KV groups as (layers, KV heads, window), 16 elements a head, float32."""
    kv_groups, num_layers = [], 0
    for layers, heads, window in groups:
        indices = tuple(range(num_layers, num_layers + layers))
        kv_groups.append(KVGroup(indices, KVSpec.uniform(heads, 16, 16, "float32", window), 2 * heads))
        num_layers += layers
    params = tuple(AttentionParams(0.25, window=group.spec.window) for group in kv_groups for _ in group.layers)
    return ModelSpec("test", num_layers, 100, None, (), tuple(kv_groups), params)


def pool_bytes(model: ModelSpec, num_pages: tuple[int, ...], page_size: int) -> int:
    return sum(n * page_size * group.token_bytes for n, group in zip(num_pages, model.kv_groups, strict=True))


windows = st.one_of(st.none(), st.integers(1, 200))
models = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), windows), min_size=1, max_size=3).map(
    lambda groups: make_model(*groups)
)


@given(models, st.integers(1, 10**7), st.sampled_from([1, 4, 16, 64]), st.integers(1, 300))
def test_pools_fit_the_memory_and_every_group_fits_the_longest_request(model, memory, page_size, max_tokens):
    try:
        num_pages = pool_pages(model, memory, page_size, max_tokens)
    except ConfigError:
        assert memory < sum(page_size * group.token_bytes for group in model.kv_groups)
        return
    assert pool_bytes(model, num_pages, page_size) <= memory
    assert min(num_pages) >= 1
    windowed = [group.spec.window is not None for group in model.kv_groups]
    longest = max(num_pages)
    for group, pages in zip(model.kv_groups, num_pages, strict=True):
        window = group.spec.window
        if window is None or all(windowed):
            assert pages == longest
        else:
            assert pages >= min(longest, window_pages(window, page_size, max_tokens))


@given(models, st.integers(1, 10**7), st.sampled_from([1, 16]), st.integers(1, 300))
def test_no_memory_for_another_page_of_every_group_is_left_over(model, memory, page_size, max_tokens):
    one_of_each = sum(page_size * group.token_bytes for group in model.kv_groups)
    if memory < one_of_each:
        return
    num_pages = pool_pages(model, memory, page_size, max_tokens)
    assert memory - pool_bytes(model, num_pages, page_size) < one_of_each


def test_a_model_without_windows_gets_what_a_division_says():
    model = make_model((3, 2, None))
    page_bytes = 16 * 3 * 2 * (16 + 16) * 4
    assert pool_pages(model, 10 * page_bytes, 16, 512) == (10,)
    assert pool_pages(model, 11 * page_bytes - 1, 16, 512) == (10,)


def test_a_window_group_gets_a_quarter_but_never_less_than_one_long_request_needs():
    model = make_model((1, 1, None), (1, 1, 32))
    (full, windowed) = pool_pages(model, 10_000 * 16 * 128, 16, 64)
    assert windowed == full // 4
    (full, windowed) = pool_pages(model, 20 * 16 * 128, 16, 64)
    assert windowed == window_pages(32, 16, 64) == 8
    assert full == 12


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_window_pages_is_enough_for_any_alignment_of_window_and_step(page_size):
    """Brute force over where window and step begin, freeing after each step only."""
    for window in (1, 3, 16, 17):
        for step in (1, 5, 16):
            most = 0
            for computed in range(64):
                oldest_page = max(0, computed - window + 1) // page_size
                end_page = -(-(computed + step) // page_size)
                most = max(most, end_page - oldest_page)
            assert most <= window_pages(window, page_size, step)


def test_rejects_too_little_memory_with_the_numbers_and_accepts_the_number_it_names():
    model = make_model((2, 1, None), (1, 2, 8))
    with pytest.raises(ConfigError, match="kv_cache_memory: got 1000 bytes per rank, legal is at least") as error:
        pool_pages(model, 1000, 16, 64)
    (least,) = map(int, re.findall(r"at least (\d+)", str(error.value)))
    assert "one page of 16 tokens" in str(error.value)
    assert min(pool_pages(model, least, 16, 64)) == 1
    with pytest.raises(ConfigError, match=f"at least {least}"):
        pool_pages(model, least - 1, 16, 64)


def hybrid(state_elements: int) -> ModelSpec:
    states = StateGroup((1, 2), (StateComponent("recurrent", 0, (state_elements,), "float32"),))
    return structs.replace(make_model((3, 1, None)), state_groups=(states,))


@pytest.mark.parametrize("memory", [10_000, 123_456, 1_000_000])
def test_states_take_at_most_a_quarter_and_pages_the_rest(memory):
    spec = hybrid(100)
    pages, slots = pool_pages(spec, memory, 16, 64)
    page_bytes = spec.kv_groups[0].page_bytes(16)
    assert slots == max(1, min(memory // 4 // 800, memory // (800 + page_bytes)))
    assert pages == (memory - slots * 800) // page_bytes
    assert capacity.pool_bytes(spec, pages, 16, 64) <= memory + 800 + 2 * page_bytes
    assert pool_pages(spec, capacity.pool_bytes(spec, pages, 16, 64), 16, 64)[0] >= pages


def test_a_state_and_a_page_must_fit():
    spec = hybrid(100)
    least = 800 + spec.kv_groups[0].page_bytes(16)
    assert pool_pages(spec, least, 16, 64) == (1, 1)
    with pytest.raises(
        ConfigError, match=rf"got {least - 1} bytes .* at least {least} \(one state of 800 bytes and one"
    ):
        pool_pages(spec, least - 1, 16, 64)


def test_kept_states_take_no_more_than_the_tokens_between_them():
    assert snapshot_len(hybrid(100), 16) == 512
    spec = hybrid(1_000_000)
    assert snapshot_len(spec, 16) % 16 == 0
    assert snapshot_len(spec, 16) * spec.kv_groups[0].token_bytes >= spec.state_bytes
