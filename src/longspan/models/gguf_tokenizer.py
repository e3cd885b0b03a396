"""Corrections to a tokenizer that Transformers builds from a GGUF file.

Holds how text is cut into words before byte pairs are merged. A file names the rule (`tokenizer.ggml.pre`) and
Transformers, depending on its version, does not know all of them, and takes GPT-2's without a word: tokens would
differ. Must not know files or weights.
Read next: `longspan.models.gguf_files`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from longspan.errors import UnsupportedModelError
from longspan.models.gguf_metadata import Metadata

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"

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


def correct_(tokenizer: PreTrainedTokenizerBase, metadata: Metadata) -> None:
    """Make a tokenizer cut text as the file says.

    Raises:
        UnsupportedModelError: the kind of tokenizer or the rule is not proven; the message names it.
    """
    kind, rule = metadata.get(MODEL), metadata.get(PRE)
    if kind != "gpt2":
        raise UnsupportedModelError(f"{MODEL}: got {kind!r}, proven in GGUF files is 'gpt2' (byte-level pairs)")
    if rule not in BYTE_LEVEL_RULES:
        raise UnsupportedModelError(f"{PRE}: got {rule!r}, proven is {', '.join(BYTE_LEVEL_RULES)}")
    fast: Any = tokenizer
    BYTE_LEVEL_RULES[rule](fast.backend_tokenizer)
