"""Writes safetensors as GGUF in float32: `gguf_file.py DIRECTORY FILE`, for the families of `ARCHITECTURES`.

Runs in llama.cpp's environment; the package `gguf` knows the names of tensors in both formats. Two things differ
besides: llama.cpp rotates neighbouring elements of a head for `llama` where Transformers rotates halves, so rows of the
query and key weights change places; and it wants a layer's experts in one tensor.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import gguf
import numpy
from gguf import GGUFWriter, TensorNameMap
from safetensors.numpy import load_file

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}
"""Architecture of llama.cpp per `model_type`."""

EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")


def pairs_together(weight: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """Rows [heads, 2, half] in the order [heads, half, 2]."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def write_facts(writer: GGUFWriter, config: dict) -> None:
    """The fields that llama.cpp reads."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)  # all float32
    if "moe_intermediate_size" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def write(directory: Path, file: Path) -> None:
    """All tensors of the directory's safetensors."""
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    names: TensorNameMap = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    write_facts(writer, config)
    experts: dict[str, dict[int, numpy.ndarray]] = defaultdict(dict)

    def add(name: str, tensor: numpy.ndarray) -> None:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise KeyError(f"llama.cpp has no name for {name}")
        writer.add_tensor(found, tensor)

    for part in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            if (match := EXPERT.fullmatch(name)) is not None:
                experts[match[1] + match[3]][int(match[2])] = tensor
                continue
            if architecture == gguf.MODEL_ARCH.LLAMA and "q_proj" in name:
                tensor = pairs_together(tensor, config["num_attention_heads"])
            elif architecture == gguf.MODEL_ARCH.LLAMA and "k_proj" in name:
                tensor = pairs_together(tensor, config["num_key_value_heads"])
            add(name, tensor)
    for name, several in experts.items():
        add(name, numpy.stack([several[number] for number in range(len(several))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
