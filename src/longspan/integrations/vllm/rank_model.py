"""vLLM's model in one process: its attention layers together, and its run on this rank's rows.

Holds the loaded module. Must not know requests, vLLM's scheduler, or which rows are read.
Read next: `longspan.integrations.vllm.backend`, which its layers use; `longspan.cp.step`.

Note [What is patched]
    `torch.accelerator.empty_cache`, which vLLM's loader calls and a CPU lacks, does nothing while a model is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.kv_cache_interface import KVCacheSpec

from longspan.cp.step import StepAttention
from longspan.errors import ConfigError, LongspanError
from longspan.integrations.vllm.adapters import Adapters
from longspan.integrations.vllm.backend import StepMetadata, WarmUp
from longspan.integrations.vllm.groups import LayerGroups, divide_layers
from longspan.integrations.vllm.layers import (
    CLASSES,
    check_kv_cache_spec,
    layer_params,
    layer_spec,
)
from longspan.integrations.vllm.placement import Striping
from longspan.integrations.vllm.plain_attention import attention_layers
from longspan.integrations.vllm.spec import place
from longspan.native.heap import keep_freed_memory
from longspan.plan.types import Literals, Plan


class RankModel:
    """Model of one process, with its tensor parallel part of every head."""

    def __init__(
        self, module: torch.nn.Module, layers: dict[str, Any], vllm_config: Any, adapters: Adapters | None = None
    ) -> None:
        """Take a loaded model over.

        Args:
            module: the model.
            layers: attention layers by name, in the order in which the model runs them.
            vllm_config: vLLM's configuration.
            adapters: the model's LoRA adapters; None without LoRA.

        Raises:
            ConfigError: the layers differ in heads or widths.
        """
        self.module, self.adapters = module, adapters
        self._config, self._layers = vllm_config, layers
        self._index_of_layer = {name: i for i, name in enumerate(layers)}
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        self.specs = tuple(layer_spec(layer, dtype) for layer in layers.values())
        """Spec of every layer."""
        shapes = {(layer.num_heads, spec.layout) for layer, spec in zip(layers.values(), self.specs, strict=True)}
        if len(shapes) != 1:
            raise ConfigError("model: its attention layers differ in heads or widths, which longspan does not support")
        ((self._num_heads, _),) = shapes
        self.layer_params = tuple(map(layer_params, layers.values()))

    def kv_cache_spec(self, striping: Striping) -> dict[str, KVCacheSpec]:
        """Return what vLLM's block manager must know of every layer.

        Raises:
            UnsupportedModelError: a layer asks for more than we know.
        """
        # vLLM can give layers with a window block tables of their own, and frees blocks behind the window then.
        has_tables = not self._config.scheduler_config.disable_hybrid_kv_cache_manager
        is_mixed = has_tables and len({spec.window for spec in self.specs}) > 1
        spare = striping.geometry.num_ranks if is_mixed else 0
        placed: dict[str, KVCacheSpec] = {}
        for (name, layer), spec in zip(self._layers.items(), self.specs, strict=True):
            own = check_kv_cache_spec(name, layer, spec, self._config)
            placed[name] = place(own, striping, spare, is_freed=has_tables)
        return placed

    def page_bytes(self, block_size: int) -> int:
        """Return the bytes of one block's tokens in all layers."""
        return block_size * sum(spec.layout.token_bytes for spec in self.specs)

    def groups(self, tables: Sequence[Sequence[str]]) -> LayerGroups:
        """Return the KV groups of the model.

        Args:
            tables: names of the layers of each of vLLM's block tables.
        """
        indices = [[self._index_of_layer[name] for name in names] for names in tables]
        return divide_layers(self.specs, self._num_heads, indices)

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Let vLLM compile the model, if allowed, with as many rows as a rank can get in a step.

        Collective: the processes of one rank, once.
        """
        if self._config.compilation_config.mode == CompilationMode.NONE:
            return
        with _no_accelerator_cache():
            # Position 0 for all: a model may have fewer positions than a step may have tokens.
            positions = torch.zeros(num_tokens, dtype=torch.int64)
            self._run(WarmUp(), torch.zeros(num_tokens, dtype=torch.int32), positions)

    def forward(self, plan: Plan, attention: StepAttention, adapter_of: Mapping[int, int]) -> Tensor:
        """Return the hidden states of this rank's rows, [T, hidden]; rows that the plan does not read hold any values.

        Args:
            plan: the step.
            attention: the step's attention on this rank.
            adapter_of: LoRA adapter by the request's number in the plan, 0 for none; not read without LoRA.

        Collective: every process of the plan's ranks, with the same plan.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        adapter_ids: list[int] = []
        for run in plan.query_runs:
            if run.compute_rank == attention.rank:
                assert isinstance(run.tokens, Literals), "vLLM's schedule names tokens that are known"
                token_ids += run.tokens.token_ids
                positions += range(run.position, run.end)
                adapter_ids += [adapter_of[run.request_id]] * run.num_tokens
        if not token_ids:
            if any(group_step.nodes for group_step in plan.groups):
                for layer in range(len(self.specs)):
                    attention.join(layer)
            config = self._config.model_config
            return torch.empty((0, config.get_hidden_size()), dtype=config.dtype)
        if self.adapters is not None:
            self.adapters.select(adapter_ids)
        metadata = StepMetadata(attention, self._index_of_layer)
        return self._run(metadata, torch.tensor(token_ids, dtype=torch.int32), torch.tensor(positions))

    def _run(self, metadata: StepMetadata | WarmUp, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return hidden states [T, hidden] of `token_ids` [T] int32 at `positions` [T] int64; T is not 0."""
        with set_forward_context(metadata, self._config, num_tokens=len(token_ids), slot_mapping={}):
            hidden: Tensor = self.module(input_ids=token_ids, positions=positions)
        return hidden

    def logits(self, hidden: Tensor, adapter_ids: Sequence[int]) -> Tensor:
        """Return logits [n, vocab] of hidden states [n, hidden], with a LoRA adapter per row, 0 for none.

        Collective: the processes of one rank.
        """
        if self.adapters is not None:
            self.adapters.select_for_logits(adapter_ids)
        logits: Tensor | None = self.module.compute_logits(hidden)  # type: ignore[operator]
        if logits is None:
            raise LongspanError("vLLM gathers logits on one tensor parallel rank, which longspan does not support")
        return logits


def load_rank_model(vllm_config: Any, device: torch.device, max_logits: int) -> RankModel:
    """Load the model that vLLM is configured for.

    Args:
        vllm_config: vLLM's configuration.
        device: where the model lies.
        max_logits: most rows that the caller asks logits of at once, if more than `max_num_seqs`.

    Raises:
        ConfigError: the model's layers differ in heads or widths.
        UnsupportedModelError: a layer is not vLLM's plain attention.
    """
    with set_current_vllm_config(vllm_config), _no_accelerator_cache():
        module = get_model(vllm_config=vllm_config)
    keep_freed_memory()
    adapters = None if vllm_config.lora_config is None else Adapters(module, vllm_config, device, max_logits)
    layers = attention_layers(vllm_config.compilation_config.static_forward_context, CLASSES)
    return RankModel(module, layers, vllm_config, adapters)


@contextmanager
def _no_accelerator_cache() -> Iterator[None]:
    """Let `torch.accelerator.empty_cache` do nothing inside the block."""
    original = torch.accelerator.empty_cache
    torch.accelerator.empty_cache = lambda: None
    try:
        yield
    finally:
        torch.accelerator.empty_cache = original
