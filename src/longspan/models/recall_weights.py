"""The weights of the bundled model, an exact k-gram copier: computed, not trained, without randomness.

Holds the architectures of the model and the function that computes the parameters of each. Must not know files,
tokenizers or how longspan runs a model. Read next: `longspan.models.recall`, which writes the model to disk.


Note [How recall works]

The residual stream of a token at position i has a fixed layout (here k = 16; `_Residual` names the dimensions):

      0         8        16             128      136               200    201      255
      | block 0 | block 1 | ... ........ | block k | answer code     | one  | unused  |
        byte i    byte i-1                 byte i-k  of byte i         1.0    0.0

A block is the 8 bits of a byte as +1 or -1; the answer code is 64 numbers, +1 or -1, that tell bytes apart better. The
embedding writes block 0, the code and the one. The *local layers* fill the other blocks: each head attends exactly d
tokens back and copies all blocks known there, d places further on. With two heads the known blocks grow 1, 3, 9, 17:

      layer 0:  0         --1--> 1        --2--> 2
      layer 1:  0..2      --3--> 3..5     --6--> 6..8
      layer 2:  0..8      --9--> 9..16 (and 17, dropped)

The *recall layer*, the last one, is where the whole context matters. Its query is blocks 0..k-1, the last k bytes; its
key is blocks 1..k, the k bytes *before* the key's token: they agree just where the same k bytes occurred and the key's
token is what followed. Its value is the answer code. An example with k = 2 and the text "abXab":

      position     0    1    2    3    4
      byte         a    b    X    a    b
      key          ..   .a   ab   bX   Xa
      query                            ab     matches the key at position 2, so the answer is X

All scores are so far apart that softmax is 0 or 1 (`_LOCAL_GAP_NATS`; a wrong bit in the recall layer costs 45 nats,
while ln(1 M keys) is 13.8), except that keys that match equally well share equally: a k-gram that occurred several
times gives the mean of the answer codes that followed it. The MLPs are zero, and all norms but the last the identity.

A head that looks past the start of the context finds about the first token. With the tokenizer's beginning-of-sequence
token in front, no k-gram of bytes matches there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.models.recall_tokenizer import NUM_BYTES, SPECIAL_TOKENS, VOCAB_SIZE

MAX_CONTEXT_LEN = 2**21
"""Longest context in tokens. RoPE's fastest pair turns by one radian a token; float32 still tells such angles apart."""
HIDDEN_SIZE = 256
HEAD_DIM = 128
INTERMEDIATE_SIZE = 16
RMS_NORM_EPS = 1e-6
VOTE_GAIN = 16.0
"""Weight of the answer in the residual, where the code of the last byte has weight 1."""
LOGIT_GAIN = 0.5
"""lm_head is this times the answer codes: a logit of about 64 for the right byte, about 8 at most for others."""

_BITS = 8
_CODE_LEN = 64
_CONTENT_GAIN = 16.0
_LOCAL_GAP_NATS = 40.0
"""A local head's target scores this much above the token next to it, which is the runner-up at any distance up to
`MAX_CONTEXT_LEN`."""


@dataclass(frozen=True)
class RecallVariant:
    """Architecture of the model."""

    model_type: str
    architecture: str
    match_len: int
    """k in tokens: length of the end of the context that must have occurred before."""
    rope_theta: float
    """A power of two, so that each RoPE pair p turns by a known 2^-(something * p) radians a token."""
    num_position_pairs: int
    """RoPE pairs (the fastest) in which local heads compare positions."""
    first_content_pair: int = 0
    """First RoPE pair in which the recall layer compares bytes. Where that layer has RoPE, only pairs that hardly turn
    over `MAX_CONTEXT_LEN` will do."""
    num_query_heads: int = 2
    num_kv_heads: int = 1
    has_qk_norm: bool = False
    local_window: int | None = None
    """Sliding window of the local layers, in tokens, or None; the recall layer never has one."""

    def local_layers(self) -> list[tuple[int, list[int]]]:
        """Local layers as (blocks known before the layer, distance in tokens that each head looks back)."""
        layers: list[tuple[int, list[int]]] = []
        num_known = 1
        while num_known <= self.match_len:
            distances = [head * num_known for head in range(1, self.num_query_heads + 1)]
            layers.append((num_known, [distance for distance in distances if distance <= self.match_len]))
            num_known *= self.num_query_heads + 1
        return layers


_SMOLLM3 = RecallVariant(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    match_len=16,
    rope_theta=2.0**64,  # pair p: 2^-p radians a token, exactly
    num_position_pairs=23,
    local_window=64,
)

RECALL_VARIANTS = {
    # Layers with RoPE and a sliding window, then one with neither: two KV groups.
    "smollm3": _SMOLLM3,
    # 4 query heads on 2 KV heads, which differ in the bytes they carry and in their places.
    "smollm3-gqa": replace(_SMOLLM3, num_query_heads=4, num_kv_heads=2),
    # RoPE and full attention everywhere; pairs 0..12 carry position, 16..63 (at most 2^-30 radians a token) bytes.
    "llama": RecallVariant(
        model_type="llama",
        architecture="LlamaForCausalLM",
        match_len=12,
        rope_theta=2.0**120,
        num_position_pairs=13,
        first_content_pair=16,
    ),
    "qwen3": RecallVariant(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        match_len=12,
        rope_theta=2.0**120,
        num_position_pairs=13,
        first_content_pair=16,
        has_qk_norm=True,
    ),
}


def answer_codes() -> Tensor:
    """Return the codes in which tokens are stored as answers.

    Bytes are the vectors of 4 mutually unbiased bases of R^64 (256 in all): orthogonal within a basis, |cos| = 1/8
    between bases. Byte b has the entries (-1)^(Tr(a x1 x2) + u.x) with a = b >> 6, u = b & 63 and x = (x1, x2) over
    GF(8)^2. Special token i is sqrt(64) e_i.

    Returns:
        [VOCAB_SIZE, 64] float32; each row has square norm 64.
    """
    # What a basis adds to the exponent at each x.
    twists = [[_gf8_trace(_gf8_product(a, _gf8_product(x >> 3, x & 7))) for x in range(_CODE_LEN)] for a in range(4)]
    codes = torch.zeros(VOCAB_SIZE, _CODE_LEN)
    for byte in range(NUM_BYTES):
        a, u = byte >> 6, byte & 63
        codes[byte] = torch.tensor([(-1.0) ** (twists[a][x] + (u & x).bit_count()) for x in range(_CODE_LEN)])
    for i in range(len(SPECIAL_TOKENS)):
        codes[NUM_BYTES + i, i] = math.sqrt(_CODE_LEN)
    return codes


def _bit_codes() -> Tensor:
    """[VOCAB_SIZE, 8] float32: a byte's bits as +1 or -1; special token i is sqrt(8) e_i, of the same norm."""
    codes = torch.zeros(VOCAB_SIZE, _BITS)
    for byte in range(NUM_BYTES):
        codes[byte] = torch.tensor([1.0 if byte >> bit & 1 else -1.0 for bit in range(_BITS)])
    for i in range(len(SPECIAL_TOKENS)):
        codes[NUM_BYTES + i, i] = math.sqrt(_BITS)
    return codes


def _gf8_product(a: int, b: int) -> int:
    """Product in GF(8), polynomials over GF(2) modulo x^3 + x + 1."""
    product = 0
    for bit in range(3):
        if b >> bit & 1:
            product ^= a << bit
    for bit in (4, 3):
        if product >> bit & 1:
            product ^= 0b1011 << (bit - 3)
    return product


def _gf8_trace(a: int) -> int:
    """a + a^2 + a^4, which is 0 or 1."""
    square = _gf8_product(a, a)
    return a ^ square ^ _gf8_product(square, square)


@dataclass(frozen=True)
class _Residual:
    """Dimensions of the residual stream. See Note [How recall works]."""

    match_len: int

    def blocks(self, first: int, num: int) -> range:
        return range(_BITS * first, _BITS * (first + num))

    @property
    def code(self) -> range:
        start = _BITS * (self.match_len + 1)
        return range(start, start + _CODE_LEN)

    @property
    def one(self) -> int:
        return self.code.stop

    def mean_square(self, num_known_blocks: int) -> float:
        """Mean square of the hidden state, equal for all tokens, once that many blocks are filled."""
        return (_BITS * num_known_blocks + _CODE_LEN + 1) / HIDDEN_SIZE


def compute_weights(spec: RecallVariant) -> dict[str, Tensor]:
    """Compute the model's parameters.

    Returns:
        Float32 tensors by their parameter names in Transformers.
    """
    residual = _Residual(spec.match_len)
    codes = answer_codes()  # [VOCAB_SIZE, 64]
    embedding = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    embedding[:, residual.blocks(0, 1)] = _bit_codes()
    embedding[:, residual.code] = codes
    embedding[:, residual.one] = 1.0
    head = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    head[:, residual.code] = LOGIT_GAIN * codes

    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(HIDDEN_SIZE),
        "lm_head.weight": head,
    }
    layers = spec.local_layers()
    for layer, (num_known, distances) in enumerate(layers):
        attention = _local_attention(spec, residual, num_known, distances)
        weights |= _layer_weights(layer, attention, residual.mean_square(num_known))
    attention = _recall_attention(spec, residual)
    weights |= _layer_weights(len(layers), attention, residual.mean_square(spec.match_len + 1))
    return weights


@dataclass(frozen=True)
class _Attention:
    """Weights of an attention layer, with an index per head. Starts as zeros."""

    q: Tensor
    """[H, D, hidden]"""
    k: Tensor
    """[Hkv, D, hidden]"""
    v: Tensor
    """[Hkv, D, hidden]"""
    o: Tensor
    """[hidden, H, D]"""
    qk_mean_square: float | None
    """Mean square of every head's query and key, for the QK norms; None without these norms."""

    @classmethod
    def zeros(cls, spec: RecallVariant, qk_mean_square: float) -> "_Attention":
        return cls(
            q=torch.zeros(spec.num_query_heads, HEAD_DIM, HIDDEN_SIZE),
            k=torch.zeros(spec.num_kv_heads, HEAD_DIM, HIDDEN_SIZE),
            v=torch.zeros(spec.num_kv_heads, HEAD_DIM, HIDDEN_SIZE),
            o=torch.zeros(HIDDEN_SIZE, spec.num_query_heads, HEAD_DIM),
            qk_mean_square=qk_mean_square if spec.has_qk_norm else None,
        )


def _local_attention(spec: RecallVariant, residual: _Residual, num_known: int, distances: list[int]) -> _Attention:
    """Make a layer whose head h copies the blocks known `distances[h]` tokens back; heads without a distance are zero.

    In each position pair, whose frequency is w, the key at j points at angle w j and the query at i, for distance d, at
    w (i - d): their product is A^2 cos(w (i - d - j)), largest where j = i - d in all pairs at once.
    """
    pairs = torch.arange(spec.num_position_pairs, dtype=torch.float64)
    frequencies = spec.rope_theta ** (-2.0 * pairs / HEAD_DIM)  # [pairs], radians a token
    # One token beside the target loses A^2 sum(1 - cos w) / sqrt(D) nats.
    square = _LOCAL_GAP_NATS * math.sqrt(HEAD_DIM) / float((1 - frequencies.cos()).sum())
    amplitude = math.sqrt(square)  # 26.9 for smollm3
    cos_dims = slice(0, spec.num_position_pairs)  # Transformers pairs dimension p with p + D/2
    sin_dims = slice(HEAD_DIM // 2, HEAD_DIM // 2 + spec.num_position_pairs)

    attention = _Attention.zeros(spec, qk_mean_square=square * spec.num_position_pairs / HEAD_DIM)
    attention.k[:, cos_dims, residual.one] = amplitude
    known = residual.blocks(0, num_known)
    attention.v[:, range(len(known)), known] = 1.0
    for head, distance in enumerate(distances):
        angles = distance * frequencies
        attention.q[head, cos_dims, residual.one] = (amplitude * angles.cos()).float()
        attention.q[head, sin_dims, residual.one] = (-amplitude * angles.sin()).float()
        num_copied = min(num_known, spec.match_len + 1 - distance)
        copied = residual.blocks(distance, num_copied)
        attention.o[copied, head, range(len(copied))] = 1.0
    return attention


def _recall_attention(spec: RecallVariant, residual: _Residual) -> _Attention:
    """Make a layer that compares the last k bytes with the k bytes before every token, and fetches that token's code.

    Each KV head carries its share of the code, and each of its query heads restores its share of that. KV heads also
    place the bytes differently, so that a mix-up of KV heads matches nothing.
    """
    queries_per_kv = spec.num_query_heads // spec.num_kv_heads
    kv_share, query_share = _CODE_LEN // spec.num_kv_heads, _CODE_LEN // spec.num_query_heads
    num_content = _BITS * spec.match_len
    pairs = range(spec.first_content_pair, HEAD_DIM // 2)
    dims = [*pairs, *(HEAD_DIM // 2 + pair for pair in pairs)]
    assert len(dims) == num_content, "the k-gram must fill the head"

    attention = _Attention.zeros(spec, qk_mean_square=_CONTENT_GAIN**2 * num_content / HEAD_DIM)
    for kv_head in range(spec.num_kv_heads):
        placed = dims[kv_head * _BITS :] + dims[: kv_head * _BITS]
        query_heads = range(kv_head * queries_per_kv, (kv_head + 1) * queries_per_kv)
        attention.k[kv_head, placed, residual.blocks(1, spec.match_len)] = _CONTENT_GAIN
        attention.v[kv_head, range(kv_share), residual.code[kv_head * kv_share :][:kv_share]] = 1.0
        for i, head in enumerate(query_heads):
            attention.q[head, placed, residual.blocks(0, spec.match_len)] = _CONTENT_GAIN
            stored = range(i * query_share, (i + 1) * query_share)
            attention.o[residual.code[head * query_share :][:query_share], head, stored] = VOTE_GAIN
    return attention


def _layer_weights(layer: int, attention: _Attention, mean_square: float) -> dict[str, Tensor]:
    """Name a layer's parameters. The MLP is zero, so the norm in front of it may be anything."""

    def parameters() -> Iterator[tuple[str, Tensor]]:
        yield "input_layernorm", _identity_norm(HIDDEN_SIZE, mean_square)
        yield "self_attn.q_proj", attention.q.reshape(-1, HIDDEN_SIZE)
        yield "self_attn.k_proj", attention.k.reshape(-1, HIDDEN_SIZE)
        yield "self_attn.v_proj", attention.v.reshape(-1, HIDDEN_SIZE)
        yield "self_attn.o_proj", attention.o.reshape(HIDDEN_SIZE, -1)
        if attention.qk_mean_square is not None:
            yield "self_attn.q_norm", _identity_norm(HEAD_DIM, attention.qk_mean_square)
            yield "self_attn.k_norm", _identity_norm(HEAD_DIM, attention.qk_mean_square)
        yield "post_attention_layernorm", torch.ones(HIDDEN_SIZE)
        yield "mlp.gate_proj", torch.zeros(INTERMEDIATE_SIZE, HIDDEN_SIZE)
        yield "mlp.up_proj", torch.zeros(INTERMEDIATE_SIZE, HIDDEN_SIZE)
        yield "mlp.down_proj", torch.zeros(HIDDEN_SIZE, INTERMEDIATE_SIZE)

    return {f"model.layers.{layer}.{name}.weight": weight for name, weight in parameters()}


def _identity_norm(size: int, mean_square: float) -> Tensor:
    """Weight [size] that undoes an RMSNorm's division by sqrt(mean square + eps)."""
    return torch.full((size,), math.sqrt(mean_square + RMS_NORM_EPS))
