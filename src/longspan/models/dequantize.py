"""Dense weights from the tensors in which quantised repositories keep them.

Holds one function per layout, from named parts to a dense matrix. Must not know names in files, models or ranks.
Read next: `longspan.models.quantization`, which finds the parts of every weight.

All arithmetic is float32 unless the layout's own library rounds on the way; then it is rounded the same way here, so
that weights equal those of Transformers to the last bit.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.native.packed import BLOCK, PackedMatrix, pack

Parts = Mapping[str, Tensor]
"""Tensors of one weight, by their role."""

Options = Mapping[str, Any]
"""`quantization_config` of the repository."""

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; the last ones may be fewer. None: all share one, or each has its own."""

DEFAULT_GROUP = 128
"""Inputs that share a scale of GPTQ and AWQ where a repository does not say; Transformers takes the same."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen numbers of E2M1."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column that every half byte of an int32 holds in AWQ's `gemm` layout, from the lowest."""


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Take int32 apart into numbers of a few bits, from the lowest.

    Args:
        packed: [..., n] int32.
        bits: of a number; 32 is a multiple.

    Returns:
        [..., n * 32 / bits] int32, from 0.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    numbers: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2)


def spread(scale: Tensor, shape: tuple[int, int], block: Block = (None, None)) -> Tensor:
    """Repeat a grid of scales over a matrix.

    Args:
        scale: one scale, one per row [rows], or a grid [..., n, m].
        shape: rows and columns of the matrix.
        block: rows and columns that share a scale. A grid does not tell: two scales of 96 columns may be of 48 and 48,
            or of 64 and 32.

    Returns:
        [..., rows or 1, columns or 1] float32.

    Raises:
        ValueError: the grid does not fit the matrix.
    """
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):  # exponents of two
        scale = (scale.view(torch.uint8).float() - 127).exp2()
    grid = scale.float()
    if grid.ndim < 2:
        grid = grid.reshape(-1, 1)
    if not _fits(grid, shape, block):
        raise ValueError(f"scales {tuple(scale.shape)} in blocks of {block} do not fit a matrix {shape}")
    for dim, size in ((-2, shape[0]), (-1, shape[1])):
        length = block[dim]
        if length is not None and grid.shape[dim] > 1:
            grid = grid.repeat_interleave(length, dim).narrow(dim, 0, size)
    return grid


def _fits(grid: Tensor, shape: tuple[int, int], block: Block) -> bool:
    """Whether a grid of at least two dimensions has as many scales as a matrix has blocks."""
    return all(
        num in (1, size) if length is None else num == -(-size // length)
        for num, size, length in zip(grid.shape[-2:], shape, block, strict=True)
    )


def group_size(options: Options) -> int | None:
    """Inputs that share a scale of GPTQ or AWQ; None: all of an output."""
    size = int(options.get("group_size") or DEFAULT_GROUP)
    return size if size > 0 else None


def fp8(parts: Parts, options: Options) -> Tensor:
    """8-bit floats with a scale per block, which the last blocks may not fill."""
    weight, size = parts["weight"], options.get("weight_block_size")
    if weight.dtype not in _FP8:
        raise ValueError(f"weights of {weight.dtype}, legal are 8-bit floats")
    block: Block = (None, None) if size is None else (int(size[0]), int(size[1]))
    rows, columns = weight.shape[-2:]
    return weight.float() * spread(parts["scale"], (rows, columns), block)


def packed_bits(options: Options) -> set[int]:
    """Bits of the packed numbers of compressed-tensors, of which `compressed` takes one."""
    groups = (options.get("config_groups") or {}).values()
    return {
        int(group["weights"]["num_bits"])
        for group in groups
        if (group.get("format") or options.get("format")) == "pack-quantized"
    }


def blocks(options: Options) -> list[Block]:
    """Rows and columns that share a scale in every group of layers of compressed-tensors."""
    found: list[Block] = []
    for group in (options.get("config_groups") or {"": {}}).values():
        weights = group.get("weights") or {}
        size = int(weights.get("group_size") or -1)
        rows, columns = weights["block_structure"] if weights.get("strategy") == "block" else (None, size)
        found.append((None if rows is None else int(rows), int(columns) if int(columns) > 0 else None))
    return found


def _fitting(options: Options, scale: Tensor, shape: tuple[int, int]) -> set[Block]:
    """Blocks of compressed-tensors in which a matrix has as many scales as it has."""
    grid = scale if scale.ndim >= 2 else scale.reshape(-1, 1)
    rows, columns = grid.shape[-2:]
    return {
        (block[0] if rows > 1 else None, block[1] if columns > 1 else None)
        for block in blocks(options)
        if _fits(grid, shape, block)
    }


def compressed_numbers(parts: Parts, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return numbers [out, in], scales and zeros, [out, groups] or fewer, of compressed-tensors; packed ones signed."""
    scale, zeros = parts["scale"], parts.get("zero")
    if "packed" not in parts:
        return parts["weight"], scale, zeros
    (bits,) = packed_bits(options)
    numbers = unpack_bits(parts["packed"], bits) - 2 ** (bits - 1)
    if not parts["shape"].is_meta:
        numbers = numbers[:, : int(parts["shape"][1])]
    if zeros is not None and zeros.dtype is torch.int32:  # packed along the outputs
        zeros = unpack_bits(zeros.t().contiguous(), bits).t()[: numbers.shape[0]] - 2 ** (bits - 1)
    return numbers, scale, zeros


def compressed(parts: Parts, options: Options) -> Tensor:
    """compressed-tensors: whole numbers or 8-bit floats, packed or not, with scales for rows, groups or blocks.

    The library multiplies in the dtype of the scales.
    """
    numbers, scale, zero = compressed_numbers(parts, options)
    shape, dtype = (numbers.shape[0], numbers.shape[1]), scale.dtype
    order = parts.get("g_idx")
    columns = None if order is None or int(order.min()) < 0 else order.long()
    fitting = _fitting(options, scale, shape)
    if columns is None and len(fitting) != 1:
        raise ValueError(f"scales {tuple(scale.shape)} of a matrix {shape} fit {len(fitting)} kinds of config_groups")

    def over(grid: Tensor) -> Tensor:
        return grid[:, columns] if columns is not None else spread(grid, shape, *fitting)

    dense = numbers.to(dtype) if zero is None else numbers.to(dtype) - over(zero).to(dtype)
    return dense * over(scale).to(dtype)


def mxfp4(parts: Parts, _options: Options) -> Tensor:
    """Experts of gpt-oss: 32 numbers of E2M1 with an exponent, [E, out, groups, 16] to [E, in, out]."""
    blocks, exponents = parts["blocks"], parts["scale"]
    values = torch.tensor(FP4_VALUES)
    numbers = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1)  # [E, out, groups, 16, 2]
    scale = torch.exp2(exponents.float() - 127)
    dense = numbers.flatten(-2).mul_(scale[..., None]).flatten(-2)  # [E, out, in]
    return dense.transpose(-1, -2).contiguous()


def gptq_numbers(parts: Parts, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers [out, in], scales [out, groups] and zeros [out, groups] of GPTQ."""
    bits = int(options["bits"])
    numbers = unpack_bits(parts["qweight"].t().contiguous(), bits)
    zeros = unpack_bits(parts["qzeros"], bits).t()
    if options.get("checkpoint_format", "gptq") == "gptq":  # the first version stores zeros less one
        zeros = zeros + 1
    return numbers, parts["scales"].t().float(), zeros


def _neighbours(width: int, options: Options) -> Tensor:
    """Group of every input, [width] int64, where groups are neighbours."""
    return torch.arange(width) // (group_size(options) or width)


def gptq(parts: Parts, options: Options) -> Tensor:
    """GPTQ: whole numbers along the inputs, a group per input."""
    numbers, scales, zeros = gptq_numbers(parts, options)
    group = parts.get("g_idx")
    of_input = (_neighbours(numbers.shape[1], options) if group is None else group).long()
    if int(of_input.max()) + 1 != scales.shape[1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit a matrix of {int(of_input.max()) + 1} groups")
    return (numbers - zeros[:, of_input]).float() * scales[:, of_input]


def awq_numbers(parts: Parts, _options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers [out, in], scales [out, groups] and zeros [out, groups] of AWQ."""
    return _awq_unpack(parts["qweight"]).t(), parts["scales"].t().float(), _awq_unpack(parts["qzeros"]).t()


def _awq_unpack(packed: Tensor) -> Tensor:
    """Take [n, out / 8] int32 apart into [n, out]."""
    place = sorted(range(8), key=AWQ_ORDER.__getitem__)  # of every column
    columns: Tensor = unpack_bits(packed, 4).unflatten(-1, (-1, 8))[..., place]
    return columns.flatten(-2)


def awq(parts: Parts, options: Options) -> Tensor:
    """AWQ: whole numbers along the outputs, in an order of their own."""
    numbers, scales, zeros = awq_numbers(parts, options)
    shape, block = (numbers.shape[0], numbers.shape[1]), (None, group_size(options))
    return (numbers - spread(zeros, shape, block)) * spread(scales, shape, block)


def torchao(parts: Parts, _options: Options) -> Tensor:
    """torchao: whole numbers or 8-bit floats of one byte, with scales per row, whose groups divide it."""
    shape, scale = (parts["data"].shape[0], parts["data"].shape[1]), parts["scale"]
    block = (None, _even_group(parts))
    dense = parts["data"].float()
    if "zero" in parts:
        dense = dense - spread(parts["zero"], shape, block)
    return dense * spread(scale, shape, block)


def _even_group(parts: Parts) -> int | None:
    """Inputs that share a scale of torchao; None: all of a row, or the groups do not divide it."""
    width, scale = parts["data"].shape[1], parts["scale"]
    return width // scale.shape[1] if scale.ndim == 2 and width % scale.shape[1] == 0 else None


def nf4(parts: Parts, _options: Options) -> Tensor:
    """4-bit numbers of bitsandbytes: a table of sixteen values, and a scale per block of the flattened matrix."""
    state = json.loads(bytes(parts["state"].tolist()))
    largest = parts["absmax"]
    if "nested_absmax" in parts:  # the scales are quantised themselves, to bytes
        nested = parts["nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))[: largest.numel()]
        largest = parts["nested_quant_map"][largest.int()] * nested + state["nested_offset"]
    packed = parts["weight"].flatten().view(torch.uint8)
    numbers = torch.stack((packed >> 4, packed & 15), dim=-1).flatten().int()
    values = parts["quant_map"].float()[numbers]
    dense = values * largest.float().repeat_interleave(int(state["blocksize"]))[: values.numel()]
    return dense.to(getattr(torch, state["dtype"])).view(state["shape"])


def gptq_packed(parts: Parts, options: Options) -> PackedMatrix | None:
    """GPTQ of 4 bits, whose groups are neighbours.

    Raises:
        ValueError: they are not, though the options say so.
    """
    if int(options["bits"]) != 4 or options.get("desc_act"):
        return None
    numbers, scales, zeros = gptq_numbers(parts, options)
    group = parts.get("g_idx")
    neighbours = _neighbours(numbers.shape[1], options)
    if group is not None and not (group.is_meta or torch.equal(group.long(), neighbours)):
        raise ValueError(
            "g_idx names groups that are no neighbours, though desc_act is false; legal is quantization none"
        )
    return _packed(numbers, scales, zeros, group_size(options))


def awq_packed(parts: Parts, options: Options) -> PackedMatrix | None:
    """AWQ."""
    return _packed(*awq_numbers(parts, options), group_size(options))


def compressed_packed(parts: Parts, options: Options) -> PackedMatrix | None:
    """compressed-tensors of 4 bits, or of 8 bits without zeros, where an output has its own scales."""
    if "g_idx" in parts:
        return None
    numbers, scale, zero = compressed_numbers(parts, options)
    if numbers.is_floating_point() or scale.ndim != 2 or scale.shape[0] not in (1, numbers.shape[0]):
        return None
    fitting = _fitting(options, scale, (numbers.shape[0], numbers.shape[1]))
    if len(fitting) != 1:
        return None
    ((_, size),) = fitting
    if "packed" not in parts or packed_bits(options) == {8}:
        return _packed(numbers, scale, None, size) if zero is None else None
    return _packed(numbers + 8, scale, torch.full_like(scale, 8) if zero is None else zero + 8, size)


def torchao_packed(parts: Parts, _options: Options) -> PackedMatrix | None:
    """torchao of 8 bits without zeros, where an output has its own scales."""
    data, scale = parts["data"], parts["scale"]
    if data.dtype is not torch.int8 or "zero" in parts:
        return None
    grid = scale if scale.ndim == 2 else scale.reshape(-1, 1)
    return _packed(data, grid, None, _even_group(parts)) if grid.shape[0] in (1, data.shape[0]) else None


def _packed(numbers: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None) -> PackedMatrix | None:
    """Pack a matrix if the kernels take its groups: of equal length, and not of a few inputs."""
    width, groups = numbers.shape[1], scale.shape[1]
    length = width if group_size is None else min(width, group_size)
    if width != groups * length or length % BLOCK:
        return None
    return pack(numbers, scale, zero)
