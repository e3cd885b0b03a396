"""Layout of what a token caches: components, their dtypes, and every number of bytes that follows from them.

Holds frozen data and arithmetic; all of it can travel between driver and workers. Must not know torch, page tables,
ranks or models; of pages it knows the bytes alone.
Read next: `longspan.kv.pool`, which makes tensors of a layout; `longspan.sharding.capacity`, which makes pages of
memory.

Note [Dtypes]
    Five things have a dtype, and each is said in one place:

    stored elements       `KVComponent.dtype`, per component
    their scales          `KVComponent.scale_dtype`
    queries and kernels   `KVSpec.compute_dtype`
    queries on the wire   `KVGroup.wire_dtype`; keys and values travel as they are stored
    partials on the wire  `KVGroup.partial_dtype`

    They are one dtype (`KVSpec.uniform`), except partials where the user wants float32, and stored elements where the
    user wants smaller ones: these are rounded once, when they are written (`longspan.kv.stored`).

Note [Latents]
    Multi-head latent attention caches one latent c of `rank` elements per token, and a part r that carries the
    position. Every head has projections of its own: its key is (W_k c, r), its value W_v c. Neither need be computed:

        q . (W_k c, r) = (W_k^T q, q_r) . (c, r)          sum_s p_s W_v c_s = W_v (sum_s p_s c_s)

    So what is stored, and sent, is one key (c, r) of one head, whose first elements are the value. Queries and outputs
    of a layer keep their own widths, on the wire too: whoever has the keys projects. For many queries per key it is
    fewer flops to expand keys and values of the heads. DeepSeek V3, elements of one head:

        stored     keys 576 = 512 + 64, values 512 of them       1088 products a pair
        heads      queries 192 = 128 + 64, outputs 128            320 products a pair, 512 * (128 + 128) a key

    131,072 / (1088 - 320) = 171 queries per key take as many products either way. What is expanded is also written to
    memory, which counts (EXPANSION_WEIGHT), so that keys are expanded from 239 queries on
    (`KVSpec.min_expanded_queries`).
    Source: DeepSeek-V2, 2405.04434 section 2.1.
"""

from collections.abc import Iterable
from functools import cached_property
from math import inf
from typing import Literal

import msgspec

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
"""Bytes of one element."""

STORED_DTYPES = {"fp8_e4m3": "float8_e4m3fn"}
"""PyTorch's names of values of the option `kv_cache_dtype`, where they are others."""

SCALED_DTYPES = ("int8", "float8_e4m3fn")
"""Dtypes of stored elements that have a scale, in float32, for each head of each token."""

EXPANSION_WEIGHT = 1.4
"""Time of an expansion's flop, which also writes keys and values, in flops of attention. Measured on one core with
512-bit registers: 16 heads of DeepSeek V2 Lite over 4,096 keys take 242 ms absorbed and 230 ms expanded at 256 queries,
159 and 196 at 170."""


class KVComponent(msgspec.Struct, frozen=True):
    """One tensor that a layer caches: a row per token, for each head."""

    role: Literal["k", "v"]
    """Role in attention: keys or values."""
    num_heads: int
    width: int
    """Elements of one head."""
    dtype: str
    """Name of the torch dtype in which elements are stored."""
    scale_dtype: str | None = None
    """Dtype of the scale that each head of each token has beside its elements; None if there are no scales."""

    @property
    def stored_width(self) -> int:
        """Elements that one head of one token takes in memory: its own, and its scale's bytes behind them."""
        scale_bytes = 0 if self.scale_dtype is None else DTYPE_BYTES[self.scale_dtype]
        return self.width + scale_bytes // DTYPE_BYTES[self.dtype]

    @property
    def token_elements(self) -> int:
        """Elements of one token in one layer, scales not counted."""
        return self.num_heads * self.width

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, scales included."""
        scale_bytes = 0 if self.scale_dtype is None else DTYPE_BYTES[self.scale_dtype]
        return self.num_heads * (self.width * DTYPE_BYTES[self.dtype] + scale_bytes)


class KVLayout(msgspec.Struct, frozen=True, dict=True):
    """Layout of the KV that one layer caches per token."""

    components: tuple[KVComponent, ...]
    """Stored tensors, in the order of pools and messages: keys, then values if they are stored."""
    v_width_in_k: int | None = None
    """Width of a value that is the first elements of its key and is not stored again; None where `v` is stored."""

    def __post_init__(self) -> None:
        roles = tuple(component.role for component in self.components)
        if roles != (("k", "v") if self.v_width_in_k is None else ("k",)):
            raise ValueError(f"components: got {roles} with values of {self.v_width_in_k} elements inside of keys")
        if len({component.num_heads for component in self.components}) != 1:
            raise ValueError("components: got different numbers of heads, legal is one number")
        if self.v_width_in_k is not None and self.v_width_in_k > self.k_width:
            raise ValueError(f"v_width_in_k: got {self.v_width_in_k}, legal is at most the key's {self.k_width}")

    @property
    def num_kv_heads(self) -> int:
        """Heads of every component."""
        return self.components[0].num_heads

    @property
    def k_width(self) -> int:
        """Elements of one key head, and of one query head that meets it."""
        return self.components[0].width

    @property
    def v_width(self) -> int:
        """Elements of one value head, and of one output head before it is projected."""
        return self.components[1].width if self.v_width_in_k is None else self.v_width_in_k

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Distinct dtypes of stored elements."""
        return tuple(dict.fromkeys(component.dtype for component in self.components))

    @cached_property
    def token_elements(self) -> int:
        """Stored elements of one token in one layer, scales not counted."""
        return sum(component.token_elements for component in self.components)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, in a pool and in a message alike."""
        return sum(component.token_bytes for component in self.components)

    @cached_property
    def stored_elements(self) -> int:
        """Elements that one token takes in one layer, in a pool and in a message alike, scales included."""
        return sum(component.num_heads * component.stored_width for component in self.components)

    def stored_as(self, dtype: str) -> "KVLayout":
        """This layout with elements in another dtype, and scales where that has them."""
        scale = "float32" if dtype in SCALED_DTYPES else None
        components = [
            msgspec.structs.replace(component, dtype=dtype, scale_dtype=scale) for component in self.components
        ]
        return msgspec.structs.replace(self, components=tuple(components))

    def with_kv_heads(self, num_kv_heads: int) -> "KVLayout":
        """This layout with another number of KV heads."""
        components = [msgspec.structs.replace(component, num_heads=num_kv_heads) for component in self.components]
        return msgspec.structs.replace(self, components=tuple(components))


class LatentWidths(msgspec.Struct, frozen=True):
    """Widths of one head outside of the latent space. See Note [Latents]."""

    q_width: int
    """Elements of one query head, and of one key head if it is expanded."""
    out_width: int
    """Elements of one output head, and of one value head if it is expanded."""


class KVSpec(msgspec.Struct, frozen=True):
    """Facts of one layer's attention: KV layout, compute dtype, which earlier keys a query sees, and projections."""

    layout: KVLayout
    compute_dtype: str
    """Name of the torch dtype of queries and outputs, in which kernels compute."""
    window: int | None = None
    """Sliding window in tokens (a query's own position counts), or None."""
    chunk: int | None = None
    """Tokens of a chunk: a query sees the keys of its own chunk alone, chunks being cut at multiples of this; or None.
    A layer has a window, chunks, or full attention."""
    latent: LatentWidths | None = None
    """Widths of heads that project what is stored; None where keys and values are those of the heads."""

    def __post_init__(self) -> None:
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"chunk: got {self.chunk} with a window of {self.window}, legal is one of them")

    def stored_as(self, dtype: str) -> "KVSpec":
        """Return this spec with keys and values stored in a dtype, computed with as before."""
        return msgspec.structs.replace(self, layout=self.layout.stored_as(dtype))

    @property
    def reach(self) -> int | None:
        """Most keys that a query sees; None where it sees all keys before it."""
        return self.window if self.chunk is None else self.chunk

    def first_key(self, position: int) -> int:
        """First position whose key a query at `position` sees. It never falls as `position` rises."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def num_pairs(self, start: int, end: int) -> int:
        """Pairs of a query at a position in `[start, end)` and a key that it sees."""
        return self._pairs_before(end) - self._pairs_before(start)

    def _pairs_before(self, end: int) -> int:
        if self.chunk is not None:
            whole, rest = divmod(end, self.chunk)
            return (whole * self.chunk * (self.chunk + 1) + rest * (rest + 1)) // 2
        growing = end if self.window is None else min(end, self.window)  # queries that see all keys before them
        return growing * (growing + 1) // 2 + (end - growing) * (self.window or 0)

    @property
    def q_width(self) -> int:
        """Elements of one query head, as a layer hands it over and as it travels."""
        return self.layout.k_width if self.latent is None else self.latent.q_width

    @property
    def out_width(self) -> int:
        """Elements of one output head, as a layer gets it and as partials travel."""
        return self.layout.v_width if self.latent is None else self.latent.out_width

    @property
    def head_expansion_flops(self) -> float:
        """Flops that expand one head's key and value from a latent, weighted; 0 without latents."""
        if self.latent is None:
            return 0.0
        rotated = self.layout.k_width - self.layout.v_width
        return EXPANSION_WEIGHT * 2.0 * self.layout.v_width * (self.latent.q_width - rotated + self.latent.out_width)

    @property
    def min_expanded_queries(self) -> float:
        """Queries per key from which it is faster to expand a key than to project queries; infinite if it never is."""
        saved = 2.0 * (self.layout.k_width + self.layout.v_width - self.q_width - self.out_width)
        return self.head_expansion_flops / saved if saved > 0 else inf

    @classmethod
    def uniform(
        cls,
        num_kv_heads: int,
        k_width: int,
        v_width: int,
        dtype: str,
        window: int | None = None,
        chunk: int | None = None,
    ) -> "KVSpec":
        """Spec of keys and values that are stored, computed with and sent in one dtype, as in all models of today.

        Args:
            num_kv_heads: heads of keys and of values.
            k_width: elements of one key head.
            v_width: elements of one value head.
            dtype: name of a torch dtype.
            window: sliding window in tokens, or None.
            chunk: tokens of a chunk, or None.
        """
        k, v = KVComponent("k", num_kv_heads, k_width, dtype), KVComponent("v", num_kv_heads, v_width, dtype)
        return cls(KVLayout((k, v)), dtype, window, chunk)

    @classmethod
    def latents(cls, rank: int, rotated: int, q_width: int, out_width: int, dtype: str) -> "KVSpec":
        """Spec of latents that are stored once, for all heads. See Note [Latents].

        Args:
            rank: elements of a latent.
            rotated: elements beside it that carry the position.
            q_width: elements of one query head.
            out_width: elements of one output head.
            dtype: name of a torch dtype.
        """
        layout = KVLayout((KVComponent("k", 1, rank + rotated, dtype),), v_width_in_k=rank)
        return cls(layout, dtype, latent=LatentWidths(q_width, out_width))


class KVGroup(msgspec.Struct, frozen=True, dict=True):
    """Layers that share one spec and number of query heads, hence one page table and one pool per rank."""

    layers: tuple[int, ...]
    """Layer indices of the model, ascending."""
    spec: KVSpec
    num_query_heads: int
    float32_partials: bool = False
    """Whether partials travel in float32, whatever the dtype of queries."""

    @property
    def wire_dtype(self) -> str:
        """Dtype in which queries travel. See Note [Dtypes]."""
        return self.spec.compute_dtype

    @property
    def partial_dtype(self) -> str:
        """Dtype of a partial's `out` on the wire."""
        return "float32" if self.float32_partials else self.wire_dtype

    @cached_property
    def token_bytes(self) -> int:
        """Bytes that one token takes in all layers of the group."""
        return len(self.layers) * self.spec.layout.token_bytes

    def page_bytes(self, page_size: int) -> int:
        """Bytes that one page of `page_size` tokens takes in all layers of the group."""
        return page_size * self.token_bytes

    @property
    def query_elements(self) -> int:
        """Elements of one token's queries in one layer."""
        return self.num_query_heads * self.spec.q_width

    @cached_property
    def query_row_bytes(self) -> int:
        """Bytes on the wire of one token's queries in one layer."""
        return self.query_elements * DTYPE_BYTES[self.wire_dtype]

    @cached_property
    def merged_row_bytes(self) -> int:
        """Bytes of one token's `out` in one layer while partials are merged, in `accumulation_dtype` of the compute
        dtype (`longspan.attention.partial`)."""
        return self.num_query_heads * self.spec.out_width * max(4, DTYPE_BYTES[self.spec.compute_dtype])

    def pair_flops(self, num_queries: float = 1) -> float:
        """Flops of one token's queries over one key in one layer: two per element of the key and of the value.

        Args:
            num_queries: tokens whose queries meet the key together; only where latents are expanded for many of them
                the result depends on it.
        """
        spec = self.spec
        if num_queries < spec.min_expanded_queries:
            return 2.0 * self.num_query_heads * (spec.layout.k_width + spec.layout.v_width)
        return self.num_query_heads * (2.0 * (spec.q_width + spec.out_width) + spec.head_expansion_flops / num_queries)

    @cached_property
    def expanded(self) -> "KVGroup":
        """This group as kernels see it where latents are expanded: each head with a key and a value of its own."""
        heads, spec = self.num_query_heads, self.spec
        uniform = KVSpec.uniform(heads, spec.q_width, spec.out_width, spec.compute_dtype, spec.window, spec.chunk)
        return KVGroup(self.layers, uniform, heads, self.float32_partials)


def stored_as(groups: Iterable[KVGroup], kv_cache_dtype: str) -> tuple[KVGroup, ...]:
    """Return groups with keys and values stored as the option `kv_cache_dtype` says."""
    if kv_cache_dtype == "auto":
        return tuple(groups)
    dtype = STORED_DTYPES.get(kv_cache_dtype, kv_cache_dtype)
    return tuple(msgspec.structs.replace(group, spec=group.spec.stored_as(dtype)) for group in groups)
