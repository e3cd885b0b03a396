"""Packed matrices multiply to the last bit as the matrices that they stand for."""

import pytest
import torch

from longspan.models.packed_linear import PackedLinear, rounded
from longspan.native import kernels, packed

pytestmark = pytest.mark.usefixtures("binary")
needs_kernel = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")

SHAPES = [(1, 32), (48, 64), (50, 96), (33, 224), (300, 896)]


def random_matrix(num_out, width, bits, group, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if bits == 8 else (0, 16)
    numbers = torch.randint(low, high, (num_out, width), generator=generator)
    scale = torch.rand(num_out, width // group, generator=generator) + 0.01
    zero = None if bits == 8 else torch.randint(0, 17, scale.shape, generator=generator)
    dense = numbers.view(num_out, -1, group).float() - (0 if zero is None else zero[..., None].float())
    return packed.pack(numbers, scale, zero), (dense * scale[..., None]).view(num_out, width)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_out", "width"), SHAPES)
def test_unpacking_gives_the_numbers_back(num_out, width, bits):
    for group in {32, width}:
        matrix, dense = random_matrix(num_out, width, bits, group)
        assert matrix.bits == bits
        assert matrix.shape == (num_out, width)
        assert matrix.group_size == group
        assert torch.equal(packed.unpack(matrix), dense)


@pytest.mark.parametrize("bits", [4, 8])
def test_without_kernels_everything_works(bits, monkeypatch):
    monkeypatch.setattr(packed, "library", lambda: None)
    matrix, dense = random_matrix(50, 96, bits, 32)
    x = torch.randn(3, 96)
    assert torch.equal(packed.unpack(matrix), dense)
    assert torch.allclose(PackedLinear(matrix, None)(x), x @ dense.T, rtol=1e-4, atol=1e-2)


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_out", "width"), SHAPES)
def test_few_rows_meet_exactly_the_unpacked_weights(num_out, width, bits):
    for group in {32, width}:
        matrix, dense = random_matrix(num_out, width, bits, group)
        for rows in range(1, kernels.MAX_ROWS + 1):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
            assert torch.equal(packed.linear(x, matrix), kernels.linear(x, dense))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 130])
def test_a_layer_computes_any_number_of_rows(rows, bits, monkeypatch):
    monkeypatch.setattr("longspan.models.packed_linear.UNPACKED_BYTES", 4 * 96 * 7)  # 7 outputs at a time
    matrix, dense = random_matrix(50, 96, bits, 32)
    bias = torch.randn(50)
    layer = PackedLinear(matrix, bias)
    x = torch.randn(1, rows, 96)
    wanted = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    found = layer(x)
    assert found.shape == (1, rows, 50)
    assert bool(((found - wanted).abs() <= 1e-6 * (x.abs() @ dense.abs().T + bias.abs())).all())
    assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_rounding_to_8_bits_keeps_the_largest_weight_of_an_output_and_errs_by_half_a_step():
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    matrix = rounded(weight, 8)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert matrix.zero is None
    assert float(((packed.unpack(matrix) - weight).abs() - step / 2).max()) < 1e-6
    assert torch.equal(packed.unpack(matrix)[3], weight[3])


def test_rounding_to_4_bits_keeps_zero_and_errs_by_a_step_at_most():
    weight = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    weight[2, 5], weight[3], weight[4] = 0, 0, weight[4].abs() + 1
    matrix = rounded(weight, 4)
    found = packed.unpack(matrix)
    assert matrix.group_size == 64
    assert found[2, 5] == 0
    assert torch.equal(found[3], weight[3])
    grouped = weight.view(20, -1, 64)
    step = (grouped.amax(2).clamp(min=0) - grouped.amin(2).clamp(max=0)) / 15
    assert bool(((found - weight).abs().view(20, -1, 64) <= step[..., None] * 1.001).all())
    assert rounded(weight[:, :96], 4).group_size == 32


def test_rejects_groups_that_the_kernels_do_not_take():
    with pytest.raises(ValueError, match="48 weights in 1 groups"):
        packed.pack(torch.zeros(4, 48, dtype=torch.int32), torch.ones(4, 1), None)


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
def test_more_rows_take_turns(bits):
    matrix, dense = random_matrix(50, 96, bits, 32)
    x = torch.randn(packed.MAX_ROWS, 96, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([kernels.linear(part, dense) for part in x.split(kernels.MAX_ROWS)])
    assert torch.equal(packed.linear(x, matrix), wanted)
