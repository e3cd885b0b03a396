"""Well-known model shapes and clusters, for the tests of the planner. Configs are plain dicts; no weights anywhere."""

import json
from pathlib import Path

import msgspec

from longspan.costmodel.shapes import ModelShape
from longspan.kv.layout import KVGroup, KVSpec
from longspan.planner.clusters import Cluster, known_cluster
from longspan.types import AttentionParams, ModelSpec

LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_3_405B = LLAMA_3_8B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
LLAMA_3_8B_WEIGHTS = 8_030_261_248
LLAMA_3_405B_WEIGHTS = 405_853_388_800


def write_config(directory: Path, config: dict, name: str = "config.json") -> str:
    """A config file; returns its path."""
    path = directory / name
    path.write_text(json.dumps(config))
    return str(path)


def make_shape(
    *windows: int | None,
    layers: int = 16,
    query_heads: int = 32,
    kv_heads: int = 8,
    hidden_size: int = 4096,
    inner: int = 14336,
    dtype: str = "bfloat16",
) -> ModelShape:
    """A model with so many layers for each of the windows, heads of 128."""
    groups, first = [], 0
    for window in windows or (None,):
        indices = tuple(range(first, first + layers))
        groups.append(KVGroup(indices, KVSpec.uniform(kv_heads, 128, 128, dtype, window), query_heads))
        first += layers
    attention = hidden_size * 128 * 2 * (query_heads + kv_heads)
    parameters = first * (attention + 3 * hidden_size * inner)
    params = tuple(AttentionParams(0.1, window=group.spec.window) for group in groups for _ in group.layers)
    spec = ModelSpec("Made", first, 32_000, None, (), tuple(groups), params, parameters)
    logits = 32_000 * hidden_size
    return ModelShape(spec, dtype, hidden_size, inner, parameters + 2 * logits, logits)


def make_cluster(num_devices: int, gpu: str = "h100", **changes) -> Cluster:
    """Up to 8 devices in a node, else whole nodes of 8."""
    assert num_devices <= 8 or num_devices % 8 == 0
    cluster = known_cluster(gpu, min(8, num_devices), -(-num_devices // 8))
    return msgspec.structs.replace(cluster, **changes)
