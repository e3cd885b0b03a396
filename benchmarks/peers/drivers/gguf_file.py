"""Writes a Llama's safetensors as GGUF in float32: `gguf_file.py DIRECTORY FILE`.

Runs in llama.cpp's environment. Holds the names of both formats, and one difference: llama.cpp rotates neighbouring
elements of a head where Transformers rotates halves, so rows of the query and key weights change places.
"""

import json
import sys
from pathlib import Path

import numpy
from gguf import GGUFWriter
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Of a tensor of Transformers."""
    if name in OTHERS:
        return OTHERS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def pairs_together(weight: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """Rows [heads, 2, half] in the order [heads, half, 2]."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def write(directory: Path, file: Path) -> None:
    """All tensors of the directory's safetensors."""
    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)  # all float32
    for part in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            if "q_proj" in name:
                tensor = pairs_together(tensor, heads)
            elif "k_proj" in name:
                tensor = pairs_together(tensor, kv_heads)
            writer.add_tensor(gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
