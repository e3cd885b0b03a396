"""The model that makes drafts, beside the one that requests ask for: its options, facts and memory.

Holds what is refused before weights are loaded. Must not know requests or plans.
Read next: `longspan.scheduler.draft_model`, which makes the drafts; docs/speculation.md.
"""

import sys
from collections.abc import Sequence

import torch
from msgspec import structs

from longspan.config import EngineConfig
from longspan.engine.memory import share_with_draft
from longspan.errors import ConfigError
from longspan.group.messages import Start
from longspan.kv.layout import stored_as
from longspan.models.inspect import check_proven, inspect_model
from longspan.models.loader import load_config
from longspan.models.names import draft_refusal
from longspan.models.small_weights import with_small_weights
from longspan.plan.types import FIRST_DRAFT_PLAN
from longspan.scheduler.draft_model import DraftModel
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pages_of_ranks
from longspan.speculation import ModelDrafts
from longspan.types import ModelSpec


def draft_config(config: EngineConfig) -> EngineConfig | None:
    """Options of the draft model, which is loaded as the model is and lies whole on every rank; None for none."""
    speculation = config.speculation
    if not isinstance(speculation, ModelDrafts):
        return None
    return structs.replace(
        config,
        model=speculation.model,
        # Of a window, pages of a step's tokens are promised beside it: guesses that may be taken back are as many.
        max_num_batched_tokens=max(config.max_num_batched_tokens, speculation.num_drafts + 1),
        hf_overrides=None,
        lora=(),
        speculative_config=None,
        placement="packed",
        strategy="auto",
        decode_strategy=None,
        cuda_graphs="never",
        kv_host_memory=None,
        kv_disk=None,
        kv_disk_size=None,
        state_snapshot_tokens=None,
        state_parts=None,
        profile=None,
    )


def draft_spec(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> ModelSpec | None:
    """Facts of the draft model; None for none.

    Args:
        config: what the user asked for.
        spec: facts of the model that is to check the drafts.
        dtype: of weights and activations.

    Raises:
        ConfigError: there is no such model, it is not proven, or it cannot make drafts for this one.
    """
    own = draft_config(config)
    if own is None:
        return None
    got = f"speculative_config: got the draft model {own.model!r}"
    if spec.state_groups:
        raise ConfigError(
            f"{got} for a model with recurrent layers, legal there is none: its state cannot be taken back behind a "
            "wrong draft"
        )
    try:
        model_config, _ = load_config(own.model)
        check_proven(model_config)
        draft = inspect_model(model_config, None, dtype)
        draft = with_small_weights(draft, own.model, model_config, dtype, own.quantization)
    except ConfigError as error:
        raise draft_refusal(own.model, error) from error
    if draft.state_groups:
        raise ConfigError(f"{got}, legal is one without recurrent layers: no wrong draft can be taken back in them")
    if draft.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"{got} with a vocabulary of {draft.vocab_size} tokens, legal is one with the model's {spec.vocab_size}"
        )
    return structs.replace(draft, kv_groups=stored_as(draft.kv_groups, config.kv_cache_dtype), eos_token_ids=())


def draft_start(
    config: EngineConfig, spec: ModelSpec, draft: ModelSpec | None, memories: Sequence[int]
) -> tuple[Sequence[int], Start | None]:
    """Take the draft model's part of every rank's memory.

    Args:
        config: what the user asked for.
        spec: the model's facts.
        draft: those of the draft model, or None.
        memories: bytes for KV of every rank.

    Returns:
        Bytes that are left per rank, and what ranks are told of the draft model.

    Raises:
        ConfigError: the part of a rank does not hold a page.
    """
    own = draft_config(config)
    if own is None or draft is None:
        return memories, None
    left, parts = share_with_draft(memories, spec, draft)
    try:
        num_pages = pages_of_ranks(draft, parts, own.page_size, own.max_num_batched_tokens)
    except ConfigError as error:
        raise ConfigError(f"{error}; this is the part of the draft model {own.model!r}") from error
    print(
        f"longspan: draft model {own.model}: weights of {draft.weight_bytes / 1e9:.2f} GB on every rank, and "
        f"{max(parts) / 1e9:.2f} GB of its KV memory for {max(map(min, num_pages)) * config.page_size} tokens",
        file=sys.stderr,
    )
    return left, Start(structs.replace(own, kv_cache_memory=max(parts)), draft, num_pages, None)


def fewer_for_draft(start: Start | None, config: EngineConfig) -> Start | None:
    """What ranks are told of the draft model where there are fewer of them.

    Args:
        start: what more of them were told.
        config: the model's options from now on.
    """
    if start is None or (own := draft_config(config)) is None:
        return None
    own = structs.replace(own, kv_cache_memory=start.config.kv_cache_memory)
    return structs.replace(start, config=own, num_pages=start.num_pages[: config.context_parallel_size])


def draft_scheduler(start: Start) -> Scheduler:
    """Scheduler of the draft model, without requests."""
    scheduler = Scheduler(start.spec, start.config, start.num_pages)
    scheduler.next_plan_id = FIRST_DRAFT_PLAN
    return scheduler


def make_draft_model(config: EngineConfig, start: Start | None, scheduler: Scheduler) -> DraftModel | None:
    """Let a scheduler's requests have drafts of the draft model, if there is one.

    Args:
        config: of the engine.
        start: what ranks are told of the draft model, or None.
        scheduler: whose requests have drafts.
    """
    if start is None or config.speculation is None:
        return None
    model = DraftModel(draft_scheduler(start), config.speculation.num_drafts)
    scheduler.drafting.use(model, model.follow)
    return model
