"""Quantised repositories load as the dense weights that they mean, to the bit, and as Transformers dequantises them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from multimodal_models import multimodal_model
from quantized_models import (
    as_int32,
    awq,
    compressed_blocks,
    compressed_options,
    compressed_ordered,
    compressed_packed,
    compressed_plain,
    fp8_blocks,
    fp8_whole,
    gptq,
    read_all,
    save_shards,
    write_repository,
)
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models import dequantize
from longspan.models.families import version_of
from longspan.models.inspect import check_proven, inspect_model
from longspan.models.loader import load_config, load_model
from longspan.models.packed_linear import PackedLinear
from longspan.models.small_weights import with_small_weights
from longspan.native.packed import unpack

pytestmark = pytest.mark.cover

COMPARED_FROM = (5, 24)
"""Version of Transformers whose own dequantising is compared: older ones round to bfloat16, or have no such option."""

needs_dequantize = pytest.mark.skipif(version_of(transformers.__version__) < COMPARED_FROM, reason="it rounds elsewise")

GROUPED = {"strategy": "group", "group_size": 32, "num_bits": 4}
FLOAT = {"type": "float"}
ROUNDED = {"input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}


def with_activations(options):
    options["config_groups"]["group_0"] |= ROUNDED
    return options


def fp8_options(block):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}


def gptq_options(**others):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, **others}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

REPOSITORIES = {
    # name: writer, quantization_config, whether Transformers dequantises it with what is installed here
    "fp8": (fp8_blocks(32), fp8_options(32), True),
    "fp8-uneven": (fp8_blocks(48), fp8_options(48), False),  # as DeepSeek V3's 576 rows in blocks of 128
    "fp8-whole": (fp8_whole, fp8_options(32) | {"weight_block_size": None}, False),
    "compressed-w4a16": (compressed_packed(4, 32), compressed_options("pack-quantized", **GROUPED), True),
    "compressed-w4a16-zeros": (
        compressed_packed(4, 32, is_symmetric=False),
        compressed_options("pack-quantized", **GROUPED, symmetric=False),
        True,
    ),
    "compressed-w4a16-float32": (
        compressed_packed(4, 32, dtype=torch.float32),
        compressed_options("pack-quantized", **GROUPED),
        True,
    ),
    "compressed-w8a16": (compressed_packed(8, None), compressed_options("pack-quantized"), True),
    "compressed-int8": (compressed_plain("int"), compressed_options("int-quantized"), True),
    "compressed-fp8": (compressed_plain("float"), compressed_options("float-quantized", **FLOAT), True),
    "compressed-fp8-static": (
        compressed_plain("float", has_input_scale=True),
        with_activations(compressed_options("float-quantized", **FLOAT)),
        False,
    ),
    "compressed-fp8-blocks": (
        compressed_blocks(32),
        compressed_options("float-quantized", **FLOAT, strategy="block", block_structure=[32, 32]),
        True,
    ),
    "compressed-fp8-blocks-uneven": (
        compressed_blocks(48),
        compressed_options("float-quantized", **FLOAT, strategy="block", block_structure=[48, 48]),
        False,
    ),
    "compressed-w4a16-ordered": (
        compressed_ordered(32),
        compressed_options("pack-quantized", **GROUPED, actorder="group"),
        False,  # new versions of the library do not know them
    ),
    "compressed-naive": (compressed_plain("int"), compressed_options("naive-quantized"), True),
    "gptq": (gptq(32), gptq_options(), False),
    "gptq-8": (gptq(32, bits=8), gptq_options(bits=8), False),
    "gptq-v2": (gptq(32, version=2), gptq_options(checkpoint_format="gptq_v2"), False),
    "gptq-shuffled": (gptq(32, is_shuffled=True), gptq_options(desc_act=True), False),
    "awq": (awq(32), AWQ, False),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            quantize, options, _ = REPOSITORIES[name]
            made[name] = write_repository(tmp_path_factory.mktemp(name), "llama", quantize, options)
        return made[name]

    return make


def weights_of(path, **options):
    return load_model(path, torch.float32, show_progress=False, **options).state_dict()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype is weight.dtype
        assert torch.equal(found[name], weight), name


@pytest.mark.cover(cases=12)
@pytest.mark.parametrize("name", REPOSITORIES)
def test_weights_are_the_dense_ones(name, repository):
    made = repository(name)
    assert_same(weights_of(made.path), weights_of(made.dense_path))
    spec = inspect_model(*load_config(made.path), torch.float32)
    assert spec == inspect_model(*load_config(made.dense_path), torch.float32)


@needs_dequantize
@pytest.mark.parametrize("name", [name for name, (*_, by_transformers) in REPOSITORIES.items() if by_transformers])
def test_weights_are_those_that_transformers_dequantises(name, repository):
    made = repository(name)
    config = AutoConfig.from_pretrained(made.path)
    method = config.quantization_config["quant_method"]
    pytest.importorskip("accelerate" if method == "fp8" else "compressed_tensors")
    if method == "fp8":
        given = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    else:
        given = transformers.utils.quantization_config.CompressedTensorsConfig(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32, quantization_config=given)
    assert_same(weights_of(made.path), reference.state_dict())


def mxfp4_numbers(name, weight):
    """Experts [E, in, out] as gpt-oss has them: [E, out, in / 32, 16] bytes and [E, out, in / 32] exponents."""
    generator = torch.Generator().manual_seed(len(name))
    num_experts, width, num_out = weight.shape
    blocks = torch.randint(0, 256, (num_experts, num_out, width // 32, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(122, 126, blocks.shape[:3], generator=generator, dtype=torch.uint8)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    dense = torch.empty(num_experts, num_out, width)
    for byte in range(16):
        for half in range(2):
            values = torch.tensor([table[(b >> (4 * half)) & 15] for b in blocks[..., byte].flatten().tolist()])
            dense[..., 2 * byte + half :: 32] = values.view(exponents.shape) * 2.0 ** (exponents.float() - 127)
    return {f"{name}_blocks": blocks, f"{name}_scales": exponents}, dense.transpose(1, 2).contiguous()


def test_experts_of_gpt_oss_are_dequantised_as_transformers_does(tmp_path):
    options = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    matters = lambda name: name.endswith(("gate_up_proj", "down_proj"))  # noqa: E731
    made = write_repository(tmp_path, "gpt_oss", mxfp4_numbers, options, matters=matters)
    wanted = weights_of(made.dense_path)
    assert_same(weights_of(made.path), wanted)
    if version_of(transformers.__version__) < COMPARED_FROM:
        return
    given = transformers.Mxfp4Config(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32, quantization_config=given)
    assert_same(reference.state_dict(), wanted)


def test_experts_in_8_bit_floats_are_merged_after_they_are_dequantised(tmp_path):
    """One tensor per expert in the files, one per layer in the model."""
    made = write_repository(tmp_path, "qwen3_moe", fp8_blocks(48), fp8_options(48))
    names = json.loads((Path(made.path) / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.7.down_proj.weight_scale_inv" in names
    assert_same(weights_of(made.path), weights_of(made.dense_path))


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_of_bitsandbytes_are_dequantised_as_the_library_does(kind, is_double, repository, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    given = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=is_double
    )
    small = AutoModelForCausalLM.from_pretrained(
        repository("fp8").dense_path, dtype=torch.bfloat16, quantization_config=given
    )
    small.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found, dense = weights_of(str(tmp_path)), weights_of(repository("fp8").dense_path)
    num_quantized = 0
    for name, weight in reloaded.named_parameters():
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            num_quantized += 1
            if weight.quant_state.shape[1] % 64:  # the library's own kernel for CPUs is wrong here (0.50)
                assert float((found[name] - dense[name]).abs().max()) < 0.25 * float(dense[name].abs().max())
                continue
            weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        assert torch.equal(found[name], weight), name
    assert num_quantized == 3 * 7


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_of_torchao_are_dequantised_as_the_library_does(kind, repository, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    given = transformers.TorchAoConfig(getattr(torchao, kind)())
    small = AutoModelForCausalLM.from_pretrained(
        repository("fp8").dense_path, dtype=torch.float32, quantization_config=given
    )
    small.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = weights_of(str(tmp_path))
    num_quantized = 0
    for name, weight in reloaded.named_parameters():
        if type(weight.data) is not torch.Tensor:
            weight = weight.dequantize()
            num_quantized += 1
        assert torch.equal(found[name], weight), name
    assert num_quantized == 3 * 7


def proven_config(**options):
    """A config of a proven family with a `quantization_config`."""
    return transformers.LlamaConfig(quantization_config=options)


REFUSALS = {
    "hqq": ({"quant_method": "hqq"}, "got quant_method 'hqq', proven is awq, bitsandbytes, compressed-tensors, fp8"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "got quant_method 'quanto'"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "got quant_method 'fbgemm_fp8'"),
    "nameless": ({"bits": 4}, "got quant_method None"),
    "llm.int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8 looks at the outliers of all rows"),
    "llm.int8-nameless": ({"load_in_8bit": True}, "LLM.int8 looks at the outliers of all rows"),
    "gptq-3": ({"quant_method": "gptq", "bits": 3}, "got bits 3, proven is 4, 8"),
    "gptq-marlin": (
        gptq_options(checkpoint_format="marlin"),
        "got checkpoint_format 'marlin', proven is gptq, gptq_v2",
    ),
    "awq-8": ({"quant_method": "awq", "bits": 8}, "got bits 8, proven is 4"),
    "awq-gemv": (AWQ | {"version": "gemv"}, "got version 'gemv', proven is gemm"),
    "nvfp4": (
        compressed_options("nvfp4-pack-quantized", num_bits=4),
        "got format 'nvfp4-pack-quantized', proven is pack",
    ),
    "marlin-24": (compressed_options("marlin-24"), "got format 'marlin-24', proven is pack-quantized"),
    "3 bits": (compressed_options("pack-quantized", num_bits=3), "got num_bits 3, proven is 4, 8"),
    "sparse": (
        compressed_options("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "got sparsity_config.format 'sparse-24-bitmask', proven is dense",
    ),
    "rotated": (
        compressed_options("pack-quantized") | {"transform_config": {"config_groups": {"u": {}}}},
        "got transform_config 'transforms', proven is none",
    ),
    "torchao-dynamic": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
        "got quant_type 'Int8DynamicActivationInt8WeightConfig', proven is Int8WeightOnlyConfig, .*: it rounds activat",
    ),
    "torchao-int4": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        "got quant_type 'Int4WeightOnlyConfig', proven is Int8WeightOnlyConfig",
    ),
}


MALFORMED = {
    "a text": "gptq",
    "a list": [1],
    "a list of methods": {"quant_method": ["x"]},
    "groups as a list": {"quant_method": "compressed-tensors", "config_groups": [1]},
    "an empty group": {"quant_method": "compressed-tensors", "config_groups": {"g": None}},
    "a group without weights": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": [4]}},
    },
    "a block as a word": compressed_options("float-quantized", strategy="block", block_structure="128"),
    "a group size as a word": gptq_options(group_size="all"),
    "a group size as a list": AWQ | {"group_size": [32]},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_rejects_fields_of_another_type_in_one_line(name):
    config = transformers.LlamaConfig()
    config.quantization_config = MALFORMED[name]
    with pytest.raises(UnsupportedModelError, match=r"^quantization_config: got .*, proven are fields as") as found:
        check_proven(config)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", REFUSALS)
def test_rejects_what_is_not_proven(name):
    options, message = REFUSALS[name]
    with pytest.raises(UnsupportedModelError, match=f"quantization_config: .*{message}"):
        check_proven(proven_config(**options))


def test_rejects_scales_that_do_not_fit_their_matrix(tmp_path):
    made = write_repository(tmp_path, "llama", fp8_blocks(32), fp8_options(64))
    with pytest.raises(ConfigError, match="do not fit a matrix"):
        load_model(made.path, torch.float32, show_progress=False)


def test_rejects_a_repository_that_lacks_a_scale(tmp_path):
    def without_one(name, weight):
        parts, dense = fp8_blocks(32)(name, weight)
        if name == "model.layers.1.mlp.up_proj.weight":
            del parts[f"{name}_scale_inv"]
        return parts, dense

    made = write_repository(tmp_path, "llama", without_one, fp8_options(32))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds torch\.float8_e4m3fn, and"):
        load_model(made.path, torch.float32, show_progress=False)


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "compressed-w4a16-zeros"])
def test_one_scale_of_a_wrong_block_changes_the_weights(name, tmp_path):
    quantize, options, _ = REPOSITORIES[name]

    def with_neighbours_scale(tensor, weight):
        parts, dense = quantize(tensor, weight)
        for part, value in parts.items():
            if part.endswith(("scale_inv", "scales", "weight_scale")):
                parts[part] = value.roll((1, 1), (0, 1))
        return parts, dense

    made = write_repository(tmp_path, "llama", with_neighbours_scale, options)
    found, wanted = weights_of(made.path), weights_of(made.dense_path)
    changed = {part for part in wanted if not torch.equal(found[part], wanted[part])}
    assert changed == {part for part in wanted if part.endswith("_proj.weight")}


def constant_parts(kind, width, size):
    """Parts of a matrix [8, width] of ones, whose scales are 1, 10, 100, ..., and its options."""
    num_groups = -(-width // size)
    scales = torch.tensor([10.0**group for group in range(num_groups)])
    if kind == "compressed":
        parts = {
            "packed": as_int32(torch.full((8, width // 8), 0x99999999)),  # 8 is zero
            "scale": scales.expand(8, -1),
            "shape": torch.tensor([8, width]),
        }
        return parts, compressed_options("pack-quantized", **GROUPED | {"group_size": size})
    packed = {"gptq": (width // 8, 8), "awq": (width, 1)}[kind]
    parts = {
        "qweight": torch.full(packed, 0x11111111, dtype=torch.int32),
        "qzeros": torch.zeros(num_groups, 1, dtype=torch.int32),
        "scales": scales[:, None].expand(-1, 8),
    }
    return parts, {"group_size": size, "bits": 4, "checkpoint_format": "gptq_v2"}


DENSE_AND_PACKED = {
    "gptq": (dequantize.gptq, dequantize.gptq_packed),
    "awq": (dequantize.awq, dequantize.awq_packed),
    "compressed": (dequantize.compressed, dequantize.compressed_packed),
}


@pytest.mark.parametrize(("width", "size"), [(96, 64), (192, 128), (64, 128), (96, 32)])
@pytest.mark.parametrize("kind", DENSE_AND_PACKED)
def test_the_last_group_may_be_short(kind, width, size):
    """The number of scales does not tell where a group ends: two of 96 columns are 48 and 48, or 64 and 32."""
    dense, packed = DENSE_AND_PACKED[kind]
    parts, options = constant_parts(kind, width, size)
    wanted = torch.tensor([10.0 ** (column // size) for column in range(width)]).expand(8, width)
    assert torch.equal(dense(parts, options), wanted)
    kept = packed(parts, options)
    assert (kept is None) == (width > size and width % size > 0), "the kernels know equal groups alone"
    assert kept is None or torch.equal(unpack(kept), wanted)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1), (1, 1), (8, 3), (8, 2), (4, 1), (4, 2), (16, 1)])
def test_matrices_of_torchao_stay_small_where_an_output_has_its_own_scales(shape):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(-127, 128, (8, 96), dtype=torch.int8, generator=generator)
    parts = {"data": data, "scale": torch.rand(shape, generator=generator)}
    kept = dequantize.torchao_packed(parts, {})
    assert (kept is None) == (shape in [(8, 2), (4, 1), (4, 2), (16, 1)]), "groups of 48, or scales of other rows"
    assert kept is None or torch.equal(unpack(kept), dequantize.torchao(parts, {}).expand(8, 96))


@pytest.mark.parametrize("kind", DENSE_AND_PACKED)
def test_rejects_other_numbers_of_groups_than_the_options_say(kind):
    dense, packed = DENSE_AND_PACKED[kind]
    parts, options = constant_parts(kind, 128, 32)[0], constant_parts(kind, 128, 64)[1]
    assert packed(parts, options) is None
    with pytest.raises(ValueError, match="scales"):
        dense(parts, options)


def test_every_matrix_finds_the_config_group_that_its_scales_fit():
    parts, options = constant_parts("compressed", 192, 128)
    whole = {"weights": options["config_groups"]["group_0"]["weights"] | {"strategy": "channel", "group_size": None}}
    options["config_groups"]["group_1"] = whole
    assert dequantize.compressed(parts, options)[0, [0, 127, 128]].tolist() == [1, 1, 10]
    one = parts | {"scale": parts["scale"][:, :1]}
    assert dequantize.compressed(one, options)[0, [0, 191]].tolist() == [1, 1]
    options["config_groups"]["group_2"] = {"weights": whole["weights"] | {"strategy": "group", "group_size": 96}}
    with pytest.raises(ValueError, match="fit 2 kinds of config_groups"):
        dequantize.compressed(parts, options)


def test_rejects_a_grid_of_scales_whose_blocks_nothing_tells():
    with pytest.raises(ValueError, match="do not fit a matrix"):
        dequantize.spread(torch.tensor([[1.0, 100.0]]), (1, 62))


def write_multimodal(tmp_path, name, quantize, options):
    """Write a repository whose text part is quantised, and its dense twin; tensors have the names of the whole."""
    whole, stored, dense = Path(multimodal_model(name).path), {}, {}
    for tensor, weight in read_all(whole).items():
        stored[tensor] = dense[tensor] = weight
        if "language_model" in tensor and tensor.endswith("_proj.weight"):
            parts, dense[tensor] = quantize(tensor, weight)
            del stored[tensor]
            stored |= parts
    config = json.loads((whole / "config.json").read_text())
    for folder, tensors, extra in (("dense", dense, {}), ("small", stored, {"quantization_config": options})):
        (tmp_path / folder).mkdir()
        save_shards(tmp_path / folder, tensors)
        (tmp_path / folder / "config.json").write_text(json.dumps(config | extra))
    assert len(stored) > len(dense)
    return str(tmp_path / "small"), str(tmp_path / "dense")


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_the_text_part_of_a_quantised_multimodal_repository_is_dequantised(name, tmp_path):
    """Its tensors are renamed, and its config names the quantisation outside of the text part."""
    small, dense = write_multimodal(tmp_path, name, fp8_blocks(48), fp8_options(48))
    assert_same(weights_of(small), weights_of(dense))


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_the_text_part_of_a_quantised_multimodal_repository_stays_small(name, tmp_path):
    small, dense = write_multimodal(tmp_path, name, gptq(32), gptq_options())
    config, generation_config = load_config(small)
    spec = inspect_model(config, generation_config, torch.float32)
    kept = load_model(small, torch.float32, show_progress=False, quantization="keep")
    facts = with_small_weights(spec, small, config, torch.float32, "keep")
    assert facts.weight_bytes == sum(weight.nbytes for weight in kept.parameters())
    wanted = weights_of(dense)
    found = {
        f"{part}.weight": unpack(module.matrix) for part, module in kept.named_modules() if type(module) is PackedLinear
    }
    assert found.keys() == {part for part in wanted if part.endswith("_proj.weight")}
    assert_same(found, {part: wanted[part] for part in found})
