"""Where the numbers of the cost model come from: a file, an earlier start's measurement, or the ranks now.

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

from longspan.config import EngineConfig, num_cores
from longspan.costmodel.measured import combine
from longspan.costmodel.model_time import StepOptions
from longspan.costmodel.parameters import Costs
from longspan.costmodel.placement_choice import LONGEST_LEN, shortest_striped_len
from longspan.costmodel.shapes import ModelShape
from longspan.costmodel.topology_file import load_topology
from longspan.engine.executor import Executor
from longspan.errors import ConfigError
from longspan.native import kernels
from longspan.types import ModelSpec

MEASURE = "LONGSPAN_MEASURE"
"""Environment variable: `never` is what the option `measure` means with `auto`."""


class MeasuredOn(msgspec.Struct, frozen=True):
    """All that measured numbers depend on: a cache's key."""

    hosts: tuple[str, ...]
    """Per rank."""
    nodes: tuple[int, ...]
    cpu: str
    num_cores: int
    num_threads: int
    attention: str
    """Heads, widths, dtype and kernels."""
    num_parameters: int
    simulated_links: str | None
    executor: str
    """And the interface that it was told to use."""
    versions: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Of the cache's file."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        return platformdirs.user_cache_path("longspan") / f"measured-{digest}.json"


class _Cached(msgspec.Struct, frozen=True):
    measured_on: MeasuredOn
    costs: Costs


def nodes_of(config: EngineConfig, hosts: Sequence[str]) -> tuple[int, ...]:
    """Per rank, its node: as configured, or one per host.

    Args:
        config: may name the nodes.
        hosts: name of every rank's host.
    """
    if config.known_nodes is not None:
        return config.known_nodes
    names = list(dict.fromkeys(hosts))
    return tuple(names.index(host) for host in hosts)


def file_costs(config: EngineConfig, model: ModelSpec) -> Costs | None:
    """What the option `topology` names, or None if it names nothing.

    Raises:
        ConfigError: the file is not as it must be, or contradicts the option `nodes`.
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


def find_costs(config: EngineConfig, model: ModelSpec, executor: Executor, hosts: Sequence[str]) -> Costs | None:
    """The numbers for ranks that have started, and have no plan yet.

    Args:
        config: says whether to measure.
        model: whose shapes are measured.
        executor: the ranks.
        hosts: name of every rank's host.

    Returns:
        None where nothing is measured: one rank (unless asked to measure again), ranks that are threads or on GPUs, or
        as the user wants it.

    Raises:
        LongspanError: as `Executor.measure`.
    """
    nodes = nodes_of(config, hosts)
    asked = config.measure
    if asked == "auto" and os.environ.get(MEASURE) == "never":
        asked = "never"
    is_alone = config.context_parallel_size == 1 and asked != "again"  # and has nothing to choose
    if is_alone or config.executor == "threads" or config.device == "cuda" or asked == "never":
        return None
    measured_on = _measured_on(config, model, hosts, nodes)
    cached = _load(measured_on) if asked == "auto" else None
    if cached is not None:
        return cached
    costs = measure_costs(executor, nodes, hosts)
    _store(measured_on, costs)
    return costs


def measure_costs(executor: Executor, nodes: tuple[int, ...], hosts: Sequence[str]) -> Costs:
    """Let the ranks measure, whatever is known. Arguments and errors as in `find_costs`; `nodes` per rank."""
    names = list(dict.fromkeys(hosts))
    machines = tuple(names.index(host) for host in hosts)
    return combine(executor.measure(nodes, machines), nodes, machines)


def step_options(config: EngineConfig) -> StepOptions:
    """What of a config shapes the steps of a striped request."""
    return StepOptions(
        page_size=config.page_size,
        stripe_size=config.stripe_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )


def striped_from(
    config: EngineConfig, model: ModelSpec, costs: Costs, hidden_size: int, num_pages: Sequence[int]
) -> int | None:
    """Length from which on a prompt is predicted to be sooner done on all ranks.

    Args:
        config: may say it.
        model: whose prompts.
        costs: of the ranks.
        hidden_size: of the model.
        num_pages: of every rank, per KV group.

    Returns:
        Tokens; None where the user has said it, or there is one rank.
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
        pages * config.context_parallel_size * config.page_size
        for group, pages in zip(model.kv_groups, num_pages, strict=True)
        if group.spec.window is None
    )
    longest = min(*fitting, model.max_position or LONGEST_LEN, LONGEST_LEN)
    return shortest_striped_len(shape, costs, step_options(config), longest) or LONGEST_LEN


def _measured_on(config: EngineConfig, model: ModelSpec, hosts: Sequence[str], nodes: tuple[int, ...]) -> MeasuredOn:
    group = model.kv_groups[0]
    softcap = model.layer_params[group.layers[0]].softcap
    return MeasuredOn(
        hosts=tuple(hosts),
        nodes=nodes,
        cpu=_cpu_name(),
        num_cores=num_cores(),
        num_threads=config.num_threads,
        attention=(
            f"{config.attention_backend} {group.num_query_heads} {group.spec} {group.partial_dtype} {softcap} "
            f"{kernels.fingerprint()}"
        ),
        num_parameters=model.num_parameters,
        simulated_links=config.simulated_links,
        executor=f"{config.executor} {config.interface}",
        versions=(version("longspan"), str(torch.__version__), platform.python_version()),
    )


def _cpu_name() -> str:
    """The model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _load(measured_on: MeasuredOn) -> Costs | None:
    """What was measured before; None if nothing was, or the file is not ours to read."""
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
        draft.unlink()  # if it could not take its place
