"""LoRA adapters of one process: which are loaded, and which rows use which.

Holds vLLM's manager of adapters, and a worker's calls to it. Must not know requests, plans or ranks.
Read next: `longspan.integrations.vllm.rank_model`.

Note [Adapters on every rank]
    Every rank holds every adapter that a step names, also those that none of its rows use: vLLM compares the lists of
    all processes. Adapters are loaded in the order of their ids, so that all processes drop the same one when there are
    more than `max_cpu_loras`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models import supports_lora
from vllm.v1.worker.worker_base import WorkerBase

from longspan.errors import ConfigError, UnsupportedModelError

Adapter: TypeAlias = LoRARequest
"""vLLM's name and place of an adapter."""


class Adapters:
    """Adapters of a model."""

    def __init__(self, module: torch.nn.Module, vllm_config: Any, device: torch.device) -> None:
        """Wrap the layers that adapters change.

        Raises:
            UnsupportedModelError: vLLM has no adapters for this model.
        """
        if not supports_lora(module):
            raise UnsupportedModelError(f"model: vLLM has no LoRA for {type(module).__name__}")
        self._manager = LRUCacheWorkerLoRAManager(vllm_config, device, module.embedding_modules)
        self.module: torch.nn.Module = self._manager.create_lora_manager(module, vllm_config)
        """The model with the wrapped layers."""

    def load(self, adapters: Iterable[Adapter]) -> None:
        """Load and activate all adapters of a step. See Note [Adapters on every rank]."""
        self._manager.set_active_adapters(sorted(adapters, key=lambda adapter: adapter.lora_int_id), None)

    def use(self, rows: Sequence[Adapter | None]) -> None:
        """Let the next call compute these rows, each with its adapter; all of them are loaded."""
        ids = tuple(0 if adapter is None else adapter.lora_int_id for adapter in rows)
        self._manager.set_active_adapters([], LoRAMapping(ids, ids, is_prefill=True))

    def add(self, adapter: Adapter) -> bool:
        """Load an adapter before it is used; returns whether it is new."""
        return bool(self._manager.add_adapter(adapter))

    def remove(self, adapter_id: int) -> bool:
        """Drop an adapter; returns whether it was there."""
        return bool(self._manager.remove_adapter(adapter_id))

    def pin(self, adapter_id: int) -> bool:
        """Never drop an adapter for others; returns whether it is there."""
        return bool(self._manager.pin_adapter(adapter_id))

    def ids(self) -> set[int]:
        """Return the ids of all loaded adapters."""
        return set(self._manager.list_adapters())


class AdapterCalls(WorkerBase):
    """Worker's answers to calls that name adapters.

    Each raises ConfigError without LoRA. Collective: every process, between steps.
    """

    adapters: Adapters | None = None

    def add_lora(self, lora_request: Adapter) -> bool:
        return self._enabled().add(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        return self._enabled().remove(lora_id)

    def pin_lora(self, lora_id: int) -> bool:
        return self._enabled().pin(lora_id)

    def list_loras(self) -> set[int]:
        return self._enabled().ids()

    def _enabled(self) -> Adapters:
        if self.adapters is None:
            raise ConfigError("enable_lora: got false, legal for calls that name adapters is true")
        return self.adapters
