"""Calls of vLLM to a worker that the plugin need not or cannot answer.

Holds their answers. Must not know ranks, plans or models.
Read next: `longspan.integrations.vllm.worker`; `longspan.integrations.vllm.refusals`, which refuses options.
"""

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from longspan.errors import ConfigError


class RefusedCalls(WorkerBase):
    """Worker without drafts, encoders, profiles and sleep."""

    def take_draft_token_ids(self) -> None:
        return None

    def execute_dummy_batch(self) -> None:
        """Do nothing: only data parallel engines need dummy batches."""

    def reset_encoder_cache(self) -> None:
        """Do nothing: there is no encoder cache."""

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **options: Any) -> None:
        raise ConfigError("profile: longspan does not support it")

    def sleep(self, level: int = 1) -> None:
        raise ConfigError("sleep: longspan does not support it")

    def wake_up(self, tags: list[str] | None = None) -> None:
        raise ConfigError("wake_up: longspan does not support it")
