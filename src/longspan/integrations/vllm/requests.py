"""State of every request in a worker: its tokens and blocks, and how far it is computed.

Holds a mirror of vLLM's scheduler, the same on every rank. Must not know tensors or plans.
Read next: `longspan.integrations.vllm.planning`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.errors import LongspanError
from longspan.integrations.vllm.placement import block_rank
from longspan.kv.layout import KVSpec
from longspan.sharding.pages import PageRun, PageTable


@dataclass
class RequestState:
    """State of one request."""

    req_id: str
    number: int
    """Id of the request in plans."""
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sampling_params: Any
    tables: list[PageTable]
    """One per block table of vLLM's."""
    num_computed: int
    lora_request: Any = None
    """vLLM's name of the request's LoRA adapter; None for none."""
    has_prompt_logprobs: bool = False
    """Whether the prompt's log-probabilities have been reported, or were not asked for."""
    generator: Any = None
    """Random generator of a request with a seed; None on ranks that do not sample."""
    prompt_logprobs: Any = None
    """The prompt's log-probabilities so far, until they are reported; None on ranks that do not sample."""

    @property
    def adapter_id(self) -> int:
        """Id of the request's LoRA adapter; 0 for none, as vLLM says it."""
        return 0 if self.lora_request is None else int(self.lora_request.lora_int_id)

    @property
    def num_tokens(self) -> int:
        """Number of known tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Return the known tokens at positions `[start, end)`."""
        cut = len(self.prompt_token_ids)
        found = self.prompt_token_ids[start : min(end, cut)] if start < cut else []
        if end > cut:
            found = found + self.output_token_ids[max(0, start - cut) : end - cut]
        if len(found) != end - start:
            raise LongspanError(
                f"request {self.req_id}: tokens {start} to {end} are scheduled, {self.num_tokens} known"
            )
        return tuple(found)


class Requests:
    """All requests of a worker."""

    def __init__(
        self, num_blocks: int, num_ranks: int, block_size: int, table_specs: Sequence[KVSpec | None] = (None,)
    ) -> None:
        """Begin without requests.

        Args:
            num_blocks: blocks of all ranks.
            num_ranks: size of the cp_group.
            block_size: tokens per block.
            table_specs: per block table of vLLM's, what its layers see; None where some see all.
        """
        self._num_blocks, self._num_ranks, self._block_size = num_blocks, num_ranks, block_size
        self._table_specs = table_specs
        self._by_id: dict[str, RequestState] = {}
        self._next_number = 0

    def __getitem__(self, req_id: str) -> RequestState:
        return self._by_id[req_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def update(self, step: Any) -> None:
        """Take in vLLM's SchedulerOutput of a step.

        Raises:
            LongspanError: the step asks for something that the plugin refuses at start.
        """
        for name in (
            "kv_cache_block_copies",
            "new_block_ids_to_zero",
            "scheduled_spec_decode_tokens",
            "scheduled_encoder_inputs",
        ):
            if getattr(step, name):
                raise LongspanError(f"{name}: vLLM's scheduler asks for it, and longspan does not support it")
        for req_id in step.finished_req_ids:
            self._by_id.pop(req_id, None)
        for new in step.scheduled_new_reqs:
            self._add(new)
        cached = step.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            state = self._by_id[req_id]
            state.num_computed = cached.num_computed_tokens[i]
            num_outputs = cached.num_output_tokens[i]
            if num_outputs > len(state.output_token_ids):
                known = len(state.output_token_ids)
                raise LongspanError(f"request {req_id}: vLLM knows {num_outputs} generated tokens, this rank {known}")
            del state.output_token_ids[num_outputs:]  # in place: the sampler has the same list
            blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                state.tables = self._new_tables()
            if blocks is not None:
                self._append(state.tables, blocks)
            self._leave_windows(state)

    def _add(self, new: Any) -> None:
        """Add a request that is new, or that vLLM resumes by sending it as new."""
        if new.prompt_token_ids is None or new.sampling_params is None:
            raise LongspanError(f"request {new.req_id}: longspan needs a prompt of tokens, and sampling parameters")
        tables = self._new_tables()
        self._append(tables, new.block_ids)
        prompt = list(new.prompt_token_ids)
        all_tokens = new.prefill_token_ids
        outputs = [] if all_tokens is None else list(all_tokens[len(prompt) :])
        before = self._by_id.get(new.req_id)
        state = RequestState(
            req_id=new.req_id,
            number=self._next_number,
            prompt_token_ids=prompt,
            output_token_ids=outputs,
            sampling_params=new.sampling_params,
            tables=tables,
            num_computed=new.num_computed_tokens,
            lora_request=new.lora_request,
            has_prompt_logprobs=new.sampling_params.prompt_logprobs is None,
        )
        if before is not None:
            state.generator, state.prompt_logprobs = before.generator, before.prompt_logprobs
            state.has_prompt_logprobs = before.has_prompt_logprobs
        self._next_number += 1
        self._by_id[new.req_id] = state

    def _new_tables(self) -> list[PageTable]:
        return [PageTable(self._block_size) for _ in self._table_specs]

    def _append(self, tables: Sequence[PageTable], block_ids: Sequence[Sequence[int]]) -> None:
        for table, ids in zip(tables, block_ids, strict=True):
            start = table.num_pages
            for block_idx, block_id in enumerate(ids, start):
                if block_id == 0:  # vLLM's null block, in place of those that a window has left
                    assert not table.num_pages, "vLLM frees blocks from the front"
                    continue
                rank, slot = block_rank(block_id, self._num_blocks, self._num_ranks)
                table.apply([PageRun(block_idx, rank, slot, 1)])

    def _leave_windows(self, state: RequestState) -> None:
        """Drop the blocks that no layer of a table sees any more: vLLM gives them to others without a word."""
        for table, spec in zip(state.tables, self._table_specs, strict=True):
            if spec is not None and spec.reach is not None:
                table.free_before(spec.first_key(state.num_computed) // self._block_size)
