"""GGUF files of tiny models, written as llama.cpp's converter writes them, and the models that they must become."""

import itertools
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_models import VOCAB_SIZE, load_reference, write_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("4", "7"), ("Ġ", "1"))
ARCHITECTURES = {
    # architecture: model type, and what differs from the common tiny config
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"num_attention_heads": 4}),
    "qwen2moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_attention_heads": 4,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 32,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        },
    ),
}
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


def vocabulary() -> list[str]:
    """Tokens of a byte-level tokenizer: special ones, bytes, merged pairs, and unused ones."""
    tokens = [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
    return tokens + [f"[unused{i}]" for i in range(VOCAB_SIZE - len(tokens))]


def sentencepiece_metadata() -> dict[str, object]:
    """Metadata of a SentencePiece tokenizer: special tokens, bytes, pieces with scores."""
    best = ["th", "▁th", "▁the", "in", "he", "▁a", "er", "▁▁", "the", "▁in", "and", "an", "nd", "▁and"]
    letters = ["▁", *"etaoinshrdlu1."]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *best, *letters]
    tokens += [f"[unused{i}]" for i in range(VOCAB_SIZE - len(tokens))]
    num_front = len(SPECIAL) + 256
    kinds = [2, 3, 3, 3] + [6] * 256 + [5 if token.startswith("[unused") else 1 for token in tokens[num_front:]]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * num_front + [-float(i) for i in range(len(tokens) - num_front)],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": None,
    }


def sentencepiece(text: str, *, prefix: bool = True) -> list[int]:
    """Token ids by SentencePiece's rule as it is written: join the best-scored neighbours until none are a piece."""
    metadata = sentencepiece_metadata()
    tokens, scores, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
    parts = [*("▁" * prefix + text.replace(" ", "▁"))]
    while True:
        joint = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not joint:
            break
        i = -max(joint)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bytes_of = {i: [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()] for i, part in enumerate(parts)}
    return [found for i, part in enumerate(parts) for found in ([ids[part]] if part in ids else bytes_of[i])]


def byte_level(pre_tokenizer, normalizer=None, *, ignore_merges: bool = False) -> Tokenizer:
    """The tokenizer of the same vocabulary, as a `tokenizer.json` describes it."""
    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(BPE(vocab, list(MERGES), ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    kind: str = "F32",
    tied: bool = False,
    pre: str = "gpt-2",
    more: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    model_options: dict[str, object] | None = None,
    parts: int = 1,
) -> torch.nn.Module:
    """Write a tiny model as a GGUF file; return the model in Transformers, with the weights that the file holds.

    Args:
        path: the file, or a directory for a split one.
        architecture: key of `ARCHITECTURES`, or any name, which is then a Llama by another name.
        kind: type of the matrices.
        tied: whether input and output embeddings are one.
        pre: rule by which the tokenizer cuts words.
        more: metadata beside the usual, or instead of it; None as a value leaves a key out.
        tensors: tensors beside the model's.
        model_options: what differs in the model's config.
        parts: number of files.
    """
    model_type, options = ARCHITECTURES.get(architecture, ARCHITECTURES["llama"])
    options = {"tie_word_embeddings": tied, "max_position_embeddings": 4096, **options, **(model_options or {})}
    model = load_reference(write_model(path.with_name(f"{path.name}.source"), model_type, **options))
    config = model.config
    known = architecture if architecture in ARCHITECTURES else "llama"
    found = _quantised_(model, known, gguf.GGMLQuantizationType[kind], tied=tied)
    for name, data in (tensors or {}).items():
        found[name] = (data, gguf.GGMLQuantizationType.F32)
    metadata = {**_metadata(architecture, config, pre), **(more or {})}
    files = [path] if parts == 1 else [path / f"m-{i:05}-of-{parts:05}.gguf" for i in range(1, parts + 1)]
    for number, file in enumerate(files):
        writer = gguf.GGUFWriter(file, architecture)
        for key, value in metadata.items() if number == 0 else ():
            if value is not None:
                writer.add_key_value(key, value, *_types(value))
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
        for name, (data, used) in list(found.items())[number::parts]:
            writer.add_tensor(name, data, raw_dtype=used)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return model


def _quantised_(
    model: torch.nn.Module, known: str, kind: gguf.GGMLQuantizationType, *, tied: bool
) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """Return a file's tensors with their types, and give the model the weights that they hold."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        is_matrix = weight.ndim > 1 and not name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        for gguf_name, part in _stored(names, name, weight):
            data = part.numpy()
            used = kind if is_matrix else gguf.GGMLQuantizationType.F32
            blocks = gguf.quantize(data, used)
            part.copy_(torch.from_numpy(gguf.dequantize(blocks, used).reshape(data.shape)))
            stored = blocks
            if known == "llama" and (".attn_q." in gguf_name or ".attn_k." in gguf_name):
                heads = config.num_attention_heads if ".attn_q." in gguf_name else config.num_key_value_heads
                stored = blocks.reshape(heads, 2, -1, blocks.shape[-1]).swapaxes(1, 2).reshape(blocks.shape)
            found[gguf_name] = (np.ascontiguousarray(stored), used)
    return found


def _stored(names, name: str, weight: torch.Tensor):
    """Yield the tensors that a file has for a weight: experts' two matrices lie apart."""
    if name.endswith("experts.gate_up_proj"):
        block = name.split(".")[2]
        half = weight.shape[1] // 2
        yield f"blk.{block}.ffn_gate_exps.weight", weight[:, :half]
        yield f"blk.{block}.ffn_up_exps.weight", weight[:, half:]
    elif name.endswith("experts.down_proj"):
        yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", weight
    elif name.endswith("shared_expert_gate.weight"):
        yield f"blk.{name.split('.')[2]}.ffn_gate_inp_shexp.weight", weight[0]
    else:
        base, _, suffix = name.rpartition(".")
        yield f"{names.get_name(base)}.{suffix}", weight


def _metadata(architecture: str, config, pre: str) -> dict[str, object]:
    tokens = vocabulary()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    below = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    if hasattr(config, "shared_expert_intermediate_size"):
        below["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if hasattr(config, "num_experts"):
        below |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return {
        "general.name": "tiny",
        **{f"{architecture}.{key}": value for key, value in below.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 5 if t.startswith("[unused") else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _types(value: object):
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        return kinds.ARRAY, _types(value[0])[0]
    if isinstance(value, bool):
        return (kinds.BOOL,)
    if isinstance(value, int):
        return (kinds.UINT32,)
    return (kinds.FLOAT32,) if isinstance(value, float) else (kinds.STRING,)
