"""Corrections to a tokenizer that Transformers builds from a GGUF file.

Holds how text is cut into words before byte pairs are merged, which tokens are special, and whether a text begins with
one. A file says all of it; Transformers, depending on its version, takes its own defaults for some of it without a
word, and tokens would differ. Must not know files or weights.
Read next: `longspan.models.gguf_sentencepiece`, for the other kind of tokenizer; `longspan.models.gguf_files`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from longspan.errors import UnsupportedModelError
from longspan.models.gguf_metadata import Metadata
from longspan.models.gguf_sentencepiece import make_sentencepiece_

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Kinds of tokenizers, as files name them."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _words(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2_(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _llama3_(backend: Any) -> None:
    backend.pre_tokenizer = _words(_LLAMA3)
    backend.model.ignore_merges = True  # a word that is a token is that token, whatever its merges say


def _qwen2_(backend: Any) -> None:
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _words(_QWEN2)


def _smollm_(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


BYTE_LEVEL_RULES: Mapping[str, Callable[[Any], None]] = {
    "gpt-2": _gpt2_,
    "llama-bpe": _llama3_,
    "qwen2": _qwen2_,
    "smollm": _smollm_,
}
"""Change of a fast tokenizer per rule, as the tokenizers of these models have it in their own files."""


BEGIN_WITH_BOS = ("llama-bpe",)
"""Rules whose texts begin with a token of their own where the file does not say; those of SentencePiece do so, too."""

SPECIAL_TOKENS: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Key below `tokenizer.ggml` per special token of a tokenizer."""


def check_tokenizer(metadata: Metadata) -> None:
    """Refuse a tokenizer that is not proven.

    Raises:
        UnsupportedModelError: names what is not.
    """
    kind, rule = metadata.get(MODEL), metadata.get(PRE)
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UnsupportedModelError(
            f"{MODEL}: got {kind!r}, proven is {BYTE_LEVEL} (byte-level pairs) and {SENTENCEPIECE} (SentencePiece)"
        )
    if kind == BYTE_LEVEL and rule not in BYTE_LEVEL_RULES:
        raise UnsupportedModelError(f"{PRE}: got {rule!r}, proven is {', '.join(BYTE_LEVEL_RULES)}")
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise UnsupportedModelError("tokenizer.ggml.add_eos_token: got True, proven is False")


def correct_(tokenizer: PreTrainedTokenizerBase, metadata: Metadata) -> None:
    """Make a tokenizer do as the file says, which `check_tokenizer` has admitted."""
    kind, rule = metadata.get(MODEL), metadata.get(PRE)
    fast: Any = tokenizer
    if kind == SENTENCEPIECE:
        make_sentencepiece_(fast.backend_tokenizer, metadata)
    else:
        BYTE_LEVEL_RULES[rule](fast.backend_tokenizer)
        fast.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokens = metadata.get("tokenizer.ggml.tokens")
    for name, key in SPECIAL_TOKENS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        setattr(fast, name, None if token_id is None else tokens[token_id])
    if metadata.get("tokenizer.ggml.add_bos_token", kind == SENTENCEPIECE or rule in BEGIN_WITH_BOS):
        _begin_with_(fast.backend_tokenizer, fast.bos_token, fast.bos_token_id)


def _begin_with_(backend: Any, token: str, token_id: int) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, token_id)]
    )
