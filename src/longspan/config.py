"""Engine configuration: every option a user can set, checked once.

Holds values and their legal ranges, each stated at its field. Must not know torch, models or processes.
Read next: `longspan.option`, the statement at a field; `longspan.llm` and `longspan.cli`, the two ways to set options.
"""

import json
from typing import Annotated, Any, Literal

import msgspec

from longspan.adapter_names import check_adapter_name, split_adapter
from longspan.cpu_binding import num_cores, parse_cpu_binding
from longspan.errors import ConfigError
from longspan.option import Group, Option, check_options, is_number, take_texts_
from longspan.quantities import MAX_COUNT, parse_listen, parse_nodes, parse_size, parse_weights
from longspan.simulation import SimulatedLinks, parse_simulated_links
from longspan.speculation import ModelDrafts, NgramDrafts, read_speculation
from longspan.types import Placement, Strategy

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
PlacementName = Literal["auto", "packed", "striped", "spill"]
StrategyName = Literal["auto", "local", "gather_kv", "pass_kv", "pass_q", "tree"]
PartialDTypeName = Literal["auto", "float32"]
KVDTypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8_e4m3"]
ExecutorName = Literal["processes", "threads", "external", "ray"]
REMOTE_EXECUTORS = ("external", "ray")
"""Executors whose workers reach the driver over the network."""
RayPlacementName = Literal["pack", "spread"]
AttentionName = Literal["auto", "cpu", "reference", "triton", "flashinfer", "cudnn", "torch"]
GraphsName = Literal["auto", "never"]
QuantizationName = Literal["none", "keep", "int8", "int4"]
MeasureName = Literal["auto", "again", "never"]

MAX_RANKS = 128
MAX_THREADS = 1024
MAX_TIMEOUT_S = 10**6
DEFAULT_DISK_BYTES = 32 * 2**30


_EXAMPLES = {
    "hf_overrides": '{"rope_parameters": {...}}',
    "speculative_config": '{"method": "ngram", "num_speculative_tokens": 4}',
}


def parse_json(text: str, field: str) -> dict[str, Any]:
    """Fields from a JSON object.

    Raises:
        ConfigError: the text is no JSON object.
    """
    try:
        return msgspec.json.decode(text, type=dict[str, Any])  # `json` would take NaN, and make 1e999 infinite
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        legal = f"a JSON object such as {_EXAMPLES[field]}"
        raise ConfigError(f"{field}: got {text[:200]!r}, legal is {legal}: {error}") from None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options for splitting and running one model.

    Raises:
        ConfigError: a value is illegal, or two values contradict each other.
    """

    model: str
    """Model to run: a directory, a `.gguf` file, `recall` or `smollm2` (models that come with it), or a Hub id."""
    device: Annotated[
        DeviceName, Option("Processor of the ranks; auto: GPUs, if there is one for each rank.", Group.MODEL)
    ] = "auto"
    """Processor that ranks compute on; with `cuda` each rank has its own GPU. `auto` takes the GPUs of this machine if
    there is one for each rank, and the CPU with the executors `external` and `ray`, or where an option needs it."""
    dtype: Annotated[
        DTypeName, Option("Of weights and KV; auto: float32 on a CPU, bfloat16 on a GPU.", Group.MODEL)
    ] = "auto"
    """Dtype of weights, activations and, unless `kv_cache_dtype` says another, of KV. `auto` is float32 on a CPU and
    bfloat16 on a GPU; float16 needs a GPU."""
    hf_overrides: Annotated[
        dict[str, Any] | None,
        Option(
            "Fields of the model's config, in place of its file's.",
            Group.MODEL,
            metavar="JSON",
            parse=parse_json,
            unset="none",
        ),
    ] = None
    """Fields of the model's config in place of those of its file, as in vLLM; inner configs are merged field by field.
    Example: `{"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}`."""
    quantization: Annotated[
        QuantizationName,
        Option("Small weights, on a CPU; keep: as the files have them; none: all dense.", Group.MODEL),
    ] = "none"
    """Linear layers whose weights stay small on a CPU. `none` dequantises whatever the files hold; `keep` keeps weights
    of 8 or 4 bits that the kernels take, to which the answers are the same; `int8` and `int4` round dense weights."""
    lora: Annotated[
        tuple[str, ...],
        Option(
            "LoRA adapter: NAME=DIR for requests that name it, DIR merged into the weights; may be repeated.",
            Group.MODEL,
            metavar="NAME=DIR|DIR",
        ),
    ] = ()
    """LoRA adapters. `NAME=DIR` is computed beside the weights, for the rows of requests that name it, any number of
    them; a lone `DIR` is merged into the weights by peft while they are loaded, one at most. A dict of names and
    directories, a list or a lone text will do. The same files lie on every host. See docs/adapters.md."""
    attention_backend: Annotated[
        AttentionName, Option("Attention kernels; auto: cpu on a CPU, triton on a GPU.", Group.MODEL)
    ] = "auto"
    """Attention kernels. `auto` is cpu on a CPU, and on a GPU triton, or torch where Triton is not installed."""
    cuda_graphs: Annotated[GraphsName, Option("CUDA graphs of decode steps, on GPUs.", Group.MODEL)] = "auto"
    """CUDA graphs of decode steps, one per shape: the backends triton and flashinfer make shapes fixed. `never`
    launches every kernel by itself."""
    compile_dense: Annotated[bool, Option("torch.compile for norms and MLPs, on GPUs.", Group.MODEL)] = False
    """Whether `torch.compile` fuses norms and MLPs, on a GPU; the first steps take seconds longer."""
    context_parallel_size: Annotated[
        int, Option("Ranks that share a sequence.", Group.RANKS, least=1, most=MAX_RANKS)
    ] = 1
    """Ranks that share a sequence."""
    tensor_parallel_size: Annotated[
        int, Option("Processes of one rank, which share its heads and weights.", Group.RANKS, least=1, most=MAX_RANKS)
    ] = 1
    """Processes of one rank, which share its heads and weights; each has a device of its own, on one host."""
    threads_per_rank: Annotated[
        int | None,
        Option(
            "Compute threads of each process of a rank.",
            Group.RANKS,
            least=1,
            most=MAX_THREADS,
            unset="cores / processes",
        ),
    ] = None
    """Compute threads of one rank; where `tensor_parallel_size` makes it several processes, of each of them. None is
    cores / processes."""
    cpu_binding: Annotated[
        str,
        Option(
            "Cores of each process: none, auto (its share, on one NUMA node), or lists such as '0-3|4-7'.",
            Group.RANKS,
            metavar="none|auto|LISTS",
        ),
    ] = "none"
    """Cores that each worker process is bound to. `auto` gives every process its share of the cores that this one may
    use, next to each other; lists give each process its own, and it has as many threads unless `threads_per_rank` says
    otherwise. Bound processes do not lend each other threads. See docs/performance.md."""
    executor: Annotated[ExecutorName, Option("What runs the ranks; see docs/several-machines.md.", Group.RANKS)] = (
        "processes"
    )
    """Executor of the ranks: one worker process per rank on this machine; one thread of this process per rank (for
    tests and debugging); workers on any hosts, which another program starts (`external`); or one actor of a Ray cluster
    per rank (`ray`)."""
    placement: Annotated[
        PlacementName, Option("Ranks of a request's pages; auto: packed if short, else striped.", Group.RANKS)
    ] = "auto"
    """Policy for the ranks of a request's pages; `auto` is packed for short prompts, else striped."""
    strategy: Annotated[
        StrategyName, Option("What moves between ranks, in both phases; auto: the fastest.", Group.RANKS)
    ] = "auto"
    """Movement strategy of both phases; `auto` takes the one with the least predicted time in every step."""
    decode_strategy: Annotated[
        StrategyName | None, Option("Overrides --strategy for decode.", Group.RANKS, unset="as --strategy")
    ] = None
    """Movement strategy of decode; None takes that of `strategy`."""
    state_parts: Annotated[
        int | None,
        Option(
            "Parts in which a recurrent state goes from rank to rank; 1: whole.",
            Group.RANKS,
            least=1,
            most=MAX_COUNT,
            unset="as many as take the least predicted time",
        ),
    ] = None
    """Parts, of whole heads, in which the state of a recurrent layer goes from rank to rank inside a chunk: a rank
    computes the first heads of a run while the rank before computes the next ones of its own. 1 hands states on whole;
    None takes the number with the least predicted time. On GPUs parts are sent, and a run waits for all of them; states
    without heads of their own (Mamba 2, short convolutions) go whole."""
    partial_dtype: Annotated[
        PartialDTypeName, Option("How partials travel; auto: in the dtype of queries.", Group.RANKS)
    ] = "auto"
    """Dtype in which partials travel. `auto` is the dtype in which queries travel, to which partials are rounded once
    (`KVGroup.partial_dtype`)."""
    nodes: Annotated[
        tuple[int, ...] | None,
        Option(
            "Node of every rank, from 0.",
            Group.RANKS,
            metavar="N,N,...",
            parse=parse_nodes,
            unset="the ranks of one host are a node",
        ),
    ] = None
    """Node that each rank runs on, counted from 0; None: all ranks of one host are a node."""
    rank_weights: Annotated[
        tuple[float, ...] | Literal["auto"] | None,
        Option(
            "Share of every rank in memory and work; auto: as fast as it is measured, and as much memory as it has.",
            Group.RANKS,
            metavar="W,W,...",
            parse=parse_weights,
            unset="all ranks are equal",
        ),
    ] = None
    """Weight of every rank, for ranks that are unequal: what it holds and computes of a long prompt is in proportion,
    to within a page of every chunk. The rank with the largest weight has all of `kv_cache_memory` and of
    `max_num_batched_tokens`. `auto` takes the speeds that are measured when the ranks have started (equal ones where
    nothing is measured), and on GPUs the memory that each of them has. None: all ranks are equal."""
    max_restarts: Annotated[
        int, Option("Replace lost ranks, so often within 10 minutes; 0: never.", Group.RANKS, least=0, most=MAX_COUNT)
    ] = 0
    """Most times within 10 minutes that lost ranks are replaced and running requests computed again; one more loss
    fails every request. 0 replaces none. With `external`, the program that starts the workers has to start all of them
    again: the driver waits for them as at the start."""
    min_ranks: Annotated[
        int | None,
        Option(
            "Fewest ranks to go on with, if not all can be replaced.", Group.RANKS, least=1, most=MAX_RANKS, unset="1"
        ),
    ] = None
    """Fewest ranks to go on with, if lost ranks cannot all be started again; None is one. Not legal with `external`, a
    topology file or simulated links, which fix the number of ranks."""
    page_size: Annotated[int, Option("Tokens per page.", Group.MEMORY, least=1, most=MAX_COUNT)] = 16
    """Tokens per page."""
    stripe_size: Annotated[int, Option("Tokens per stripe, whole pages.", Group.MEMORY, least=1, most=MAX_COUNT)] = 512
    """Most tokens per stripe, a multiple of `page_size`. Short chunks are cut into shorter stripes."""
    min_striped_len: Annotated[
        int | None,
        Option(
            "Shorter prompts stay on one rank.",
            Group.MEMORY,
            least=1,
            most=MAX_COUNT,
            unset="what is predicted to be best for a lone request",
        ),
    ] = None
    """Tokens of a prompt below which placement `auto` keeps it on one rank. None takes the number predicted to be best
    for a lone request, or, where nothing was measured, two stripes per rank."""
    kv_cache_dtype: Annotated[
        KVDTypeName, Option("Of stored keys and values; auto: that of the weights.", Group.MEMORY)
    ] = "auto"
    """Dtype in which keys and values are stored and travel; they are rounded once, when they are written. `int8` and
    `fp8_e4m3` have a scale per token and KV head. `auto` is the dtype of the weights. On a GPU legal are `auto`, and
    with the backend `triton` the two of 8 bits."""
    kv_cache_memory: Annotated[
        int | None,
        Option(
            "KV memory of one rank; bytes or with K, M, G, Ki, Mi, Gi.",
            Group.MEMORY,
            least=1,
            most=2**63 - 1,
            metavar="SIZE",
            parse=parse_size,
            unset="4Gi or half of what is free; on a GPU most of it",
        ),
    ] = None
    """KV memory of one rank in bytes, with `rank_weights` of the largest one; of a rank of several processes, of each
    of them. None takes 4 GiB, or less if half of the free memory is less, and on a GPU most of the memory that the
    weights leave free."""
    gpu_memory_utilization: Annotated[
        float,
        Option("Share of a GPU's free memory for weights, KV and a step's tensors.", Group.MEMORY, above=0, most=1.0),
    ] = 0.9
    """Share of the memory that a GPU has free at the start, for weights, KV and a step's tensors: allocators leave
    gaps, and buffers that grow with the context need room."""
    kv_host_memory: Annotated[
        int | None,
        Option(
            "Keep KV that leaves a rank's pools in host memory; bytes of one rank, or with K, M, G, Ki, Mi, Gi.",
            Group.MEMORY,
            least=1,
            most=2**63 - 1,
            metavar="SIZE",
            parse=parse_size,
            unset="none",
        ),
    ] = None
    """Host memory in bytes, beside its pools, in which each rank keeps the KV of prompts and answers. Needs prefix
    caching, on CPUs."""
    kv_disk: Annotated[
        str | None,
        Option("Keep KV on disk, over restarts; see docs/kv-cache.md.", Group.MEMORY, metavar="DIR"),
    ] = None
    """Directory for the KV of prompts and answers, on a disk of this machine: it outlives pools and processes, and any
    number of engines may share it. Needs prefix caching and the executor processes or threads, on CPUs."""
    kv_disk_size: Annotated[
        int | None,
        Option(
            "Most bytes of all files in --kv-disk; bytes or with K, M, G, Ki, Mi, Gi.",
            Group.MEMORY,
            least=1,
            most=2**63 - 1,
            metavar="SIZE",
            parse=parse_size,
            unset="32Gi",
        ),
    ] = None
    """Most bytes that all files in `kv_disk` take together; those used longest ago are removed. None is 32 GiB."""
    enable_prefix_caching: Annotated[
        bool, Option("Go on from the KV of earlier prompts and answers.", Group.MEMORY, only_servers=True)
    ] = True
    """Whether the KV of prompts and answers is kept, and reused when a prompt starts with the same tokens."""
    state_snapshot_tokens: Annotated[
        int | None,
        Option(
            "Keep a recurrent model's state every so many tokens of a prompt, whole pages.",
            Group.MEMORY,
            least=1,
            most=MAX_COUNT,
            unset="tokens whose KV takes as much as a state, 512 or more",
            only_servers=True,
        ),
    ] = None
    """Tokens from one kept state of a prompt to the next, a multiple of `page_size`: where the prefix cache of a model
    with recurrent layers can go on, beside a prompt's last full page. None takes as many tokens as have the KV of a
    state's size, but at least 512."""
    max_num_batched_tokens: Annotated[
        int, Option("Most tokens that one rank computes in one step.", Group.SCHEDULING, least=1, most=MAX_COUNT)
    ] = 2048
    """Most tokens that one rank computes in one step."""
    max_num_seqs: Annotated[
        int, Option("Most requests that run at once.", Group.SCHEDULING, least=1, most=MAX_COUNT, only_servers=True)
    ] = 64
    """Most requests that run at once."""
    max_step_ms: Annotated[
        int | None,
        Option(
            "Cut prefill so that a step is predicted to take no longer; prompts that end in it may make it four times "
            "as long while no request waits for its next token; 0 cuts by tokens alone.",
            Group.SCHEDULING,
            least=1,
            most=MAX_COUNT,
            only_servers=True,
        ),
    ] = None
    """Longest step in milliseconds: chunks of prefill are cut so that a step is predicted to take no longer; None cuts
    by tokens alone."""
    async_scheduling: Annotated[
        bool,
        Option(
            "Submit the next step of decodes before the tokens of the one in flight are known.",
            Group.SCHEDULING,
            only_servers=True,
        ),
    ] = True
    """Whether the next step of decodes is submitted before the tokens of the one in flight are known; see
    `longspan.scheduler.scheduler`."""
    speculative_config: Annotated[
        dict[str, Any] | None,
        Option(
            "Check drafts of several tokens in one step: the same tokens, in fewer steps.",
            Group.SCHEDULING,
            metavar="JSON",
            parse=parse_json,
            unset="none",
        ),
    ] = None
    """Speculative decoding, in vLLM's spelling.
    `{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}` looks the 4 newest tokens of a request up
    among its earlier ones, and checks the 4 that followed there. At most 32 drafts and n-grams of 64 tokens;
    `prompt_lookup_min` is `prompt_lookup_max` if it is not given, and both are 5 without either.
    `{"method": "draft_model", "model": "DIR", "num_speculative_tokens": 4}` checks what a smaller model with the same
    tokenizer generates. See docs/speculation.md."""
    listen: Annotated[
        str | None, Option("Where workers on other hosts find the driver.", Group.NETWORK, metavar="HOST:PORT")
    ] = None
    """Address HOST:PORT where the driver waits for workers on other hosts, on an interface that they reach."""
    secret_file: Annotated[
        str | None,
        Option(
            "File with the secret of driver and workers on other hosts.",
            Group.NETWORK,
            metavar="FILE",
            unset="the variable LONGSPAN_SECRET",
        ),
    ] = None
    """File that holds the secret of driver and workers on other hosts; None reads the variable LONGSPAN_SECRET."""
    ray_address: Annotated[
        str | None,
        Option(
            "Address of a Ray cluster.",
            Group.NETWORK,
            metavar="ADDRESS",
            unset="RAY_ADDRESS, or a cluster on this machine",
        ),
    ] = None
    """Address of a Ray cluster; None takes the variable RAY_ADDRESS, or starts a cluster on this machine."""
    ray_placement: Annotated[
        RayPlacementName, Option("Ranks on as few of Ray's nodes as possible, or spread over as many.", Group.NETWORK)
    ] = "pack"
    """Placement of ranks on Ray's nodes: on as few as possible (`pack`), or spread over as many (`spread`)."""
    interface: Annotated[
        str | None,
        Option(
            "Network interface of Ray's nodes, such as eth0.",
            Group.NETWORK,
            metavar="NAME",
            unset="the one towards rank 0 or the driver",
        ),
    ] = None
    """Network interface of Ray's nodes for messages between ranks; None takes that of the route to rank 0's node, or to
    the driver."""
    connect_timeout_s: Annotated[
        float,
        Option("Longest wait for all workers to connect.", Group.NETWORK, above=0, most=MAX_TIMEOUT_S, note="seconds"),
    ] = 120.0
    """Longest wait for all worker processes to connect to the driver, in seconds."""
    exchange_timeout_s: Annotated[
        float,
        Option(
            "Longest wait of a rank for a peer; 5 s more without progress, or 30 s of silence, is a loss too.",
            Group.NETWORK,
            above=0,
            most=MAX_TIMEOUT_S,
            note="seconds",
        ),
    ] = 300.0
    """Longest wait for a peer in one exchange, in seconds. A rank is lost if it owes an answer and makes no progress
    for 5 s more than this, or if its process gives no sign of life for as long, or for 30 s if that is less."""
    topology: Annotated[
        str | None,
        Option("Nodes, links and rates from a file.", Group.NETWORK, metavar="FILE", unset="measured at the start"),
    ] = None
    """YAML or JSON file with the cluster's nodes, links and rates, as `longspan topology --save` writes it; None
    measures them when the ranks have started."""
    measure: Annotated[
        MeasureName,
        Option("Measure links and kernels again, or never; auto keeps what was measured before.", Group.NETWORK),
    ] = "auto"
    """Whether ranks measure themselves. `auto` keeps what was measured once on the same machine with the same ranks;
    `again` replaces it; `never` chooses strategies by bytes alone. LONGSPAN_MEASURE=never in the environment turns
    `auto` into `never`. Ranks that are threads never measure."""
    check_messages: Annotated[bool, Option("A checksum with every message between ranks.", Group.DEBUGGING)] = False
    """Whether every message between ranks has a checksum; a damaged message counts as a loss of the ranks."""
    check_invariants: Annotated[
        int,
        Option(
            "Check the books of all pages every N plans, and when idle; 0: never.",
            Group.DEBUGGING,
            least=0,
            most=MAX_COUNT,
            metavar="N",
        ),
    ] = 0
    """Plans between two integrity checks of all page bookkeeping, which is checked too whenever no request is left; 0
    never checks. For tests and debugging: a failed check ends the engine."""
    profile: Annotated[
        str | None,
        Option("Write a profile of each rank's first plans to a directory.", Group.DEBUGGING, metavar="DIR"),
    ] = None
    """Directory for a trace of PyTorch's profiler from each rank, `rank-N.json`: of its first 64 plans, or as many as
    it runs. Ranks of other hosts write to theirs."""
    simulated_links: Annotated[
        str | None,
        Option(
            "For tests and benchmarks: hold messages between pretended nodes back, as in "
            "'nodes=0,0,1,1 latency_us=500 mbit_per_s=1000'.",
            Group.DEBUGGING,
            metavar="LINKS",
        ),
    ] = None
    """Simulation, for tests and benchmarks only: ranks of one machine count as on several nodes, and messages between
    nodes are held back. Example: `nodes=0,0,1,1 latency_us=500 mbit_per_s=1000`; see `longspan.simulation`."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ConfigError(f"model: got {self.model!r}, legal is a text that names one")
        self._take_adapters()
        take_texts_(self)
        check_options(self)
        self._check_overrides()
        self._check_speculation()
        self._check_device()
        self._check_cpu_binding()
        self._check_tensor_parallel()
        if self.topology is not None and self.measure == "again":
            raise ConfigError("measure: got 'again' with a topology file, whose numbers hold, legal is auto or never")
        if self.executor == "threads" and self.measure == "again":
            raise ConfigError("measure: got 'again' with executor 'threads', legal there is auto or never")
        self._check_nodes()
        self._check_weights()
        if self.stripe_size % self.page_size:
            raise ConfigError(
                f"stripe_size: got {self.stripe_size}, legal is a multiple of page_size ({self.page_size})"
            )
        if self.state_snapshot_tokens is not None and self.state_snapshot_tokens % self.page_size:
            raise ConfigError(
                f"state_snapshot_tokens: got {self.state_snapshot_tokens}, legal is a multiple of page_size "
                f"({self.page_size})"
            )
        self._check_tiers()
        self._check_link()
        self._check_min_ranks()
        if self.check_invariants and not __debug__:
            raise ConfigError("check_invariants: got it with python -O, which drops them; legal is Python without -O")
        if self.simulated_links is not None:
            parse_simulated_links(self.simulated_links, self.context_parallel_size)
        self._check_strategies()
        if self.profile is not None and self.executor == "threads" and self.context_parallel_size > 1:
            raise ConfigError(
                f"profile: got {self.profile!r} with executor 'threads' and {self.context_parallel_size} ranks, legal "
                "there is one rank: a profile is of a whole process"
            )

    def _check_cpu_binding(self) -> None:
        parse_cpu_binding(self.cpu_binding, self.context_parallel_size * self.tensor_parallel_size)
        if self.cpu_binding != "none" and (self.executor != "processes" or self.device == "cuda"):
            raise ConfigError(
                f"cpu_binding: got {self.cpu_binding!r} with executor {self.executor!r} and device {self.device!r}, "
                "legal there is none: processes of this machine that compute on CPUs are bound"
            )

    def _check_speculation(self) -> None:
        """Refuse illegal values, and what a draft model beside this one cannot do yet."""
        if (draft := self.draft_model) is None:
            return
        for name, legal in (("device", "cpu"), ("tensor_parallel_size", 1)):
            value = getattr(self, name)
            if value != legal and value != "auto":
                raise ConfigError(
                    f"speculative_config: got the draft model {draft!r} with {name} {value!r}, legal there is "
                    f"{name} {legal!r}"
                )

    def _check_overrides(self) -> None:
        fields = self.hf_overrides
        if fields is None:
            return
        try:
            if isinstance(fields, dict) and all(isinstance(name, str) for name in fields):
                json.dumps(fields, allow_nan=False)
                return
        except (TypeError, ValueError):
            pass
        raise ConfigError(f"hf_overrides: got {fields!r}, legal is a dict of fields of the model's config, as in JSON")

    def _take_adapters(self) -> None:
        """Take a lone text, a list or a dict for the tuple that it stands for, and check names.

        Raises:
            ConfigError: an entry is illegal, a name is given twice, or two adapters are to be merged.
        """
        given: Any = self.lora
        if isinstance(given, dict):
            given = [f"{name}={directory}" for name, directory in given.items()]
        entries = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else None
        if entries is None or not all(isinstance(entry, str) and entry for entry in entries):
            raise ConfigError(f"lora: got {given!r}, legal is NAME=DIR or DIR, or several of them")
        msgspec.structs.force_setattr(self, "lora", entries)
        names: set[str] = set()
        num_merged = 0
        for entry in entries:
            name, directory = split_adapter(entry)
            if name is None:
                num_merged += 1
                continue
            check_adapter_name(name, entry)
            if not directory:
                raise ConfigError(f"lora: got {entry!r}, legal is a directory behind the name")
            if name in names or name == self.model:
                owner = "another adapter" if name in names else "the model"
                raise ConfigError(f"lora: got {entry!r}, whose name is that of {owner}, legal is another one")
            names.add(name)
        if num_merged > 1:
            raise ConfigError(f"lora: got {num_merged} without a name, legal is one, which is merged into the weights")

    def _check_strategies(self) -> None:
        if self.context_parallel_size == 1 or self.placement not in ("striped", "spill"):
            return
        for name in ("strategy", "decode_strategy"):
            if getattr(self, name) == "local":
                raise ConfigError(
                    f"{name}: got 'local' with placement {self.placement!r} on {self.context_parallel_size} ranks, "
                    "which must exchange; legal is auto, gather_kv, pass_kv, pass_q or tree, or placement packed"
                )

    def _check_device(self) -> None:
        if self.device == "cpu" and self.dtype == "float16":
            raise ConfigError("dtype: got 'float16' with device 'cpu', legal there is auto, float32 or bfloat16")
        if self.device == "cpu" and self.kv_cache_dtype == "float16":
            legal = "auto, float32, bfloat16, int8 or fp8_e4m3"
            raise ConfigError(f"kv_cache_dtype: got 'float16' with device 'cpu', legal there is {legal}")
        if self.device == "cpu" and self.compile_dense:
            raise ConfigError("compile_dense: got true with device 'cpu', legal there is false")
        if self.merged_lora is not None and self.quantization == "keep":
            raise ConfigError(
                f"lora: got {self.merged_lora!r} with quantization 'keep', legal there is NAME=DIR: kept weights are "
                "not merged"
            )
        if self.adapters and self.compile_dense:
            raise ConfigError("compile_dense: got true with adapters of requests (lora), legal there is false")
        if self.device != "cuda":
            return
        if self.quantization != "none":
            raise ConfigError(f"quantization: got {self.quantization!r} with device 'cuda', legal there is none")
        if self.measure == "again":
            raise ConfigError("measure: got 'again' with device 'cuda', legal there is auto or never")
        if self.check_messages:
            raise ConfigError("check_messages: got true with device 'cuda', legal there is false")
        if self.simulated_links is not None:
            raise ConfigError("simulated_links: got some with device 'cuda', legal there is none")

    def _check_tensor_parallel(self) -> None:
        """Refuse what processes that share a rank's weights cannot do yet."""
        size = self.tensor_parallel_size
        if size == 1:
            return
        if self.context_parallel_size * size > MAX_RANKS:
            raise ConfigError(
                f"tensor_parallel_size: got {size} with context_parallel_size {self.context_parallel_size}, legal is "
                f"{MAX_RANKS // self.context_parallel_size} at most, which makes {MAX_RANKS} processes"
            )
        for name, legal in (("quantization", "none"), ("compile_dense", False)):
            if (value := getattr(self, name)) != legal:
                shown = str(legal).lower()
                raise ConfigError(f"{name}: got {value!r} with tensor_parallel_size {size}, legal there is {shown}")
        if self.adapters:
            raise ConfigError(
                f"lora: got the adapter {next(iter(self.adapters))!r} of requests with tensor_parallel_size {size}, "
                "legal there is one that is merged (DIR without a name)"
            )
        for name in ("kv_host_memory", "kv_disk"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}: got one with tensor_parallel_size {size}, legal there is none")

    def _check_tiers(self) -> None:
        for name, value in (("kv_host_memory", self.kv_host_memory), ("kv_disk", self.kv_disk)):
            if value is not None and self.device == "cuda":
                raise ConfigError(f"{name}: got one with device 'cuda', legal there is none")
            if value is not None and not self.enable_prefix_caching:
                raise ConfigError(f"{name}: got one without prefix caching, legal is one with it")
        if self.kv_disk is None:
            if self.kv_disk_size is not None:
                raise ConfigError(f"kv_disk_size: got {self.kv_disk_size} without kv_disk, legal is none there")
            return
        if not isinstance(self.kv_disk, str) or not self.kv_disk:
            raise ConfigError(f"kv_disk: got {self.kv_disk!r}, legal is the name of a directory")
        if self.executor in REMOTE_EXECUTORS:
            raise ConfigError(
                f"kv_disk: got one with executor {self.executor!r}, legal there is none: its hosts share no disk"
            )

    def _check_nodes(self) -> None:
        if isinstance(self.nodes, list):
            msgspec.structs.force_setattr(self, "nodes", tuple(self.nodes))
        nodes, size = self.nodes, self.context_parallel_size
        if nodes is None:
            return
        if self.simulation is not None and self.simulation.nodes != nodes:
            raise ConfigError(
                f"nodes: got {nodes!r} with simulated_links that say {self.simulation.nodes}, legal is the same"
            )
        is_legal = isinstance(nodes, tuple) and all(is_number(n, whole=True) for n in nodes)
        if not is_legal or len(nodes) != size or set(nodes) != set(range(len(set(nodes)))):
            raise ConfigError(
                f"nodes: got {nodes!r}, legal is one node for each of {size} ranks, counted from 0 without gaps"
            )

    def _check_weights(self) -> None:
        weights, size = self.rank_weights, self.context_parallel_size
        if isinstance(weights, list):
            msgspec.structs.force_setattr(self, "rank_weights", weights := tuple(weights))
        if weights is None or weights == "auto":
            return
        is_legal = isinstance(weights, tuple) and all(is_number(weight) and weight > 0 for weight in weights)
        if not is_legal or len(weights) != size:
            raise ConfigError(
                f"rank_weights: got {weights!r}, legal is auto, or one number above 0 for each of {size} ranks"
            )

    def _check_link(self) -> None:
        """Check that options of the link to workers on other hosts are given if needed, and only then."""
        if self.listen is not None:
            parse_listen(self.listen)
        elif self.executor == "external":
            raise ConfigError(
                "listen: got none with executor 'external', legal is HOST:PORT where workers find the driver"
            )
        for name, executors in (
            *((name, REMOTE_EXECUTORS) for name in ("listen", "secret_file")),
            *((name, ("ray",)) for name in ("ray_address", "interface")),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or self.executor not in executors):
                raise ConfigError(
                    f"{name}: got {value!r} with executor {self.executor!r}, legal is a text with executor "
                    f"{' or '.join(executors)}, or none"
                )
        if self.ray_placement != "pack" and self.executor != "ray":
            raise ConfigError(
                f"ray_placement: got {self.ray_placement!r} with executor {self.executor!r}, legal is executor ray"
            )

    def _check_min_ranks(self) -> None:
        if self.min_ranks is None:
            return
        if self.min_ranks > self.context_parallel_size:
            raise ConfigError(
                f"min_ranks: got {self.min_ranks}, legal is a whole number from 1 to {self.context_parallel_size}"
            )
        if not self.may_lose_ranks:
            raise ConfigError(
                f"min_ranks: got {self.min_ranks}, legal is none without max_restarts, and with executor external, "
                "a topology file or simulated links: all ranks are started again there, or none"
            )

    @property
    def merged_lora(self) -> str | None:
        """Directory of the adapter that is merged into the weights, or None."""
        return next((directory for name, directory in map(split_adapter, self.lora) if name is None), None)

    @property
    def adapters(self) -> dict[str, str]:
        """Directories of the adapters that requests name, by name."""
        found = [split_adapter(entry) for entry in self.lora]
        return {name: directory for name, directory in found if name is not None}

    @property
    def has_tiers(self) -> bool:
        """Whether anything keeps pages behind the ranks' pools."""
        return self.kv_host_memory is not None or self.kv_disk is not None

    @property
    def disk_bytes(self) -> int | None:
        """Most bytes of all files in `kv_disk`; None without a disk."""
        if self.kv_disk is None:
            return None
        return DEFAULT_DISK_BYTES if self.kv_disk_size is None else self.kv_disk_size

    @property
    def may_lose_ranks(self) -> bool:
        """Whether fewer ranks go on where not all can be started again."""
        is_fixed = self.executor == "external" or self.topology is not None or self.simulated_links is not None
        return self.max_restarts != 0 and not is_fixed

    @property
    def known_nodes(self) -> tuple[int, ...] | None:
        """Node of each rank if options name them; None makes the ranks of one host a node."""
        return self.nodes if self.simulation is None else self.simulation.nodes

    @property
    def known_weights(self) -> tuple[float, ...] | None:
        """Weight of each rank if the option names them; None makes all ranks equal, unless `auto` finds out later."""
        return self.rank_weights if isinstance(self.rank_weights, tuple) else None

    @property
    def stop_s(self) -> float:
        """Seconds that idle ranks may take to end when asked, and to write what they have recorded."""
        return 1.0 if self.profile is None else 60.0

    @property
    def num_threads(self) -> int:
        """Compute threads of one process of a rank."""
        processes = self.context_parallel_size * self.tensor_parallel_size
        listed = parse_cpu_binding(self.cpu_binding, processes)
        cores = num_cores() // processes if listed is None else min(map(len, listed))
        return self.threads_per_rank or max(1, cores)

    @property
    def speculation(self) -> NgramDrafts | ModelDrafts | None:
        """What `speculative_config` says, or None."""
        return None if self.speculative_config is None else read_speculation(self.speculative_config)

    @property
    def draft_model(self) -> str | None:
        """Model that makes drafts, or None."""
        speculation = self.speculation
        return speculation.model if isinstance(speculation, ModelDrafts) else None

    @property
    def simulation(self) -> SimulatedLinks | None:
        """Parsed value of `simulated_links`, or None."""
        text = self.simulated_links
        return None if text is None else parse_simulated_links(text, self.context_parallel_size)

    @property
    def striped_from(self) -> int:
        """Tokens of a prompt from which placement `auto` stripes it, where nothing was measured."""
        # From two whole stripes per rank on, striping balances the work and pays for its exchanges.
        return self.min_striped_len or 2 * self.context_parallel_size * self.stripe_size

    @property
    def forced_strategy(self) -> Strategy | None:
        """Strategy forced for prefill, or None."""
        return None if self.strategy == "auto" else Strategy(self.strategy)

    @property
    def forced_decode_strategy(self) -> Strategy | None:
        """Strategy forced for decode, or None."""
        name = self.decode_strategy or self.strategy
        return None if name == "auto" else Strategy(name)

    @property
    def forced_state_parts(self) -> int | None:
        """Parts in which every state is handed on, or None. Only kernels for CPUs compute head by head."""
        return 1 if self.state_parts is None and self.device == "cuda" else self.state_parts

    @property
    def forced_placement(self) -> Placement | None:
        """Placement forced for every request, or None. With the strategy `local`, only `packed` is possible."""
        if self.placement == "auto":
            return Placement.PACKED if "local" in (self.strategy, self.decode_strategy) else None
        return Placement(self.placement)
