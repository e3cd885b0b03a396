"""Stored rows: rounded elements with the scale behind them, the same wherever a row goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.kv.layout import KVComponent, KVSpec
from longspan.kv.stored import exact_rows, holds, round_rows, row_width

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def component(dtype, width=24, heads=2):
    (found, _) = KVSpec.uniform(heads, width, width, "float32").stored_as(dtype).layout.components
    return found


def rows(*shape, seed=0, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4)]
)
@given(size=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rows_come_back_within_the_rounding_of_their_dtype(dtype, error, size, seed):
    exact = rows(2, 5, 24, seed=seed, size=size)
    stored = round_rows(exact, component(dtype))
    assert stored.shape == (2, 5, component(dtype).stored_width)
    assert (stored.dtype, row_width(stored)) == (holds(component(dtype)), 24)
    found = exact_rows(stored, 24, torch.float32)
    largest = exact.abs().amax(-1, keepdim=True)
    of = exact.abs() if dtype == "bfloat16" else largest  # scaled rows err by a share of their largest element
    assert bool(((found - exact).abs() <= error * of * 1.001).all())


def test_int8_is_the_nearest_of_255_numbers():
    exact = rows(1, 7, 16)
    stored = round_rows(exact, component("int8", 16, 1))
    scale = exact.abs().amax(-1) / 127
    assert torch.equal(stored[..., 16:].contiguous().view(torch.float32)[..., 0], scale)
    assert torch.equal(stored[..., :16].float(), (exact / scale[..., None]).round())
    assert int(stored[..., :16].abs().max()) == 127


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_row_of_zeros_stays_zero(dtype):
    stored = round_rows(torch.zeros(1, 2, 16), component(dtype, 16, 1))
    assert torch.equal(exact_rows(stored, 16, torch.float32), torch.zeros(1, 2, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_a_row_does_not_depend_on_its_neighbours(dtype):
    exact = rows(2, 6, 24)
    together = round_rows(exact, component(dtype))
    assert torch.equal(together[:, 3:4], round_rows(exact[:, 3:4], component(dtype)))


def test_bytes_of_a_token_count_scales():
    spec = KVSpec.uniform(8, 128, 128, "bfloat16")
    assert spec.layout.token_bytes == 2 * 8 * 128 * 2
    small = spec.stored_as("int8").layout
    assert small.token_bytes == 2 * 8 * (128 + 4)
    assert spec.layout.token_bytes / small.token_bytes > 1.9
    assert small.token_elements == spec.layout.token_elements
    assert small.stored_elements == small.token_bytes
    assert KVComponent("k", 1, 8, "bfloat16").stored_width == 8
