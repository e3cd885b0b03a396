"""Engine configuration: every option a user can set, checked once.

Holds values and their legal ranges. Must not know torch, models or processes.
Read next: `longspan.llm` and `longspan.cli`, the two ways to set these.
"""

import math
import os
import re
from fractions import Fraction
from typing import Literal, get_args

import msgspec

from longspan.errors import ConfigError
from longspan.simulation import SimulatedLinks, parse_simulated_links
from longspan.types import Placement, Strategy

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
PlacementName = Literal["auto", "packed", "striped", "spill"]
StrategyName = Literal["auto", "local", "gather_kv", "pass_kv", "pass_q", "tree"]
PartialDTypeName = Literal["auto", "float32"]
ExecutorName = Literal["processes", "threads", "external", "ray"]
REMOTE_EXECUTORS = ("external", "ray")
"""Their workers reach the driver over the network."""
RayPlacementName = Literal["pack", "spread"]
AttentionName = Literal["auto", "cpu", "reference", "triton", "flashinfer", "torch"]
GraphsName = Literal["auto", "never"]
MeasureName = Literal["auto", "again", "never"]

MAX_RANKS = 128
MAX_THREADS = 1024
MAX_COUNT = 2**31 - 1
"""Of tokens and requests."""
MAX_TIMEOUT_S = 10**6

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str | int, field: str = "size") -> int:
    """Bytes of a size such as `2GiB`, `500M` or `1048576`.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(text), re.IGNORECASE)
    num_bytes = int(Fraction(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if num_bytes <= 0:
        raise ConfigError(f"{field}: got {text!r}, legal is a positive number of bytes or with K, M, G, Ki, Mi, Gi (B)")
    return num_bytes


def parse_tokens(text: str | int, field: str = "context") -> int:
    """Tokens of a length such as `8k`, `1M` or `131072`. As usual for contexts, k is 1024 and M is 1024 * 1024.

    Raises:
        ConfigError: not a positive number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([km]?)\s*", str(text), re.IGNORECASE)
    tokens = Fraction(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2].upper()] if match else Fraction(0)
    if tokens.denominator != 1 or not 1 <= tokens <= MAX_COUNT:
        raise ConfigError(
            f"{field}: got {text!r}, legal is a whole number of tokens from 1 to {MAX_COUNT}, also with k (1024) or M "
            "(1024 * 1024)"
        )
    return int(tokens)


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ConfigError: it is not HOST:PORT.
    """
    match = re.fullmatch(r"([A-Za-z0-9._-]+):(\d{1,5})", text, re.ASCII) if isinstance(text, str) else None
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ConfigError(f"listen: got {text!r}, legal is HOST:PORT with a name or IPv4 address, and 1 to 65535")
    return match[1], int(match[2])


def check_driver_address(text: str) -> None:
    """Raises: ConfigError, if this is not where a driver can be found."""
    if not re.fullmatch(r"tcp://[A-Za-z0-9._-]+:\d{1,5}", text, re.ASCII):
        raise ConfigError(f"driver: got {text!r}, legal is tcp://HOST:PORT as the driver's option listen has it")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to split and run one model.

    Raises:
        ConfigError: a value is illegal, or two values contradict each other.
    """

    model: str
    """A directory, `recall` (the bundled model), or a Hub id."""
    context_parallel_size: int = 1
    """Ranks that share a sequence."""
    threads_per_rank: int | None = None
    """Compute threads of one rank; None is cores / ranks."""
    device: DeviceName = "auto"
    """What ranks compute on, each on a GPU of its own; auto is the GPUs of this machine if there is one for each rank,
    and the CPU with the executors `external` and `ray`, or where another option needs it."""
    dtype: DTypeName = "auto"
    """Weights, activations and KV; auto is float32 on a CPU and bfloat16 on a GPU; float16 needs a GPU."""
    placement: PlacementName = "auto"
    strategy: StrategyName = "auto"
    """Forces the strategy of both phases."""
    decode_strategy: StrategyName | None = None
    """Overrides `strategy` for decode."""
    partial_dtype: PartialDTypeName = "auto"
    """In which partials travel; auto is the dtype of keys and values: rounded once."""
    nodes: tuple[int, ...] | None = None
    """Per rank, the node that it runs on, counted from 0; None: all ranks of one host are a node."""
    page_size: int = 16
    """Tokens per page."""
    stripe_size: int = 512
    """Most tokens per stripe, a multiple of `page_size`. Short chunks are cut into shorter stripes."""
    min_striped_len: int | None = None
    """Shorter prompts stay on one rank where placement is auto; None is what is predicted to be best for a lone
    request, or, where nothing was measured, two stripes per rank."""
    kv_cache_memory: int | None = None
    """Bytes per rank; None takes 4 GiB, or what half of the free memory admits, and on a GPU most of what is free
    beside the weights."""
    max_num_batched_tokens: int = 2048
    """Most tokens that one rank computes in one step."""
    max_step_ms: int | None = None
    """Chunks of prefill are cut so that a step is predicted to take no longer; None cuts by tokens alone."""
    enable_prefix_caching: bool = True
    """Keep the KV of prompts and answers, and go on from it when a prompt starts the same."""
    async_scheduling: bool = True
    """Submit the next step of decodes before the tokens of the one in flight are known; see `longspan.scheduler`."""
    max_num_seqs: int = 64
    """Most requests that run at once."""
    attention_backend: AttentionName = "auto"
    """Attention kernels; auto is cpu on a CPU, and on a GPU triton, or torch where Triton is not installed."""
    cuda_graphs: GraphsName = "auto"
    """Decode steps have fixed shapes with the backends triton and flashinfer, and on a GPU each shape becomes a CUDA
    graph; `never` launches every kernel by itself."""
    compile_dense: bool = False
    """On a GPU, let `torch.compile` fuse norms and MLPs; the first steps take seconds longer."""
    executor: ExecutorName = "processes"
    """One worker process per rank on this machine; one thread of this process per rank (for tests and debugging);
    workers on any hosts, which somebody else starts (`external`); or one actor of a Ray cluster per rank (`ray`)."""
    topology: str | None = None
    """A YAML or JSON file with the cluster's nodes, links and rates, as `longspan topology --save` writes it; None
    measures them when the ranks have started."""
    measure: MeasureName = "auto"
    """Whether ranks measure themselves: `auto` keeps what was measured once on the same machine with the same ranks;
    `again` replaces it; `never` chooses strategies by bytes alone. With `auto`, LONGSPAN_MEASURE=never in the
    environment means the same. Ranks that are threads never measure."""
    listen: str | None = None
    """HOST:PORT where the driver waits for workers on other hosts: an address of the interface that they reach."""
    secret_file: str | None = None
    """Holds the secret that driver and workers on other hosts share; None reads the variable LONGSPAN_SECRET."""
    ray_address: str | None = None
    """Of a Ray cluster; None takes the variable RAY_ADDRESS, or starts a cluster on this machine."""
    ray_placement: RayPlacementName = "pack"
    """Ranks on as few of Ray's nodes as possible, or spread over as many."""
    interface: str | None = None
    """Network interface of Ray's nodes for messages between ranks; None leaves the choice to Ray and gloo."""
    exchange_timeout_s: float = 300.0
    """Longest wait for a peer in one exchange. A rank that owes an answer and gets no further for 5 s more is lost, as
    is one whose process gives no sign of life for so long, or for 30 s."""
    connect_timeout_s: float = 120.0
    """Longest wait for all worker processes to connect to the driver."""
    max_restarts: int = 0
    """Most times within 10 minutes that ranks which were lost are replaced, and all that ran is computed again; one
    more fails every request. 0 replaces none. With `external`, whoever starts the workers has to start all of them
    again: the driver waits for them as it did at first."""
    min_ranks: int | None = None
    """Fewest ranks to go on with, if ranks that were lost cannot all be started again; None is one. Not with
    `external`, a topology file or simulated links, which say how many there are."""
    check_messages: bool = False
    """Send a checksum with every message between ranks; one that was damaged counts as a loss of the ranks."""
    check_invariants: int = 0
    """Check the books of all pages after so many plans, and whenever no request is left; 0 never does. For tests, and
    whoever suspects them: a broken one ends the engine."""
    simulated_links: str | None = None
    """Simulation, for tests and benchmarks only: pretend that ranks of one machine are on several nodes, and hold back
    the messages between nodes. Such as `nodes=0,0,1,1 latency_us=500 mbit_per_s=1000`; see `longspan.simulation`."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ConfigError(f"model: got {self.model!r}, legal is a text: a directory, 'recall' or a Hub id")
        for name in ("page_size", "stripe_size", "max_num_batched_tokens", "max_num_seqs"):
            self._check_count(name, getattr(self, name))
        if self.threads_per_rank is not None:
            self._check_count("threads_per_rank", self.threads_per_rank, MAX_THREADS)
        if self.min_striped_len is not None:
            self._check_count("min_striped_len", self.min_striped_len)
        if self.max_step_ms is not None:
            self._check_count("max_step_ms", self.max_step_ms)
        for name in ("enable_prefix_caching", "async_scheduling", "check_messages", "compile_dense"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, legal is true or false")
        if self.kv_cache_memory is not None:
            self._check_count("kv_cache_memory", self.kv_cache_memory, 2**63 - 1)
        self._check_count("context_parallel_size", self.context_parallel_size, MAX_RANKS)
        for name, legal in (
            ("device", DeviceName),
            ("dtype", DTypeName),
            ("placement", PlacementName),
            ("strategy", StrategyName),
            ("decode_strategy", StrategyName),
            ("executor", ExecutorName),
            ("attention_backend", AttentionName),
            ("cuda_graphs", GraphsName),
            ("partial_dtype", PartialDTypeName),
            ("ray_placement", RayPlacementName),
            ("measure", MeasureName),
        ):
            value = getattr(self, name)
            if value not in get_args(legal) and not (name == "decode_strategy" and value is None):
                raise ConfigError(f"{name}: got {value!r}, legal is one of {', '.join(get_args(legal))}")
        self._check_device()
        if self.topology is not None and self.measure == "again":
            raise ConfigError("measure: got 'again' with a topology file, whose numbers hold, legal is auto or never")
        self._check_nodes()
        if self.stripe_size % self.page_size:
            raise ConfigError(
                f"stripe_size: got {self.stripe_size}, legal is a multiple of page_size ({self.page_size})"
            )
        for name in ("exchange_timeout_s", "connect_timeout_s"):
            timeout = getattr(self, name)
            if not isinstance(timeout, (int, float)) or not math.isfinite(timeout) or not 0 < timeout <= MAX_TIMEOUT_S:
                raise ConfigError(
                    f"{name}: got {timeout!r}, legal is a number above 0 and up to {MAX_TIMEOUT_S} (seconds)"
                )
        self._check_link()
        self._check_restarts()
        if type(self.check_invariants) is not int or self.check_invariants != 0:
            self._check_count("check_invariants", self.check_invariants)
        if self.check_invariants and not __debug__:
            raise ConfigError("check_invariants: got it with python -O, which drops them; legal is Python without -O")
        if self.simulated_links is not None:
            parse_simulated_links(self.simulated_links, self.context_parallel_size)
        if self.context_parallel_size > 1 and self.placement in ("striped", "spill"):
            for name in ("strategy", "decode_strategy"):
                if getattr(self, name) == "local":
                    raise ConfigError(
                        f"{name}: got 'local' with placement {self.placement!r} on {self.context_parallel_size} ranks, "
                        "which must exchange; legal is auto, gather_kv, pass_kv, pass_q or tree, or placement packed"
                    )

    def _check_device(self) -> None:
        if self.device == "cpu" and self.dtype == "float16":
            raise ConfigError("dtype: got 'float16' with device 'cpu', legal there is auto, float32 or bfloat16")
        if self.device == "cpu" and self.compile_dense:
            raise ConfigError("compile_dense: got true with device 'cpu', legal there is false")
        if self.device != "cuda":
            return
        if self.measure == "again":
            raise ConfigError("measure: got 'again' with device 'cuda', legal there is auto or never")
        if self.check_messages:
            raise ConfigError("check_messages: got true with device 'cuda', legal there is false")
        if self.simulated_links is not None:
            raise ConfigError("simulated_links: got some with device 'cuda', legal there is none")

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
        is_legal = isinstance(nodes, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in nodes)
        if not is_legal or len(nodes) != size or set(nodes) != set(range(len(set(nodes)))):
            raise ConfigError(
                f"nodes: got {nodes!r}, legal is one node for each of {size} ranks, counted from 0 without gaps"
            )

    def _check_link(self) -> None:
        """Options of the link to workers on other hosts: there if they are needed, and only then."""
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

    def _check_restarts(self) -> None:
        most = self.max_restarts
        if self.min_ranks is not None:
            self._check_count("min_ranks", self.min_ranks, self.context_parallel_size)
            if not self.may_lose_ranks:
                raise ConfigError(
                    f"min_ranks: got {self.min_ranks}, legal is none without max_restarts, and with executor external, "
                    "a topology file or simulated links: all ranks are started again there, or none"
                )
        if type(most) is int and most == 0:
            return
        self._check_count("max_restarts", most)

    @staticmethod
    def _check_count(name: str, value: object, most: int = MAX_COUNT) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigError(f"{name}: got {value!r}, legal is a whole number from 1 to {most}")

    @property
    def may_lose_ranks(self) -> bool:
        """Whether fewer ranks go on where not all can be started again."""
        is_fixed = self.executor == "external" or self.topology is not None or self.simulated_links is not None
        return self.max_restarts != 0 and not is_fixed

    @property
    def known_nodes(self) -> tuple[int, ...] | None:
        """Per rank, its node, as far as options say; None leaves it to the hosts."""
        return self.nodes if self.simulation is None else self.simulation.nodes

    @property
    def num_threads(self) -> int:
        """Compute threads of one rank."""
        return self.threads_per_rank or max(1, num_cores() // self.context_parallel_size)

    @property
    def simulation(self) -> SimulatedLinks | None:
        """What `simulated_links` says."""
        text = self.simulated_links
        return None if text is None else parse_simulated_links(text, self.context_parallel_size)

    @property
    def striped_from(self) -> int:
        """Tokens of a prompt from which on `auto` stripes it, where nothing was measured."""
        # From two whole stripes per rank on, striping balances the work and pays for its exchanges.
        return self.min_striped_len or 2 * self.context_parallel_size * self.stripe_size

    @property
    def forced_strategy(self) -> Strategy | None:
        """The strategy forced for prefill, or None."""
        return None if self.strategy == "auto" else Strategy(self.strategy)

    @property
    def forced_decode_strategy(self) -> Strategy | None:
        """The strategy forced for decode, or None."""
        name = self.decode_strategy or self.strategy
        return None if name == "auto" else Strategy(name)

    @property
    def forced_placement(self) -> Placement | None:
        """The placement forced for every request, or None. `local` attention leaves only packed."""
        if self.placement == "auto":
            return Placement.PACKED if "local" in (self.strategy, self.decode_strategy) else None
        return Placement(self.placement)


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
