"""End of a step on the rank that samples: from rows of hidden states to vLLM's answer.

Holds the order of scoring and sampling. Must not know ranks, or how a token is drawn.
Read next: `longspan.integrations.vllm.sampling`, which draws tokens by vLLM's own sampler.
"""

from typing import Any

from torch import Tensor
from vllm.v1.outputs import ModelRunnerOutput

from longspan.integrations.vllm.planning import StepPlan
from longspan.integrations.vllm.rank_model import RankModel
from longspan.integrations.vllm.requests import Requests
from longspan.integrations.vllm.sampling import SamplingBatch

SCORED_ROWS = 512
"""Most prompt rows whose logits are in memory at once."""


class StepSampler:
    """Samples and scores for all ranks."""

    def __init__(self, model: RankModel, requests: Requests, batch: SamplingBatch) -> None:
        self._model, self._requests, self._batch = model, requests, batch

    def answer(self, step: StepPlan, rows: Tensor, scheduler_output: Any, grammar_output: Any) -> ModelRunnerOutput:
        """Append a token to every request that gets one, and write vLLM's answer.

        Args:
            step: plan of the step.
            rows: hidden states [n, hidden], in the order of `step.read_rows`.
            scheduler_output: vLLM's schedule of the step.
            grammar_output: vLLM's masks for structured output, or None.

        Collective: the processes of the sampling rank.
        """
        scheduled = list(scheduler_output.num_scheduled_tokens)
        output = ModelRunnerOutput(req_ids=scheduled, req_id_to_index={r: i for i, r in enumerate(scheduled)})
        first_sampled = len(rows) - len(step.samples)
        output.prompt_logprobs_dict = self._score(step, rows[:first_sampled])
        token_of: dict[str, int] = {}
        if step.samples:
            states = [self._requests[req_id] for req_id in step.samples]
            order = self._batch.admit(states)
            position = {req_id: i for i, req_id in enumerate(step.samples)}
            wanted = rows[first_sampled:][[position[req_id] for req_id in order]]
            logits = self._model.logits(wanted, [self._requests[req_id].adapter_id for req_id in order])
            sampled, logprobs = self._batch.sample(logits, scheduler_output, grammar_output)
            token_of = dict(zip(order, sampled, strict=True))
            for state in states:
                state.output_token_ids.append(token_of[state.req_id])
            self._batch.advance(sampled)
            # vLLM reads rows of log-probabilities by the answer's order: the batch's requests come first.
            output.req_ids = order + [req_id for req_id in scheduled if req_id not in position]
            output.req_id_to_index = {req_id: i for i, req_id in enumerate(output.req_ids)}
            output.logprobs = logprobs
        output.sampled_token_ids = [[token_of[r]] if r in token_of else [] for r in output.req_ids]
        return output

    def _score(self, step: StepPlan, rows: Tensor) -> dict[str, Any]:
        """Return the prompt log-probabilities of requests whose prompt ends in this step."""
        found: dict[str, Any] = {}
        first = 0
        for score in step.scores:
            state = self._requests[score.req_id]
            part = rows[first : first + len(score.rows)]
            first += len(score.rows)
            for i in range(0, len(part), SCORED_ROWS):
                scored = part[i : i + SCORED_ROWS]
                logits = self._model.logits(scored, [state.adapter_id] * len(scored))
                self._batch.score_prompt(state, score.start + i, logits)
            if score.is_last:
                found[score.req_id] = self._batch.take_prompt_logprobs(state)
        return found
