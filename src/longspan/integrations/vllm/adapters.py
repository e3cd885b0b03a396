"""LoRA adapters in one process: vLLM's layers and its cache of adapters.

Holds which adapter each row of a forward, or of logits, takes. Must not know requests, plans or ranks.
Read next: `longspan.integrations.vllm.rank_model`; `vllm.lora.worker_manager`.

Note [Rows without an adapter]
    vLLM gives them slot -1. Its operators for CPUs take that for the last slot (0.32), which is right only while that
    slot is empty. So there is one slot more than the user asked for, with an adapter of zeros that nothing evicts, and
    rows without an adapter take that one wherever another row has one: x + 0 is x.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

ZEROS = LoRARequest("longspan-zeros", 2**31 - 1, "none")
"""The adapter of rows without one."""


class Adapters:
    """Adapters of a model. All processes load the same, in the same order."""

    def __init__(self, module: Any, vllm_config: Any, device: torch.device, max_logits: int) -> None:
        """Give a model's layers slots for adapters.

        Args:
            module: the model.
            vllm_config: vLLM's configuration, with `lora_config`.
            device: where the model lies.
            max_logits: most rows of logits at once, if more than `max_num_seqs`.
        """
        config = copy.copy(vllm_config)
        config.lora_config, config.scheduler_config = copy.copy(config.lora_config), copy.copy(config.scheduler_config)
        config.lora_config.max_loras += 1
        config.lora_config.max_cpu_loras += 1
        config.scheduler_config.max_num_seqs = max(config.scheduler_config.max_num_seqs, max_logits)
        self._manager = LRUCacheWorkerLoRAManager(config, device, module.embedding_modules)
        self._manager.create_lora_manager(module, config)
        self._manager.add_dummy_lora(ZEROS, rank=1)
        self._manager.pin_adapter(ZEROS.lora_int_id)

    def load(self, requests: Iterable[LoRARequest]) -> None:
        """Load the adapters of a step.

        Collective: every process, with the same adapters, so that a file that cannot be read fails in all.
        """
        self._manager.set_active_adapters(set(requests), None)

    def select(self, adapter_ids: Sequence[int]) -> None:
        """Name the adapter of every row of the next forward, 0 for none; all are loaded."""
        if any(adapter_ids):
            adapter_ids = [adapter_id or ZEROS.lora_int_id for adapter_id in adapter_ids]
        self._map(adapter_ids, adapter_ids[:1])

    def select_for_logits(self, adapter_ids: Sequence[int]) -> None:
        """Name the adapter of every row of the next logits, as `select`."""
        adapter_ids = [adapter_id or ZEROS.lora_int_id for adapter_id in adapter_ids]
        self._map(adapter_ids[:1], adapter_ids)

    def _map(self, rows: Sequence[int], logits: Sequence[int]) -> None:
        self._manager.set_active_adapters(set(), LoRAMapping(tuple(rows), tuple(logits), is_prefill=True))

    def add(self, request: LoRARequest) -> bool:
        """Load an adapter ahead of requests. Returns whether it was loaded."""
        return bool(self._manager.add_adapter(request))

    def remove(self, adapter_id: int) -> bool:
        """Forget an adapter. Returns whether it was there."""
        return bool(self._manager.remove_adapter(adapter_id))

    def pin(self, adapter_id: int) -> bool:
        """Never evict an adapter."""
        return bool(self._manager.pin_adapter(adapter_id))

    def ids(self) -> set[int]:
        """Ids of loaded adapters."""
        return set(self._manager.list_adapters()) - {ZEROS.lora_int_id}
