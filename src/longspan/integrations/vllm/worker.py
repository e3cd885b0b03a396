"""One process of one rank: vLLM's model, our pools, plans and exchanges.

Holds the calls that vLLM makes to a worker. Must not choose ranks or strategies.
Read next: `longspan.integrations.vllm.planning`, `longspan.integrations.vllm.rank_model`, `longspan.cp.eager`.

Note [Who samples]
    Every rank computes the rows that it owns, and sends the hidden states that are read to cp_rank 0. Only cp_rank 0
    computes logits and samples (in all of its tensor parallel processes, as vLLM does), and sends the others tokens.
"""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from longspan.attention.select import make_backend
from longspan.comm.recording import RecordingCommunicator
from longspan.costmodel.choose import plan_group
from longspan.cp.eager import EagerStepAttention
from longspan.errors import ConfigError
from longspan.integrations.vllm.adapters import Adapters
from longspan.integrations.vllm.backend import install_backend
from longspan.integrations.vllm.costs import agree_on_costs
from longspan.integrations.vllm.exchange import StepExchange
from longspan.integrations.vllm.failure import telling_peers
from longspan.integrations.vllm.group import join_group
from longspan.integrations.vllm.memory import common_kv_bytes
from longspan.integrations.vllm.options import parse_options
from longspan.integrations.vllm.placement import striping_of
from longspan.integrations.vllm.planning import StepPlan, plan_step
from longspan.integrations.vllm.rank_model import load_rank_model
from longspan.integrations.vllm.refused_calls import RefusedCalls
from longspan.integrations.vllm.requests import Requests
from longspan.integrations.vllm.sampling import SamplingBatch
from longspan.integrations.vllm.step_sampler import SCORED_ROWS, StepSampler


class Worker(RefusedCalls):
    """vLLM worker of one (cp_rank, tp_rank)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = parse_options(self.vllm_config.additional_config)
        assert options is not None, "the plugin selects this worker only with its options"
        self._options = options
        self._cp_size, self._tp_size = options.context_parallel_size, self.parallel_config.tensor_parallel_size
        self._cp_rank = self.rank // self._tp_size
        self.parallel_config.disable_custom_all_reduce = True
        self._num_steps = 0
        self._pending: tuple[StepPlan, Any, Tensor] | None = None  # between execute_model and sample_tokens
        self._failure: Exception | None = None
        install_backend()

    # -- start -------------------------------------------------------------------------------------------------------

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        init_method = self.distributed_init_method
        os.environ["VLLM_DIST_IDENT"] = os.path.basename(init_method.removeprefix("file://")).split(":")[-1]
        init_worker_distributed_environment(
            self.vllm_config, self.rank, init_method, self.local_rank, self.current_platform.dist_backend
        )
        self._comm = RecordingCommunicator(join_group(self.rank, self._cp_size, self._tp_size))
        self._exchange = StepExchange(self._comm)
        set_random_seed(self.model_config.seed)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            raise ConfigError("load_dummy_weights: got True, legal with longspan is False")
        self._model = load_rank_model(self.vllm_config, self.device, SCORED_ROWS)

    def get_model(self) -> torch.nn.Module:
        return self._model.module

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        budget = self.scheduler_config.max_num_batched_tokens
        return self._model.kv_cache_spec(striping_of(self._options, self.cache_config.block_size, budget))

    def determine_available_memory(self) -> int:
        """Return the KV bytes of all ranks together, in whole blocks: vLLM sees one device with all of them.

        Raises:
            ConfigError: a rank has no room for a block; raised on all ranks.

        Collective: every process, once.
        """
        self._model.warm_up(self.scheduler_config.max_num_batched_tokens)
        block_bytes = self._model.page_bytes(self.cache_config.block_size)
        return self._cp_size * common_kv_bytes(self.cache_config, self.parallel_config.world_size, block_bytes)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        num_blocks, size = kv_cache_config.num_blocks, self.cache_config.block_size
        self.groups = groups = self._model.groups([group.layer_names for group in kv_cache_config.kv_cache_groups])
        table_specs = [groups.table_spec(table) for table in range(groups.num_tables)]
        self._requests = Requests(num_blocks, self._cp_size, size, table_specs)
        self._pools = groups.make_pools(-(-num_blocks // self._cp_size), size, self.device)
        self._backend = make_backend("auto", self.device)
        self._sampler: StepSampler | None = None
        if self._cp_rank == 0:
            batch = SamplingBatch(self.vllm_config, self.device)
            self._sampler = StepSampler(self._model, self._requests, batch)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Measure the costs that strategies are chosen by.

        Collective: every process, once.
        """
        group = self.groups.groups[0]
        params = self._model.layer_params[group.layers[0]]
        self.costs = agree_on_costs(self._options, self._backend, group, params, self._comm.inner, self.device)
        self._choose = partial(plan_group, costs=self.costs, forced=self._options.forced_strategy)
        set_random_seed(self.model_config.seed)
        return CompilationTimes(0.0, 0.0)

    def add_lora(self, lora_request: Any) -> bool:
        return self._adapters().add(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        return self._adapters().remove(lora_id)

    def pin_lora(self, lora_id: int) -> bool:
        return self._adapters().pin(lora_id)

    def list_loras(self) -> set[int]:
        return self._adapters().ids()

    def _adapters(self) -> Adapters:
        if self._model.adapters is None:
            raise ConfigError("enable_lora: got False, legal for a LoRA adapter is True")
        return self._model.adapters

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    # -- steps -------------------------------------------------------------------------------------------------------

    def begin_step(self, scheduler_output: Any) -> None:
        """Run `execute_model` without an answer; `sample_tokens` raises what fails here.

        Collective: every process, in the order of steps.
        """
        try:
            self.execute_model(scheduler_output)
        except Exception as error:
            self._failure = error

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """Compute this rank's rows.

        Collective: every process, in the order of steps.
        """
        with telling_peers(self._comm, self.rank):
            self._exchange.hear_tokens()
            return self._execute(scheduler_output)

    def _execute(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        self._requests.update(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self._num_steps += 1
        scheduled = scheduler_output.num_scheduled_tokens
        states = [self._requests[req_id] for req_id in scheduled]
        if self._model.adapters is not None:
            self._model.adapters.load(state.lora_request for state in states if state.adapter_id)
        step = plan_step(self._num_steps, scheduled, self._requests, self.groups, self._cp_size, self._choose)
        attention = EagerStepAttention(
            step.plan, step.tables, self._pools, self._comm, self._backend, self._model.layer_params
        )
        adapter_of = {state.number: state.adapter_id for state in states}
        self._pending = (step, scheduler_output, self._model.forward(step.plan, attention, adapter_of))
        return None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """Sample one token for every request whose prompt is computed.

        Collective: every process, in the order of steps.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        (step, scheduler_output, hidden), self._pending = self._pending, None
        with telling_peers(self._comm, self.rank):
            return self._sample(step, scheduler_output, hidden, grammar_output)

    def _sample(self, step: StepPlan, scheduler_output: Any, hidden: Tensor, grammar_output: Any) -> ModelRunnerOutput:
        # The order of the batch is known to the sampling rank alone: rows and tokens travel in the schedule's order.
        rows = self._exchange.gather(hidden, step.read_rows)
        states = [self._requests[req_id] for req_id in step.samples]
        for score in step.scores:
            self._requests[score.req_id].has_prompt_logprobs |= score.is_last
        if rows is None:
            self._exchange.expect_tokens(states)
            if not len(hidden):
                # This rank sleeps, which leaves the core to vLLM's own processes: 4.4 ms a token instead of 4.6.
                self._exchange.hear_tokens()
            return EMPTY_MODEL_RUNNER_OUTPUT  # vLLM reads the answer of process 0
        assert self._sampler is not None
        output = self._sampler.answer(step, rows, scheduler_output, grammar_output)
        if states:
            self._exchange.tell_tokens([state.output_token_ids[-1] for state in states])
        return output

    def shutdown(self) -> None:
        if hasattr(self, "_comm"):
            self._comm.close()
