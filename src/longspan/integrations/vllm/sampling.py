"""Sampling of tokens from logits, by vLLM's own sampler.

Holds the batch of requests that get a token, on the one rank that samples. Must not know ranks, blocks or plans.
Read next: `vllm.v1.sample.sampler`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from longspan.integrations.vllm.requests import RequestState


class SamplingBatch:
    """Requests that get a token in a step, in the form that vLLM's sampler reads."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        custom = list(model.logits_processors or ())
        self._device, self._config = device, vllm_config
        self._batch = InputBatch(
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=model.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=device,
            vocab_size=model.get_vocab_size(),
            block_sizes=[vllm_config.cache_config.block_size],
            max_num_blocks_per_req=[1],  # unused: the sampler reads no blocks
            logitsprocs=build_logitsprocs(vllm_config, device, False, False, custom),
            logitsprocs_need_output_token_ids=bool(custom),
            reasoning_config=vllm_config.reasoning_config,
        )
        self._numbers: dict[str, int] = {}
        """Number of the request's state that the batch has, by request id: a resumed request gets a new state."""
        self._sampler = Sampler(logprobs_mode=model.logprobs_mode, use_fp64_gumbel=model.use_fp64_gumbel)

    def admit(self, states: Sequence[RequestState]) -> list[str]:
        """Make the batch hold exactly these requests.

        Returns:
            Ids of the requests, in the order of the rows that `sample` takes.
        """
        batch = self._batch
        wanted = {state.req_id: state for state in states}
        for req_id, number in list(self._numbers.items()):
            if req_id not in wanted or wanted[req_id].number != number:
                batch.remove_request(req_id)
                del self._numbers[req_id]
        for state in states:
            if state.req_id not in self._numbers:
                batch.add_request(self._cached(state))
                self._numbers[state.req_id] = state.number
        batch.condense()
        batch.refresh_metadata()
        return list(batch.req_ids)

    def sample(
        self, logits: Tensor, scheduler_output: Any, grammar_output: Any
    ) -> tuple[list[int], LogprobsLists | None]:
        """Sample one token per request of the batch, and return its log-probabilities if asked for.

        Args:
            logits: [requests, vocab]; changed in place.
            scheduler_output: vLLM's schedule of the step.
            grammar_output: vLLM's masks for structured output, or None.
        """
        batch = self._batch
        if grammar_output is not None:
            apply_grammar_bitmask(scheduler_output, grammar_output, batch, logits)
        output = self._sampler(logits=logits, sampling_metadata=batch.sampling_metadata)
        tokens: list[int] = output.sampled_token_ids.view(-1).tolist()
        logprobs = output.logprobs_tensors
        return tokens, None if logprobs is None else logprobs.tolists()

    def advance(self, tokens: Sequence[int]) -> None:
        """Append sampled tokens to the batch's copy of the requests' tokens."""
        batch = self._batch
        for index, token in enumerate(tokens):
            end = batch.num_tokens_no_spec[index]
            batch.token_ids_cpu[index, end] = token
            batch.is_token_ids[index, end] = True
            batch.num_tokens_no_spec[index] = end + 1

    def score_prompt(self, state: RequestState, start: int, logits: Tensor) -> None:
        """Take in the log-probabilities of n prompt tokens from `start + 1` on; `logits` are [n, vocab]."""
        count = self._num_prompt_logprobs(state)
        targets = torch.tensor(state.prompt_token_ids[start + 1 : start + 1 + len(logits)], device=logits.device)
        if self._config.model_config.logprobs_mode in ("raw_logits", "processed_logits"):
            scores = logits.to(torch.float32)
        else:
            scores = self._sampler.compute_logprobs(logits)
        token_ids, logprobs, ranks, *_ = self._sampler.gather_logprobs(scores, count, targets)
        kept = self._kept(state, count)
        part = slice(start, start + len(logits))
        kept.logprob_token_ids[part] = token_ids
        kept.logprobs[part] = logprobs
        kept.selected_token_ranks[part] = ranks

    def take_prompt_logprobs(self, state: RequestState) -> LogprobsTensors:
        """Return all of a prompt's log-probabilities, and forget them."""
        kept = self._kept(state, self._num_prompt_logprobs(state))
        state.prompt_logprobs = None
        return kept

    def _kept(self, state: RequestState, count: int) -> LogprobsTensors:
        if state.prompt_logprobs is None:
            state.prompt_logprobs = LogprobsTensors.empty_cpu(len(state.prompt_token_ids) - 1, count + 1)
        kept: LogprobsTensors = state.prompt_logprobs
        return kept

    def _num_prompt_logprobs(self, state: RequestState) -> int:
        count: int = state.sampling_params.prompt_logprobs
        return self._batch.vocab_size if count == -1 else count

    def _cached(self, state: RequestState) -> CachedRequestState:
        params = state.sampling_params
        if params.sampling_type == SamplingType.RANDOM_SEED and state.generator is None:
            state.generator = torch.Generator(device=self._device)
            state.generator.manual_seed(params.seed)
        return CachedRequestState(
            req_id=state.req_id,
            prompt_token_ids=state.prompt_token_ids,
            mm_features=[],
            sampling_params=params,
            generator=state.generator,
            block_ids=([],),
            num_computed_tokens=state.num_computed,
            output_token_ids=state.output_token_ids,
        )
