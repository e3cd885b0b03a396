"""The bundled model: an exact k-gram copier, with which longspan can prove its output correct without a download.

If the last k bytes of a context occurred once before, anywhere in it, the model continues with what followed there,
byte by byte. The output can be checked at any length, and one wrong position, page or merge makes it wrong.
`recall_path` is the model's directory, built on first use; `build_recall` writes one to any directory. Both are
ordinary Transformers models. Must not know how longspan runs a model. Read next: Note [How recall works] in
`longspan.models.recall_weights`.

Limits: without a match the model continues with arbitrary bytes and never end-of-sequence, so use a maximum number of
tokens or a stop string; the question must end exactly as the needle did, a trailing space included; after a tie
(followed by A as often as by B) the answer is unspecified.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoConfig, GenerationConfig

from longspan.errors import ConfigError
from longspan.models import recall_tokenizer, recall_weights
from longspan.models.model_cache import cache_path, draft_of
from longspan.models.recall_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE
from longspan.models.recall_weights import RECALL_VARIANTS, RecallVariant

RECALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def recall_path(variant: str = "smollm3") -> Path:
    """Return the bundled model's directory, in the user's cache directory; build it on first use (4 MB, float32).

    The directory's name holds a digest of the builder's source, so that other builders have other directories. Several
    processes may call this at once.

    Args:
        variant: One of `RECALL_VARIANTS`.

    Raises:
        ConfigError: Unknown variant, or the cache directory cannot be written; on Linux, XDG_CACHE_HOME names another.
    """
    _find_variant(variant)
    path = cache_path(f"recall-{variant}-{builder_digest()}")
    if not all((path / name).is_file() for name in _FILES):
        build_recall(path, variant=variant)
    return path


def build_recall(path: Path, *, variant: str = "smollm3", dtype: torch.dtype = torch.float32) -> None:
    """Write the model and its tokenizer as a Transformers model directory.

    The directory appears complete or not at all. If it exists already, its files of these names are replaced, one by
    one, and others stay.

    Args:
        path: The directory; its parents are created.
        variant: One of `RECALL_VARIANTS`.
        dtype: Dtype of the weights, one of `RECALL_DTYPES`.

    Raises:
        ConfigError: Unknown variant or dtype.
    """
    spec = _find_variant(variant)
    if dtype not in RECALL_DTYPES:
        raise ConfigError(f"dtype: got {dtype}, expected one of {', '.join(map(str, RECALL_DTYPES))}")
    with draft_of(path) as draft:
        config = AutoConfig.for_model(**_config_fields(spec), dtype=str(dtype).removeprefix("torch."))
        config.save_pretrained(draft)
        special_ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        generation_config = GenerationConfig(**special_ids, do_sample=False)
        generation_config.save_pretrained(draft)
        recall_tokenizer.build_tokenizer(recall_weights.MAX_CONTEXT_LEN).save_pretrained(str(draft))
        parameters = recall_weights.compute_weights(spec)
        weights = {name: parameter.to(dtype).contiguous() for name, parameter in parameters.items()}
        # `save_file` would make a file that only its owner may read.
        (draft / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def _find_variant(name: str) -> RecallVariant:
    if name not in RECALL_VARIANTS:
        raise ConfigError(f"variant: got {name!r}, expected one of {', '.join(RECALL_VARIANTS)}")
    return RECALL_VARIANTS[name]


def builder_digest() -> str:
    """Digest of the source that builds the model."""
    sources = [Path(__file__), Path(recall_weights.__file__), Path(recall_tokenizer.__file__)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def _config_fields(spec: RecallVariant) -> dict[str, Any]:
    num_local_layers = len(spec.local_layers())
    fields: dict[str, Any] = {
        "model_type": spec.model_type,
        "architectures": [spec.architecture],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": recall_weights.HIDDEN_SIZE,
        "intermediate_size": recall_weights.INTERMEDIATE_SIZE,
        "num_hidden_layers": num_local_layers + 1,
        "num_attention_heads": spec.num_query_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": recall_weights.HEAD_DIM,
        "max_position_embeddings": recall_weights.MAX_CONTEXT_LEN,
        "rms_norm_eps": recall_weights.RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if spec.model_type == "smollm3":
        # Spelled out: left to itself, the class puts windows on the layers *without* RoPE. 1 means "has RoPE".
        fields["no_rope_layers"] = [1] * num_local_layers + [0]
        fields["use_sliding_window"] = True
        fields["sliding_window"] = spec.local_window
        fields["layer_types"] = ["sliding_attention"] * num_local_layers + ["full_attention"]
    return fields
