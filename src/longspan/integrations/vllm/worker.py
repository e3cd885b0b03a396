"""One process of one rank: vLLM's model, our pools, plans and exchanges.

Holds the calls that vLLM makes to a worker. Must not choose ranks or strategies.
Read next: `longspan.integrations.vllm.planning`, `longspan.cp.attend`.

Note: who samples
    Rows are computed by their owners. The hidden states that are read travel to cp_rank 0, which alone has logits and
    samples (all of its tensor parallel processes do, as in vLLM itself), and tells the others the tokens.

Note: who fails
    vLLM reads the answers of process 0 alone. Another process that fails leaves its tensor parallel peers in a
    collective, so it ends: vLLM's monitor of processes then ends the engine.

Note: what is patched
    `torch.accelerator.empty_cache`, which vLLM's loader calls and a CPU lacks, does nothing while a model is loaded.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from longspan.attention.base import AttentionBackend
from longspan.attention.check import check_against_reference
from longspan.attention.select import make_backend
from longspan.comm.base import Communicator
from longspan.comm.recording import RecordingCommunicator
from longspan.cp.attend import StepAttention
from longspan.errors import ConfigError, LongspanError, UnsupportedModelError
from longspan.integrations.vllm.backend import StepMetadata, WarmUp, attention_layers, install_backend
from longspan.integrations.vllm.exchange import StepExchange
from longspan.integrations.vllm.group import join_group
from longspan.integrations.vllm.memory import local_kv_bytes
from longspan.integrations.vllm.options import parse_options
from longspan.integrations.vllm.placement import Striping
from longspan.integrations.vllm.planning import StepPlan, plan_step
from longspan.integrations.vllm.requests import Requests
from longspan.integrations.vllm.sampling import SamplingBatch
from longspan.integrations.vllm.spec import PlacedSpec
from longspan.integrations.vllm.staging import StagingCommunicator
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.pool import PagePool
from longspan.native.heap import keep_freed_memory
from longspan.plan.types import Literals
from longspan.types import AttentionParams, Strategy

logger = logging.getLogger(__name__)

SCORED_ROWS = 512
"""Prompt rows whose logits exist at once."""


class Worker(WorkerBase):
    """One (cp_rank, tp_rank)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = parse_options(self.vllm_config.additional_config)
        assert options is not None, "the plugin selects this worker only with its options"
        self._options = options
        self._cp_size, self._tp_size = options.context_parallel_size, self.parallel_config.tensor_parallel_size
        self._cp_rank = self.rank // self._tp_size
        self._forced = None if options.strategy == "auto" else Strategy(options.strategy)
        self.parallel_config.disable_custom_all_reduce = True
        self._num_steps = 0
        self._pending: tuple[StepPlan, Any, Tensor] | None = None  # between execute_model and sample_tokens
        self._failure: Exception | None = None
        install_backend(self.vllm_config.device_config.device_type)

    # -- start -------------------------------------------------------------------------------------------------------

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        if self.vllm_config.device_config.device_type == "cuda":
            self.device = torch.device(f"cuda:{self.local_rank}")
            torch.cuda.set_device(self.device)
        init_method = self.distributed_init_method
        os.environ["VLLM_DIST_IDENT"] = os.path.basename(init_method.removeprefix("file://")).split(":")[-1]
        init_worker_distributed_environment(
            self.vllm_config, self.rank, init_method, self.local_rank, self.current_platform.dist_backend
        )
        comm: Communicator = join_group(self.rank, self._cp_size, self._tp_size)
        if self.device.type == "cuda":
            comm = StagingCommunicator(comm)
        self._comm = RecordingCommunicator(comm)
        self._exchange = StepExchange(self._comm)
        set_random_seed(self.model_config.seed)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            raise ConfigError("load_dummy_weights: got True, legal with longspan is False")
        with set_current_vllm_config(self.vllm_config), _no_accelerator_cache(self.device):
            self.model = get_model(vllm_config=self.vllm_config)
        keep_freed_memory()
        layers = attention_layers(self.compilation_config.static_forward_context)
        self._index_of_layer = {name: i for i, name in enumerate(layers)}
        shapes = {(a.num_heads, a.num_kv_heads, a.head_size, a.head_size_v) for a in layers.values()}
        if len(shapes) != 1:
            raise ConfigError("model: its attention layers differ in heads or widths, which longspan does not support")
        ((num_heads, num_kv_heads, k_width, v_width),) = shapes
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        spec = KVSpec.uniform(num_kv_heads, k_width, v_width, dtype)
        self._group = KVGroup(tuple(range(len(layers))), spec, num_heads)
        self._params = tuple(AttentionParams(a.impl.scale, a.impl.logits_soft_cap) for a in layers.values())

    def get_model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.model
        return model

    def get_kv_cache_spec(self) -> dict[str, PlacedSpec]:
        size = self.cache_config.block_size
        options, budget = self._options, self.scheduler_config.max_num_batched_tokens
        shortest = {"packed": 2**31 - 1, "striped": 0, "auto": options.min_striped_len}[options.placement]
        striping = Striping(
            num_ranks=self._cp_size,
            stripe_blocks=-(-min(options.stripe_size, max(1, budget // (2 * self._cp_size))) // size),
            chunk_blocks=max(1, budget // size),
            min_striped_blocks=-(-shortest // size),
        )
        layout = self._group.spec.layout
        fields = {
            "block_size": size,
            "num_kv_heads": layout.num_kv_heads,
            "head_size": layout.k_width,
            "head_size_v": layout.v_width,
            "dtype": self.model_config.dtype,
        }
        plain = FullAttentionSpec(**fields)
        for name in self._index_of_layer:
            own = self.compilation_config.static_forward_context[name].get_kv_cache_spec(self.vllm_config)
            if own != plain:
                raise UnsupportedModelError(f"model: layer {name} needs {own}, legal with longspan in vLLM is {plain}")
        return dict.fromkeys(self._index_of_layer, PlacedSpec(**fields, striping=striping))

    def determine_available_memory(self) -> int:
        """Bytes of all ranks together, in whole blocks of each: vLLM sees one device with all of them.

        Raises:
            ConfigError: on all ranks, if one of them has no room for a block.

        Collective: every process, once.
        """
        self._warm_up()
        block_bytes = self._group.page_bytes(self.cache_config.block_size)
        local = local_kv_bytes(self.cache_config, self.parallel_config.world_size, self.device)
        blocks = torch.tensor([local // block_bytes], device=self.device)
        dist.all_reduce(blocks, dist.ReduceOp.MIN)
        if not blocks.item():
            raise ConfigError(
                f"kv_cache_memory_bytes: got {self.cache_config.kv_cache_memory_bytes}, with gpu_memory_utilization "
                f"{self.cache_config.gpu_memory_utilization}, which leaves a process no room for a block of "
                f"{block_bytes} bytes; legal is more of either"
            )
        return int(blocks.item()) * int(block_bytes) * int(self._cp_size)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Let vLLM compile the model, where it may, with as many rows as a rank can get in a step.

        Collective: the processes of one rank, once.
        """
        if self.compilation_config.mode == CompilationMode.NONE and self.device.type == "cpu":
            return  # on a GPU, for the memory that it takes
        num_tokens = self.scheduler_config.max_num_batched_tokens
        with _no_accelerator_cache(self.device):
            # Position 0 for all: a model may have fewer positions than a step may have tokens.
            positions = torch.zeros(num_tokens, dtype=torch.int64)
            self._run_model(WarmUp(), torch.zeros(num_tokens, dtype=torch.int32), positions)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        num_blocks, size = kv_cache_config.num_blocks, self.cache_config.block_size
        assert len(kv_cache_config.kv_cache_groups) == 1, "all layers share one spec"
        self._requests = Requests(num_blocks, self._cp_size, size)
        self._pool = PagePool(self._group, -(-num_blocks // self._cp_size), size, self.device)
        self._backend = self._make_attention()
        self._sampling = SamplingBatch(self.vllm_config, self.device) if self._cp_rank == 0 else None

    def _make_attention(self) -> AttentionBackend:
        if self.device.type == "cpu":
            return make_backend("auto", self.device)
        from longspan.integrations.vllm.flash import make_flash_backend

        with set_current_vllm_config(self.vllm_config):
            backend = make_flash_backend(self._group.spec, any(params.softcap for params in self._params))
        for params in set(self._params):
            check_against_reference(backend, self._group, params, self.device)
        return backend

    def compile_or_warm_up_model(self) -> CompilationTimes:
        set_random_seed(self.model_config.seed)
        return CompilationTimes(0.0, 0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    # -- steps -------------------------------------------------------------------------------------------------------

    def begin_step(self, scheduler_output: Any) -> None:
        """As `execute_model`, without an answer: `sample_tokens` raises what fails here. Collective: likewise."""
        try:
            self.execute_model(scheduler_output)
        except Exception as error:
            self._failure = error

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """Compute this rank's rows. Collective: every process, in the order of steps."""
        with self._telling_peers_of_failure():
            self._exchange.hear_tokens()
            return self._execute(scheduler_output)

    def _execute(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        self._requests.update(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self._num_steps += 1
        scheduled = scheduler_output.num_scheduled_tokens
        step = plan_step(self._num_steps, scheduled, self._requests, self._group, self._cp_size, self._forced)
        attention = StepAttention(step.plan, [step.tables], [self._pool], self._comm, self._backend, self._params)
        self._pending = (step, scheduler_output, self._forward(step, attention))
        return None

    def _forward(self, step: StepPlan, attention: StepAttention) -> Tensor:
        """[T, hidden] of this rank's rows."""
        token_ids: list[int] = []
        positions: list[int] = []
        for run in step.plan.query_runs:
            if run.compute_rank == self._cp_rank:
                assert isinstance(run.tokens, Literals), "vLLM's schedule names tokens that are known"
                token_ids += run.tokens.token_ids
                positions += range(run.position, run.end)
        if not token_ids:
            if any(group_step.exchanges for group_step in step.plan.groups):
                for layer in self._group.layers:
                    attention.join(layer)
            shape = (0, self.model_config.get_hidden_size())
            return torch.empty(shape, dtype=self.model_config.dtype, device=self.device)
        metadata = StepMetadata(attention, self._index_of_layer)
        return self._run_model(metadata, torch.tensor(token_ids, dtype=torch.int32), torch.tensor(positions))

    def _run_model(self, metadata: StepMetadata | WarmUp, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[T, hidden]. Args: `token_ids` [T] int32, `positions` [T] int64; T is not 0."""
        with set_forward_context(metadata, self.vllm_config, num_tokens=len(token_ids), slot_mapping={}):
            hidden: Tensor = self.model(input_ids=token_ids.to(self.device), positions=positions.to(self.device))
        return hidden

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """One token for every request whose prompt is computed. Collective: as `execute_model`."""
        if self._failure is not None:
            raise self._failure
        if self._pending is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        (step, scheduler_output, hidden), self._pending = self._pending, None
        with self._telling_peers_of_failure():
            return self._sample(step, scheduler_output, hidden, grammar_output)

    def _sample(self, step: StepPlan, scheduler_output: Any, hidden: Tensor, grammar_output: Any) -> ModelRunnerOutput:
        scheduled = list(scheduler_output.num_scheduled_tokens)
        states = [self._requests[req_id] for req_id in scheduled if req_id in step.samples]
        # The order of the batch is known to the sampling rank alone: rows and tokens travel in the schedule's order.
        score_rows = [row for score in step.scores for row in score.rows]
        rows = self._exchange.gather(hidden, score_rows + [step.samples[state.req_id] for state in states])
        for score in step.scores:
            self._requests[score.req_id].has_prompt_logprobs |= score.is_last
        if rows is None:
            self._exchange.expect_tokens(states)
            if not len(hidden):
                # Asleep, which leaves the core to vLLM's own processes: 4.4 ms a token instead of 4.6.
                self._exchange.hear_tokens()
            return EMPTY_MODEL_RUNNER_OUTPUT  # vLLM reads the answer of process 0
        assert self._sampling is not None
        output = ModelRunnerOutput(req_ids=scheduled, req_id_to_index={r: i for i, r in enumerate(scheduled)})
        output.prompt_logprobs_dict = self._score(step, rows[: len(score_rows)])
        token_of: dict[str, int] = {}
        if states:
            order = self._sampling.admit(states)
            position = {state.req_id: i for i, state in enumerate(states)}
            logits = self._logits(rows[len(score_rows) :][[position[req_id] for req_id in order]])
            sampled, logprobs = self._sampling.sample(logits, scheduler_output, grammar_output)
            token_of = dict(zip(order, sampled, strict=True))
            for state in states:
                state.output_token_ids.append(token_of[state.req_id])
            self._sampling.advance(sampled)
            # vLLM reads rows of log-probabilities by the answer's order: the batch's requests come first.
            output.req_ids = order + [req_id for req_id in scheduled if req_id not in position]
            output.req_id_to_index = {req_id: i for i, req_id in enumerate(output.req_ids)}
            output.logprobs = logprobs
            self._exchange.tell_tokens([token_of[state.req_id] for state in states])
        output.sampled_token_ids = [[token_of[r]] if r in token_of else [] for r in output.req_ids]
        return output

    def _score(self, step: StepPlan, rows: Tensor) -> dict[str, Any]:
        """Prompt log-probabilities of the requests whose prompt ends in this step."""
        assert self._sampling is not None
        found: dict[str, Any] = {}
        first = 0
        for score in step.scores:
            state = self._requests[score.req_id]
            part = rows[first : first + len(score.rows)]
            first += len(score.rows)
            for i in range(0, len(part), SCORED_ROWS):
                self._sampling.score_prompt(state, score.start + i, self._logits(part[i : i + SCORED_ROWS]))
            if score.is_last:
                found[score.req_id] = self._sampling.take_prompt_logprobs(state)
        return found

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor | None = self.model.compute_logits(hidden)
        if logits is None:
            raise LongspanError("vLLM gathers logits on one tensor parallel rank, which longspan does not support")
        return logits

    @contextmanager
    def _telling_peers_of_failure(self) -> Iterator[None]:
        """Let no process wait for one that failed. See Note: who fails."""
        try:
            yield
        except Exception as error:
            self._comm.close()  # ranks that wait for this one learn of it at once
            if self.rank == 0:
                raise
            logger.exception("process %d failed, and ends", self.rank)
            raise SystemExit(1) from error

    # -- what vLLM may call besides ----------------------------------------------------------------------------------

    def take_draft_token_ids(self) -> None:
        return None

    def execute_dummy_batch(self) -> None:
        """Only data parallel engines need one."""

    def reset_encoder_cache(self) -> None:
        """There is none."""

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **options: Any) -> None:
        raise ConfigError("profile: longspan does not support it")

    def sleep(self, level: int = 1) -> None:
        raise ConfigError("sleep: longspan does not support it")

    def wake_up(self, tags: list[str] | None = None) -> None:
        raise ConfigError("wake_up: longspan does not support it")

    def add_lora(self, lora_request: Any) -> bool:
        raise ConfigError("add_lora: longspan does not support LoRA")

    def shutdown(self) -> None:
        if hasattr(self, "_comm"):
            self._comm.close()


@contextmanager
def _no_accelerator_cache(device: torch.device) -> Iterator[None]:
    """On a CPU, let `torch.accelerator.empty_cache` do nothing meanwhile."""
    if device.type != "cpu":
        yield
        return
    original = torch.accelerator.empty_cache
    torch.accelerator.empty_cache = lambda: None
    try:
        yield
    finally:
        torch.accelerator.empty_cache = original
