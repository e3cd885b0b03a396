"""vLLM's model in one process: the shape of its attention layers, and its run on this rank's rows.

Holds the loaded module. Must not know requests, vLLM's scheduler, or which rows are read.
Read next: `longspan.integrations.vllm.backend`, which its layers use; `longspan.cp.step`.

Note [What is patched]
    `torch.accelerator.empty_cache`, which vLLM's loader calls and a CPU lacks, does nothing while a model is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.kv_cache_interface import FullAttentionSpec

from longspan.attention.base import AttentionBackend
from longspan.attention.check import check_against_reference
from longspan.attention.select import make_backend
from longspan.cp.step import StepAttention
from longspan.errors import ConfigError, LongspanError, UnsupportedModelError
from longspan.integrations.vllm.backend import StepMetadata, WarmUp, attention_layers
from longspan.integrations.vllm.placement import Striping
from longspan.integrations.vllm.spec import PlacedSpec
from longspan.kv.layout import KVGroup, KVSpec
from longspan.native.heap import keep_freed_memory
from longspan.plan.types import Literals, Plan
from longspan.types import AttentionParams


class RankModel:
    """Model of one process, with its tensor parallel part of every head."""

    def __init__(self, module: torch.nn.Module, layers: dict[str, Any], vllm_config: Any, device: torch.device) -> None:
        """Take a loaded model over.

        Args:
            module: the model.
            layers: attention layers by name, in the order in which the model runs them.
            vllm_config: vLLM's configuration.
            device: where the model lies.

        Raises:
            ConfigError: the layers differ in heads or widths.
        """
        self.module, self.device = module, device
        self._config, self._layers = vllm_config, layers
        self._index_of_layer = {name: i for i, name in enumerate(layers)}
        shapes = {(a.num_heads, a.num_kv_heads, a.head_size, a.head_size_v) for a in layers.values()}
        if len(shapes) != 1:
            raise ConfigError("model: its attention layers differ in heads or widths, which longspan does not support")
        ((num_heads, num_kv_heads, k_width, v_width),) = shapes
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        self.group = KVGroup(
            tuple(range(len(layers))), KVSpec.uniform(num_kv_heads, k_width, v_width, dtype), num_heads
        )
        self.layer_params = tuple(AttentionParams(a.impl.scale, a.impl.logits_soft_cap) for a in layers.values())

    def kv_cache_spec(self, striping: Striping) -> dict[str, PlacedSpec]:
        """Return what vLLM's block manager must know of every layer.

        Raises:
            UnsupportedModelError: a layer asks for more than plain full attention.
        """
        layout = self.group.spec.layout
        fields = {
            "block_size": self._config.cache_config.block_size,
            "num_kv_heads": layout.num_kv_heads,
            "head_size": layout.k_width,
            "head_size_v": layout.v_width,
            "dtype": self._config.model_config.dtype,
        }
        plain = FullAttentionSpec(**fields)
        for name, layer in self._layers.items():
            own = layer.get_kv_cache_spec(self._config)
            if own != plain:
                raise UnsupportedModelError(f"model: layer {name} needs {own}, legal with longspan in vLLM is {plain}")
        return dict.fromkeys(self._layers, PlacedSpec(**fields, striping=striping))

    def make_attention(self) -> AttentionBackend:
        """Make the attention backend of this process.

        Raises:
            LongspanError: a GPU's kernels differ from the reference, or vLLM has none for this model.
        """
        if self.device.type == "cpu":
            return make_backend("auto", self.device)
        from longspan.integrations.vllm.flash import make_flash_backend

        with set_current_vllm_config(self._config):
            backend = make_flash_backend(self.group.spec, any(params.softcap for params in self.layer_params))
        for params in set(self.layer_params):
            check_against_reference(backend, self.group, params, self.device)
        return backend

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Let vLLM compile the model, if allowed, with as many rows as a rank can get in a step.

        Collective: the processes of one rank, once.
        """
        if self._config.compilation_config.mode == CompilationMode.NONE and self.device.type == "cpu":
            return  # a GPU runs it also to learn how much memory it takes
        with _no_accelerator_cache(self.device):
            # Position 0 for all: a model may have fewer positions than a step may have tokens.
            positions = torch.zeros(num_tokens, dtype=torch.int64)
            self._run(WarmUp(), torch.zeros(num_tokens, dtype=torch.int32), positions)

    def forward(self, plan: Plan, attention: StepAttention) -> Tensor:
        """Return the hidden states of this rank's rows, [T, hidden]; rows that the plan does not read hold any values.

        Collective: every process of the plan's ranks, with the same plan.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        for run in plan.query_runs:
            if run.compute_rank == attention.rank:
                assert isinstance(run.tokens, Literals), "vLLM's schedule names tokens that are known"
                token_ids += run.tokens.token_ids
                positions += range(run.position, run.end)
        if not token_ids:
            if any(group_step.nodes for group_step in plan.groups):
                for layer in self.group.layers:
                    attention.join(layer)
            config = self._config.model_config
            return torch.empty((0, config.get_hidden_size()), dtype=config.dtype, device=self.device)
        metadata = StepMetadata(attention, self._index_of_layer)
        return self._run(metadata, torch.tensor(token_ids, dtype=torch.int32), torch.tensor(positions))

    def _run(self, metadata: StepMetadata | WarmUp, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return hidden states [T, hidden] of `token_ids` [T] int32 at `positions` [T] int64; T is not 0."""
        with set_forward_context(metadata, self._config, num_tokens=len(token_ids), slot_mapping={}):
            hidden: Tensor = self.module(input_ids=token_ids.to(self.device), positions=positions.to(self.device))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, vocab] of hidden states [n, hidden].

        Collective: the processes of one rank.
        """
        logits: Tensor | None = self.module.compute_logits(hidden)  # type: ignore[operator]
        if logits is None:
            raise LongspanError("vLLM gathers logits on one tensor parallel rank, which longspan does not support")
        return logits


def load_rank_model(vllm_config: Any, device: torch.device) -> RankModel:
    """Load the model that vLLM is configured for.

    Raises:
        ConfigError: the model's layers differ in heads or widths.
        UnsupportedModelError: a layer is not vLLM's plain attention.
    """
    with set_current_vllm_config(vllm_config), _no_accelerator_cache(device):
        module = get_model(vllm_config=vllm_config)
    keep_freed_memory()
    layers = attention_layers(vllm_config.compilation_config.static_forward_context)
    return RankModel(module, layers, vllm_config, device)


@contextmanager
def _no_accelerator_cache(device: torch.device) -> Iterator[None]:
    """On a CPU, let `torch.accelerator.empty_cache` do nothing inside the block."""
    if device.type != "cpu":
        yield
        return
    original = torch.accelerator.empty_cache
    torch.accelerator.empty_cache = lambda: None
    try:
        yield
    finally:
        torch.accelerator.empty_cache = original
