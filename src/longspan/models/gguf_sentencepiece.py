"""SentencePiece's byte-pair tokenizer from a GGUF file: pieces with scores become merges in their order.

Holds the making of a fast tokenizer's parts as the `tokenizer.json` of Llama 2 and its relatives has them. A file has
no merges for these; SentencePiece joins the two neighbours whose joint piece has the best score, which is the same as
merges sorted by score. Must not know files or weights.
Read next: `longspan.models.gguf_tokenizer`.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from longspan.models.gguf_metadata import Metadata

SPACE = "▁"
_NORMAL, _CONTROL = 1, 3
"""Types of tokens in GGUF files."""


def merges_of(pieces: Sequence[str], scores: Sequence[float], is_normal: Sequence[bool]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a piece, those of the best piece first."""
    ids = {piece: i for i, piece in enumerate(pieces) if is_normal[i]}
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def make_sentencepiece_(backend: Any, metadata: Metadata) -> None:
    """Make a fast tokenizer that of the file's pieces; what it puts before a text is left to the caller."""
    pieces = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    scores = metadata.get("tokenizer.ggml.scores")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend.model = BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges_of(pieces, scores, [kind == _NORMAL for kind in types]),
        unk_token=pieces[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
