"""Bytes and elements of layouts, against numbers worked out by hand."""

import msgspec
import pytest

from longspan.kv.layout import DTYPE_BYTES, KVComponent, KVGroup, KVLayout, KVSpec
from longspan.types import AttentionParams, ModelSpec

LATENT = KVLayout((KVComponent("k", 1, 576, "bfloat16"),), v_width_in_k=512)
"""Multi-head latent attention as a kernel sees it: values are the first 512 elements of keys."""

EIGHT_BIT = KVLayout((KVComponent("k", 8, 128, "int8", "float32"), KVComponent("v", 8, 128, "int8", "float32")))


@pytest.mark.parametrize(
    ("heads", "k_width", "v_width", "dtype", "num_bytes"),
    [
        (8, 128, 128, "bfloat16", 4096),  # Llama 3 8B and 70B: 8 * (128 + 128) * 2
        (8, 128, 128, "float32", 8192),
        (4, 256, 256, "bfloat16", 4096),  # Gemma 3 4B: 4 * (256 + 256) * 2
        (16, 192, 128, "bfloat16", 10240),  # 16 * (192 + 128) * 2
        (3, 5, 7, "float16", 72),  # 3 * (5 + 7) * 2
        (1, 1, 1, "float64", 16),
    ],
)
def test_a_token_takes_its_keys_and_values_in_every_layer(heads, k_width, v_width, dtype, num_bytes):
    layout = KVSpec.uniform(heads, k_width, v_width, dtype).layout
    assert layout.token_bytes == num_bytes
    assert layout.token_elements == num_bytes // DTYPE_BYTES[dtype]
    assert [component.token_bytes for component in layout.components] == [
        heads * k_width * DTYPE_BYTES[dtype],
        heads * v_width * DTYPE_BYTES[dtype],
    ]
    assert (layout.num_kv_heads, layout.k_width, layout.v_width) == (heads, k_width, v_width)


def test_scales_take_bytes_and_are_no_elements():
    keys, _ = EIGHT_BIT.components
    assert keys.token_bytes == 8 * (128 + 4)
    assert EIGHT_BIT.token_bytes == 2112  # a little more than half of bfloat16's 4096
    assert EIGHT_BIT.token_elements == 2048


def test_components_of_different_dtypes_count_each_in_its_own():
    layout = KVLayout((KVComponent("k", 2, 16, "bfloat16"), KVComponent("v", 2, 8, "int8", "float16")))
    assert layout.token_bytes == 2 * 16 * 2 + 2 * (8 + 2)


def test_values_inside_of_keys_are_stored_once():
    assert LATENT.token_bytes == 1152  # 576 * 2, as DeepSeek-V3 caches per layer
    assert LATENT.token_elements == 576
    assert (LATENT.num_kv_heads, LATENT.k_width, LATENT.v_width) == (1, 576, 512)


@pytest.mark.parametrize(
    ("roles", "heads", "v_width_in_k"),
    [("k", (1,), None), ("kv", (1, 1), 4), ("vk", (1, 1), None), ("kv", (1, 2), None), ("k", (1,), 9), ("", (), None)],
)
def test_rejects_what_is_no_layout_of_keys_and_values(roles, heads, v_width_in_k):
    components = tuple(KVComponent(role, count, 8, "float32") for role, count in zip(roles, heads, strict=True))
    with pytest.raises(ValueError, match=r"components: got|v_width_in_k: got"):
        KVLayout(components, v_width_in_k)


def test_a_device_with_part_of_the_heads_stores_that_part():
    part = EIGHT_BIT.with_kv_heads(2)
    assert part.token_bytes == 528
    assert part == KVLayout(tuple(msgspec.structs.replace(c, num_heads=2) for c in EIGHT_BIT.components))
    assert LATENT.with_kv_heads(1) == LATENT


def test_a_group_counts_all_its_layers():
    group = KVGroup(tuple(range(32)), KVSpec.uniform(8, 128, 128, "bfloat16"), 32)  # Llama 3 8B
    assert group.token_bytes == 131_072
    assert group.page_bytes(16) == 2_097_152
    assert group.query_row_bytes == 32 * 128 * 2  # of one layer, as the others
    assert group.merged_row_bytes == 32 * 128 * 4
    assert group.pair_flops() == 2 * 32 * (128 + 128)


def test_every_dtype_is_said_apart():
    """8-bit keys and values: queries are computed and sent in bfloat16, partials as the user wants."""
    group = KVGroup((0,), KVSpec(EIGHT_BIT, "bfloat16"), 32)
    assert (group.wire_dtype, group.partial_dtype) == ("bfloat16", "bfloat16")
    assert msgspec.structs.replace(group, float32_partials=True).partial_dtype == "float32"
    assert (group.token_bytes, group.query_row_bytes) == (2112, 8192)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bfloat16", 4), ("float16", 4), ("float32", 4), ("float64", 8)])
def test_partials_are_merged_in_float32_unless_queries_are_wider(dtype, num_bytes):
    assert KVGroup((0,), KVSpec.uniform(1, 3, 5, dtype), 2).merged_row_bytes == 2 * 5 * num_bytes


def test_a_layout_travels_as_a_message():
    groups = tuple(
        KVGroup((layer,), KVSpec(layout, "bfloat16", window), 32)
        for layer, (layout, window) in enumerate([(LATENT, None), (EIGHT_BIT, 4096)])
    )
    assert groups[1].token_bytes == 2112  # what was computed before does not travel, nor make groups differ
    spec = ModelSpec("Toy", 2, 300, 64, (2,), groups, (AttentionParams(0.5), AttentionParams(0.5, window=4096)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ModelSpec) == spec
