"""Sources of the cost model's numbers: a file, the measurement of an earlier start, or a new measurement.

Holds the order of sources, and the cache in the user's cache directory. Must not know what is measured, or how.
Read next: `longspan.worker.measure`; `longspan.costmodel.parameters`.
"""

import contextlib
import hashlib
import os
import platform
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import platformdirs
import torch

from longspan.config import EngineConfig
from longspan.costmodel.measured import combine
from longspan.costmodel.model_time import StepOptions
from longspan.costmodel.parameters import Costs
from longspan.costmodel.placement_choice import LONGEST_LEN, shortest_striped_len
from longspan.costmodel.published import known_costs
from longspan.costmodel.shapes import ModelShape
from longspan.costmodel.topology_file import load_topology
from longspan.cpu_binding import num_cores
from longspan.engine.executor import Executor
from longspan.errors import ConfigError
from longspan.native import kernels
from longspan.sharding.geometry import StepGeometry
from longspan.types import ModelSpec

MEASURE = "LONGSPAN_MEASURE"
"""Environment variable; `never` makes the option `measure` mean `never` where it is `auto`."""


class MeasuredOn(msgspec.Struct, frozen=True):
    """Everything that measured numbers depend on: the key of the cache."""

    hosts: tuple[str, ...]
    """Host name of every rank."""
    nodes: tuple[int, ...]
    cpu: str
    num_cores: int
    num_threads: int
    tensor_parallel_size: int
    attention: str
    """Heads, widths, dtype and kernels, as text."""
    num_parameters: int
    quantization: str
    """Which weights are small, and the bytes of all, as text."""
    simulated_links: str | None
    executor: str
    """Executor, and the network interface and cores that it was told to use."""
    are_equal: bool
    """Whether the ranks are taken to be equally fast."""
    versions: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Path of the cache's file."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        return platformdirs.user_cache_path("longspan") / f"measured-{digest}.json"


class _Cached(msgspec.Struct, frozen=True):
    measured_on: MeasuredOn
    costs: Costs


def nodes_of(config: EngineConfig, hosts: Sequence[str]) -> tuple[int, ...]:
    """Return the node of every rank: as configured, or one node per host.

    Args:
        config: options, which may name the nodes.
        hosts: name of every rank's host.
    """
    if config.known_nodes is not None:
        return config.known_nodes
    names = list(dict.fromkeys(hosts))
    return tuple(names.index(host) for host in hosts)


def file_costs(config: EngineConfig, model: ModelSpec) -> Costs | None:
    """Return the costs in the file that the option `topology` names, or None without a file.

    Raises:
        ConfigError: the file is malformed, or contradicts the option `nodes`.
    """
    if config.topology is None:
        return None
    costs = load_topology(config.topology, config.context_parallel_size, model.kv_groups[0].spec.compute_dtype)
    nodes = config.known_nodes
    if nodes not in (None, costs.topology.nodes):
        raise ConfigError(
            f"nodes: got {nodes} with a topology file that says {costs.topology.nodes}, legal is the same"
        )
    return costs


def gpu_costs(config: EngineConfig, model: ModelSpec, names: Sequence[str]) -> Costs | None:
    """Return the costs of ranks on this machine's GPUs by published figures: such ranks do not measure themselves.

    Args:
        config: options; `measure` may turn this off.
        model: model whose dtype counts.
        names: name of every rank's GPU.

    Returns:
        None for one rank, ranks that share a GPU, GPUs elsewhere or of unknown kinds, or if `measure` is `never`.
    """
    size = config.context_parallel_size
    if config.device != "cuda" or size == 1 or len(names) != size or config.measure == "never":
        return None
    return known_costs(config.known_nodes or (0,) * size, names, model.kv_groups[0].spec.compute_dtype)


def find_costs(config: EngineConfig, model: ModelSpec, executor: Executor, hosts: Sequence[str]) -> Costs | None:
    """Return the costs of ranks that have started and run no plan yet.

    Args:
        config: options, which say whether to measure.
        model: model whose shapes are measured.
        executor: executor of the ranks.
        hosts: name of every rank's host.

    Returns:
        None where nothing is measured: one rank (unless asked to measure again), ranks that are threads or on GPUs, or
        `measure` is `never`.

    Raises:
        LongspanError: as in `Executor.measure`.
    """
    nodes = nodes_of(config, hosts)
    asked = config.measure
    if asked == "auto" and os.environ.get(MEASURE) == "never":
        asked = "never"
    is_alone = config.context_parallel_size == 1 and asked != "again"  # one rank has nothing to choose
    if is_alone or config.executor == "threads" or config.device == "cuda" or asked == "never":
        return None
    measured_on = _measured_on(config, model, hosts, nodes)
    cached = _load(measured_on) if asked == "auto" else None
    if cached is not None:
        return cached
    costs = measure_costs(executor, nodes, hosts, are_equal=config.rank_weights is None)
    _store(measured_on, costs)
    return costs


def measure_costs(executor: Executor, nodes: tuple[int, ...], hosts: Sequence[str], *, are_equal: bool = True) -> Costs:
    """Let the ranks measure, even if an earlier measurement is known.

    Args:
        executor: executor of the ranks, which run no plan yet.
        nodes: node of every rank.
        hosts: name of every rank's host.
        are_equal: whether the ranks are taken to be equally fast.

    Raises:
        LongspanError: as in `Executor.measure`.
    """
    names = list(dict.fromkeys(hosts))
    machines = tuple(names.index(host) for host in hosts)
    return combine(executor.measure(nodes, machines), nodes, machines, are_equal=are_equal)


def weights_of(config: EngineConfig, costs: Costs | None) -> tuple[float, ...] | None:
    """Return the weight of every rank: as configured, or with `auto` by its speed; None where all are equal.

    A rank that is slower than any weight could say has the weight of one page in every chunk.
    """
    if config.rank_weights != "auto":
        return config.known_weights
    if costs is None or costs.speeds is None:
        return None
    geometry = StepGeometry.of_rank_budget(1, config.page_size, config.stripe_size, config.max_num_batched_tokens)
    least = max(costs.speeds) * config.page_size / geometry.chunk_len
    return tuple([max(speed, least) for speed in costs.speeds])


def step_options(config: EngineConfig, costs: Costs | None) -> StepOptions:
    """Return the options that shape the steps of a striped request, on ranks with some costs."""
    return StepOptions(
        page_size=config.page_size,
        stripe_size=config.stripe_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        rank_weights=weights_of(config, costs),
        state_parts=config.forced_state_parts,
    )


def striped_from(
    config: EngineConfig, model: ModelSpec, costs: Costs, hidden_size: int, num_pages: Sequence[Sequence[int]]
) -> int | None:
    """Return the prompt length from which all ranks are predicted to be faster than one.

    Args:
        config: options, which may set the length.
        model: the model's facts.
        costs: costs of the ranks.
        hidden_size: width of the model's hidden states.
        num_pages: pages of every pool, [rank][KV group]; slots of states behind them do not matter.

    Returns:
        Tokens; None where the user has set the length, or there is one rank.
    """
    if config.min_striped_len is not None or config.context_parallel_size == 1:
        return None
    num_logit_weights = hidden_size * model.vocab_size
    shape = ModelShape(
        spec=model,
        dtype="bfloat16" if model.kv_groups[0].spec.compute_dtype == "bfloat16" else "float32",
        hidden_size=hidden_size,
        intermediate_size=4.0 * hidden_size,
        num_weights=model.num_parameters + num_logit_weights,
        num_logit_weights=num_logit_weights,
    )
    fitting = (
        sum(of_group) * config.page_size
        for group, of_group in zip(model.kv_groups, zip(*num_pages, strict=True), strict=False)
        if group.spec.reach is None
    )
    longest = min(*fitting, model.max_position or LONGEST_LEN, LONGEST_LEN)
    return shortest_striped_len(shape, costs, step_options(config, costs), longest) or LONGEST_LEN


def _measured_on(config: EngineConfig, model: ModelSpec, hosts: Sequence[str], nodes: tuple[int, ...]) -> MeasuredOn:
    group = model.kv_groups[0]
    softcap = model.attention_params(group.layers[0]).softcap
    return MeasuredOn(
        hosts=tuple(hosts),
        nodes=nodes,
        cpu=_cpu_name(),
        num_cores=num_cores(),
        num_threads=config.num_threads,
        tensor_parallel_size=config.tensor_parallel_size,
        attention=(
            f"{config.attention_backend} {group.num_query_heads} {group.spec} {group.partial_dtype} {softcap} "
            f"{kernels.fingerprint()}"
        ),
        num_parameters=model.num_parameters,
        quantization=f"{config.quantization} {model.weight_bytes}",
        simulated_links=config.simulated_links,
        executor=f"{config.executor} {config.interface} {config.cpu_binding}",
        are_equal=config.rank_weights is None,
        versions=(version("longspan"), str(torch.__version__), platform.python_version()),
    )


def _cpu_name() -> str:
    """Return the model name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _load(measured_on: MeasuredOn) -> Costs | None:
    """Return an earlier measurement; None if there is none, or its file cannot be read."""
    try:
        cached = msgspec.json.decode(measured_on.path.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError, ConfigError):
        return None
    is_whole = cached.measured_on == measured_on and cached.costs.topology.nodes == measured_on.nodes
    return cached.costs if is_whole else None


def _store(measured_on: MeasuredOn, costs: Costs) -> None:
    """Keep a measurement; where the directory cannot be written, the next start measures again."""
    path = measured_on.path
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.encode(_Cached(measured_on, costs)))
        os.replace(draft, path)
    with contextlib.suppress(OSError):
        draft.unlink()  # left over if it could not replace the file
