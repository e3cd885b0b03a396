"""Tiny repositories of quantised weights, laid out as people publish them, each beside the dense model that it means.

The writers follow the loops of the libraries that write such files (AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek's
conversion), number by number, so that they share nothing with the reader under test.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from proven_models import make_config, randomize_
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Parts = dict[str, Tensor]
"""Tensors of a repository, by name."""


@dataclass(frozen=True)
class Repository:
    """Quantised repository, and the dense one that it means."""

    path: str
    dense_path: str


def is_linear(name: str) -> bool:
    """Whether a tensor is a matrix that publishers quantise."""
    return name.endswith("_proj.weight")


def write_repository(
    root: Path,
    family: str,
    quantize: Callable[[str, Tensor], tuple[Parts, Tensor]],
    options: Mapping[str, object],
    *,
    matters: Callable[[str], bool] = is_linear,
) -> Repository:
    """Write both repositories: two shards and an index each.

    Args:
        root: an empty folder.
        family: entry of `PROVEN_MODELS`.
        quantize: function from name and weight to tensors and the dense weight that they mean.
        options: `quantization_config`.
        matters: which tensors are quantised.
    """
    config = make_config(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_(model)
    model.tie_weights()
    model.save_pretrained(root / "plain")  # by Transformers, which undoes its own renaming
    weights = read_all(root / "plain")
    stored: Parts = {}
    dense: Parts = {}
    for name, weight in weights.items():
        if matters(name):
            parts, dense[name] = quantize(name, weight)
            stored |= parts
        else:
            stored[name] = dense[name] = weight
    for folder, tensors, extra in (
        ("quantized", stored, {"quantization_config": dict(options)}),
        ("dense", dense, {}),
    ):
        path = root / folder
        path.mkdir()
        save_shards(path, tensors)
        plain = json.loads((root / "plain" / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(plain | extra))
    return Repository(str(root / "quantized"), str(root / "dense"))


def save_shards(path: Path, tensors: Parts) -> None:
    """Save tensors in two files with an index; the parts of a weight may lie in different ones."""
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: tensors[name].contiguous() for name in inside}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read_all(path: Path) -> Parts:
    """Read all tensors of a repository."""
    from safetensors.torch import load_file

    found: Parts = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def groups_of(weight: Tensor, size: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix to whole numbers from 0 to `most`: numbers [out, in], scales and zeros [out, groups]."""
    grouped = weight.view(weight.shape[0], -1, size)
    least, largest = grouped.amin(2), grouped.amax(2)
    scale = ((largest - least) / most).half().float()
    zero = (-least / scale).round().clamp(1, most).int()
    numbers = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, most).int()
    return numbers.flatten(1), scale, zero


def dense_of(numbers: Tensor, scale: Tensor, zero: Tensor, of_input: Tensor) -> Tensor:
    """Return (number - zero) * scale with the group of every input."""
    return (numbers - zero[:, of_input]).float() * scale[:, of_input]


def fp8_blocks(block: int) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Make blocks of 8-bit floats with a scale each, as DeepSeek V3 has them; the last blocks may be smaller."""

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        rows, columns = weight.shape
        grid = torch.empty(-(-rows // block), -(-columns // block))
        stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        dense = torch.empty(rows, columns)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                grid[i, j] = weight[part].abs().max() / 448
                stored[part] = (weight[part] / grid[i, j]).to(torch.float8_e4m3fn)
                dense[part] = stored[part].float() * grid[i, j]
        return {name: stored, f"{name}_scale_inv": grid}, dense

    return quantize


def fp8_whole(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """Make 8-bit floats with one scale for all."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale}, stored.float() * scale


def gptq(
    size: int, *, bits: int = 4, is_shuffled: bool = False, version: int = 1
) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Pack as AutoGPTQ does: along the inputs; zeros along the outputs, less one in the first version."""

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        width = weight.shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(width)) if is_shuffled else None
        of_input = torch.arange(width) // size
        per_word = 32 // bits
        numbers, scale, zero = groups_of(weight if order is None else weight[:, order], size, 2**bits - 1)
        if order is not None:  # back to the order of the inputs
            back = order.argsort()
            numbers, of_input = numbers[:, back], of_input[back]
        dense = dense_of(numbers, scale, zero, of_input)
        qweight = torch.zeros(width // per_word, weight.shape[0], dtype=torch.int64)
        for k in range(width):
            qweight[k // per_word] |= numbers[:, k].long() << (bits * (k % per_word))
        qzeros = torch.zeros(scale.shape[1], weight.shape[0] // per_word, dtype=torch.int64)
        for n in range(weight.shape[0]):
            qzeros[:, n // per_word] |= (zero[n].long() - int(version == 1)) << (bits * (n % per_word))
        stem = name.removesuffix("weight")
        parts = {
            "qweight": as_int32(qweight),
            "qzeros": as_int32(qzeros),
            "scales": scale.t().half(),
            "g_idx": of_input.int(),
        }
        return {stem + role: part for role, part in parts.items()}, dense

    return quantize


def awq(size: int) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Pack as AutoAWQ does: along the outputs, in its own order."""

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        num_out, width = weight.shape
        numbers, scale, zero = groups_of(weight, size, 15)
        qweight = torch.zeros(width, num_out // 8, dtype=torch.int64)
        qzeros = torch.zeros(scale.shape[1], num_out // 8, dtype=torch.int64)
        for column in range(num_out // 8):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                qweight[:, column] |= numbers[column * 8 + place].long() << (4 * i)
                qzeros[:, column] |= zero[column * 8 + place].long() << (4 * i)
        stem = name.removesuffix("weight")
        parts = {"qweight": as_int32(qweight), "qzeros": as_int32(qzeros), "scales": scale.t().half()}
        dense = dense_of(numbers, scale, zero, torch.arange(width) // size)
        return {stem + role: part for role, part in parts.items()}, dense

    return quantize


def as_int32(packed: Tensor) -> Tensor:
    """Reinterpret the low 32 bits of int64."""
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def compressed_packed(
    bits: int, size: int | None, *, is_symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Pack as compressed-tensors' pack-quantized: signed numbers, stored from 0, along the inputs."""
    half, per_word = 2 ** (bits - 1), 32 // bits

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        num_out, width = weight.shape
        grouped = weight.view(num_out, -1, size or width)
        zero = torch.zeros(grouped.shape[:2], dtype=torch.int32)
        if is_symmetric:
            scale = (grouped.abs().amax(2) / half).to(dtype)
        else:
            scale = ((grouped.amax(2) - grouped.amin(2)) / (2 * half - 1)).to(dtype)
            zero = (-half - grouped.amin(2) / scale.float()).round().clamp(-half, half - 1).int()
        numbers = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(-half, half - 1).int().flatten(1)
        words = torch.zeros(num_out, -(-width // per_word), dtype=torch.int64)
        for k in range(width):
            words[:, k // per_word] |= (numbers[:, k].long() + half) << (bits * (k % per_word))
        stem = name.removesuffix("weight")
        parts = {
            "weight_packed": as_int32(words),
            "weight_scale": scale,
            "weight_shape": torch.tensor([num_out, width]),
        }
        if not is_symmetric:
            zero_words = torch.zeros(-(-num_out // per_word), zero.shape[1], dtype=torch.int64)
            for n in range(num_out):
                zero_words[n // per_word] |= (zero[n].long() + half) << (bits * (n % per_word))
            parts["weight_zero_point"] = as_int32(zero_words)
        of_input = torch.arange(width) // (size or width)
        dense = (numbers - zero[:, of_input]).to(dtype) * scale[:, of_input]
        return {stem + role: part for role, part in parts.items()}, dense.float()

    return quantize


def compressed_ordered(size: int) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Pack 4 bits whose groups are not neighbours: every input names its group."""
    pack = compressed_packed(4, size, dtype=torch.float32)

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        width = weight.shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
        parts, dense = pack(name, weight[:, order])
        stem, back = name.removesuffix("weight"), order.argsort()
        numbers = (dense / parts[f"{stem}weight_scale"].repeat_interleave(size, 1)).round().int()[:, back]
        words = torch.zeros(weight.shape[0], width // 8, dtype=torch.int64)
        for k in range(width):
            words[:, k // 8] |= (numbers[:, k].long() + 8) << (4 * (k % 8))
        parts[f"{stem}weight_packed"] = as_int32(words)
        parts[f"{stem}weight_g_idx"] = (torch.arange(width) // size)[back].int()
        return parts, dense[:, back]

    return quantize


def compressed_blocks(block: int) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Store 8-bit floats with a float32 scale per block, as compressed-tensors does."""

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        parts, dense = fp8_blocks(block)(name, weight)
        return {name: parts[name], f"{name}_scale": parts[f"{name}_scale_inv"]}, dense

    return quantize


def compressed_plain(
    kind: str, *, has_input_scale: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """Store int8 or 8-bit floats as they are, with a scale per output, as compressed-tensors does."""

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        most = 127 if kind == "int" else 448
        scale = (weight.abs().amax(1, keepdim=True) / most).to(dtype)
        scaled = weight / scale.float()
        numbers = scaled.round().clamp(-128, 127).to(torch.int8) if kind == "int" else scaled.to(torch.float8_e4m3fn)
        stem = name.removesuffix("weight")
        parts = {"weight": numbers, "weight_scale": scale}
        if has_input_scale:
            parts["input_scale"] = torch.tensor([0.1])
        return {stem + role: part for role, part in parts.items()}, (numbers.to(dtype) * scale).float()

    return quantize


def compressed_options(format_: str, **weights: object) -> dict[str, object]:
    """`quantization_config` of compressed-tensors for all linear layers but that of the logits."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": defaults | weights}},
    }
