"""Binding of the compiled kernels in `layer.c`: a decoder layer around its attention.

Holds the layer as the kernels see it. Must not know Transformers, attention or when a kernel is worth calling.
Read next: `longspan.models.fused_layer`, which makes fused layers; `longspan.models.fused_layer_gemm`, which calls the
steps.
"""

import ctypes
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longspan.native import packed
from longspan.native.kernels import LANES, MAX_LINEAR_ROWS, library
from longspan.native.matrix import CMatrix, Matrix, c_matrix, is_taken
from longspan.native.packed import PackedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Weights of a layer: float32 or packed, contiguous, on the CPU; None for those that the layer lacks."""

    before_attention: Tensor
    """[hidden] scale of the norm before attention."""
    q: Matrix
    """[H * D, hidden]"""
    k: Matrix
    """[Hkv * D, hidden]"""
    v: Matrix
    """[Hkv * D, hidden]"""
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    q_norm: Tensor | None
    """[D] scale of the norm of each query head."""
    k_norm: Tensor | None
    o: Matrix
    """[hidden, H * D]"""
    o_bias: Tensor | None
    behind_attention: Tensor | None
    """[hidden] scale of the norm of the output projection's result."""
    before_mlp: Tensor
    gate: Matrix | None
    """[inner, hidden]; None, like `up` and `down`, where the MLP is computed elsewhere."""
    up: Matrix | None
    """[inner, hidden]"""
    down: Matrix | None
    """[hidden, inner]"""
    behind_mlp: Tensor | None


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_NUMBERS = ("hidden", "inner", "heads", "kv_heads", "width", "has_rope", "activation")


class _Layer(ctypes.Structure):
    """Layer as `layer.c` declares it."""

    _fields_ = [
        *((field.name, CMatrix if field.name in _MATRICES else ctypes.c_void_p) for field in fields(LayerWeights)),
        *((name, ctypes.c_long) for name in _NUMBERS),
        ("epsilon", ctypes.c_double),
        ("head_epsilon", ctypes.c_double),
    ]


ACTIVATIONS = ("silu", "gelu_tanh")
"""Activation functions, in the order of layer.c."""


class FusedLayer:
    """Layer that the kernels can run."""

    def __init__(
        self,
        weights: LayerWeights,
        *,
        width: int,
        has_rope: bool,
        activation: str,
        epsilon: float,
        head_epsilon: float,
    ) -> None:
        """Take a layer.

        Args:
            weights: the layer's weights, which this object keeps and which must not change.
            width: head size D.
            has_rope: whether queries and keys are rotated.
            activation: one of `ACTIVATIONS`.
            epsilon: epsilon of the norms over `hidden`.
            head_epsilon: epsilon of the norms per head.

            Raises:
            ValueError: the kernels are not available, or do not take this layer.
        """
        self.weights = weights  # the kernels have their addresses
        self.num_heads, self.num_kv_heads, self.width = weights.q.shape[0] // width, weights.k.shape[0] // width, width
        self.hidden = weights.before_attention.shape[0]
        self.inner = 0 if weights.gate is None else weights.gate.shape[0]
        self.max_rows = MAX_LINEAR_ROWS
        """Most rows that `before_attention` and `behind_attention` take."""
        found = library()
        if found is None or self.inner % LANES or any(size % LANES or not size for size in (self.hidden, width)):
            raise ValueError("no kernel for this layer")
        given: dict[str, CMatrix | int | None] = {}
        for field in fields(weights):
            weight: Matrix | None = getattr(weights, field.name)
            if isinstance(weight, PackedMatrix):
                self.max_rows = packed.MAX_ROWS
            if field.name in _MATRICES:
                given[field.name] = c_matrix(weight)
                continue
            assert not isinstance(weight, PackedMatrix)
            if weight is not None and not is_taken(weight):
                raise ValueError(f"no kernel for this layer: {field.name}")
            given[field.name] = None if weight is None else weight.data_ptr()
        self._layer = _Layer(
            **given,
            hidden=self.hidden,
            inner=self.inner,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            width=width,
            has_rope=has_rope,
            activation=ACTIVATIONS.index(activation),
            epsilon=epsilon,
            head_epsilon=head_epsilon,
        )
        self._address = ctypes.addressof(self._layer)
        self._before, self._behind = found.longspan_before_attention, found.longspan_behind_attention
        self._project = found.longspan_project_attention
        self._norm, self._finish = found.longspan_norm_rows, found.longspan_finish_rows
        self._add_attention, self._add_mlp = found.longspan_add_attention_rows, found.longspan_add_mlp_rows
        self._gate = found.longspan_gate_rows

    def takes(self, num_rows: int) -> bool:
        """Whether the kernels take this number of rows."""
        return 1 <= num_rows <= self.max_rows

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute norm, projections and rotary embedding.

        Args:
            x: [T, hidden] float32, contiguous; 1 <= T <= max_rows.
            cos: [T, D] float32, contiguous.
            sin: [T, D] float32, contiguous.

        Returns:
            q [T, H, D], k [Hkv, T, D], v [Hkv, T, D].
        """
        num_rows = x.shape[0]
        q = torch.empty(num_rows, self.num_heads, self.width)
        k = torch.empty(self.num_kv_heads, num_rows, self.width)
        v = torch.empty(self.num_kv_heads, num_rows, self.width)
        scratch = torch.empty(num_rows * (self.hidden + (self.num_heads + 2 * self.num_kv_heads) * self.width))
        status = self._before(
            *(self._address, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), num_rows, torch.get_num_threads()),
            *(scratch.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()),
        )
        assert status == 0, f"layer kernel refused {num_rows} rows"
        return q, k, v

    def behind_attention(self, attended: Tensor, x: Tensor) -> Tensor:
        """Compute output projection and MLP, each with its residual; the layer has the MLP's weights.

        Args:
            attended: [T, H, D] float32, contiguous.
            x: [T, hidden] input of the layer, as in `before_attention`.

        Returns:
            [T, hidden].
        """
        num_rows = x.shape[0]
        y = torch.empty(num_rows, self.hidden)
        scratch = torch.empty(2 * num_rows * (self.hidden + self.inner))
        status = self._behind(
            *(self._address, attended.data_ptr(), x.data_ptr(), num_rows, torch.get_num_threads()),
            *(scratch.data_ptr(), y.data_ptr()),
        )
        assert status == 0, f"layer kernel refused {num_rows} rows"
        return y

    def project_attention(self, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the output projection with its residual, and the norm of the sum.

        Args:
            attended: [T, H, D] float32, contiguous.
            x: [T, hidden] input of the layer, as in `before_attention`.

        Returns:
            The sum [T, hidden], and the MLP's input [T, hidden].
        """
        added, normed = torch.empty_like(x), torch.empty_like(x)
        self._done(
            self._project(
                *(self._address, attended.data_ptr(), x.data_ptr(), *self._rows_of(x)),
                *(added.data_ptr(), normed.data_ptr()),
            )
        )
        return added, normed

    # The steps between the products of many rows. All tensors are float32 and contiguous, and T is at least 1.

    def norm(self, x: Tensor) -> Tensor:
        """Compute the norm before attention, [T, hidden], of the layer's input `x` [T, hidden]."""
        normed = torch.empty_like(x)
        self._done(self._norm(self._address, x.data_ptr(), *self._rows_of(x), normed.data_ptr()))
        return normed

    def finish_heads(
        self, products: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Apply bias, norm and rotary embedding to queries and keys, and bias to values.

        Args:
            products: products of the rows with q [T, H * D], k [T, Hkv * D] and v [T, Hkv * D].
            cos: [T, D].
            sin: [T, D].
            q: [T, H, D], written.
            k: [Hkv, T, D], written; each head contiguous.
            v: [Hkv, T, D], written; with k's strides.
        """
        assert k.stride() == v.stride(), "one stride for keys and values"
        inputs = (tensor.data_ptr() for tensor in (*products, cos, sin))
        outputs = (tensor.data_ptr() for tensor in (q, k, v))
        self._done(self._finish(self._address, *inputs, *self._rows_of(q), *outputs, k.stride(0)))

    def add_attention_(self, projected: Tensor, x: Tensor) -> Tensor:
        """Add the output projection's result to the layer's input.

        Args:
            projected: [T, hidden], the output projection's product; becomes the sum.
            x: [T, hidden], the layer's input.

        Returns:
            [T, hidden], the MLP's input: the norm of the sum.
        """
        normed = torch.empty_like(x)
        addresses = (projected.data_ptr(), normed.data_ptr())
        self._done(self._add_attention(self._address, x.data_ptr(), *self._rows_of(x), *addresses))
        return normed

    def gate_(self, gate: Tensor, up: Tensor) -> None:
        """Compute `activation(gate) * up` of the MLP's products, both [T, inner], into `gate`."""
        self._done(self._gate(self._address, up.data_ptr(), *self._rows_of(gate), gate.data_ptr()))

    def add_mlp(self, mlp: Tensor, added: Tensor, y: Tensor) -> None:
        """Write the layer's output.

        Args:
            mlp: [T, hidden], the MLP's last product.
            added: [T, hidden], the sum that `add_attention_` left.
            y: [T, hidden], written.
        """
        addresses = (mlp.data_ptr(), added.data_ptr())
        self._done(self._add_mlp(self._address, *addresses, *self._rows_of(y), y.data_ptr()))

    @staticmethod
    def _rows_of(tensor: Tensor) -> tuple[int, int]:
        return tensor.shape[0], torch.get_num_threads()

    @staticmethod
    def _done(status: int) -> None:
        assert status == 0, "layer kernel refused its rows"
