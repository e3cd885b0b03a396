"""`longspan plan`: memory and time of a model on a cluster, before anything is bought or loaded.

Holds options. Must not know how anything is predicted or shown, nor import torch before the options are known to be
legal.
Read next: `longspan.planner.report`; `longspan.cli.plan_text`, which shows the report.
"""

import sys
from typing import TYPE_CHECKING, cast, get_args

import click
import msgspec

from longspan.cli.help import GroupedCommand
from longspan.cli.pictures import check_plot
from longspan.config import KVDTypeName, parse_json
from longspan.costmodel.gpus import GPUS
from longspan.errors import ConfigError
from longspan.imports import quick_imports
from longspan.quantities import parse_size, parse_tokens, parse_weights

if TYPE_CHECKING:
    from longspan.costmodel.shapes import PlannedDType
    from longspan.planner.clusters import Cluster

ALIASES = {"a100": "a100-80g"}
"""Short names of known GPUs, for the usual one of several products."""

DEFAULT_CONTEXTS = "8k,128k,1M"


def _dtypes() -> click.Choice[str]:
    from longspan.costmodel.shapes import PlannedDType

    return click.Choice(list(get_args(PlannedDType)))


EXAMPLES = """longspan plan ./model --gpu h200 --context 128k,1M
longspan plan meta-llama/Llama-3.1-8B --gpu a100 --gpus-per-node 4 --nodes 2 --plot plan.png"""


@click.command(cls=GroupedCommand, examples=EXAMPLES)
@click.argument("model")
@click.option("--gpu", metavar="NAME", help=f"A known GPU: {', '.join([*GPUS, *ALIASES])}.")
@click.option("--gpus-per-node", type=int, help="Default: 8.")
@click.option("--nodes", type=int, help="Default: 1.")
@click.option("--cluster", metavar="FILE", help="A cluster in YAML or JSON, described or measured.")
@click.option("--memory", metavar="SIZE", help="Of one device, instead of the cluster's; as 80GB or 64GiB.")
@click.option("--tensor-parallel-size", type=int, default=1, show_default=True, help="Devices per rank.")
@click.option(
    "--context", default=DEFAULT_CONTEXTS, show_default=True, help="Tokens, with commas; k is 1024, M is 1024 * 1024."
)
@click.option("--dtype", type=_dtypes(), help="Default: that of measured rates, else bfloat16.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(get_args(KVDTypeName)),
    default="auto",
    show_default=True,
    help="Of stored keys and values; auto: that of the weights.",
)
@click.option("--load-rate", metavar="SIZE", help="Bytes per second that a rank loads from --kv-disk or host memory.")
@click.option(
    "--memory-utilization", type=float, default=0.9, show_default=True, help="Share that weights and KV may take."
)
@click.option("--max-num-batched-tokens", type=int, default=2048, show_default=True, help="Per rank and step.")
@click.option("--rank-weights", metavar="W,W,...", help="Memory and speed of every rank; the device is the largest's.")
@click.option("--hf-overrides", metavar="JSON", help="Fields of the model's config, in place of its file's.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object on standard output.")
@click.option("--plot", metavar="FILE.png", help="Write a picture of time and memory against the context.")
def plan(
    model: str,
    gpu: str | None,
    gpus_per_node: int | None,
    nodes: int | None,
    cluster: str | None,
    memory: str | None,
    tensor_parallel_size: int,
    context: str,
    dtype: str | None,
    kv_cache_dtype: str,
    load_rate: str | None,
    memory_utilization: float,
    max_num_batched_tokens: int,
    rank_weights: str | None,
    hf_overrides: str | None,
    as_json: bool,
    plot: str | None,
) -> None:
    """Predict memory and time of MODEL on a cluster.

    MODEL is a directory, a config file, a .gguf file, `recall`, `smollm2`, or a Hub id; its config only is read. What
    is assumed stands in the output.
    """
    contexts = [parse_tokens(text) for text in context.split(",")]
    if len(set(contexts)) < len(contexts):
        raise ConfigError(f"context: got {context!r} with a length twice, legal are different lengths")
    overrides = None if hf_overrides is None else parse_json(hf_overrides, "hf_overrides")
    weights = None if rank_weights is None else parse_weights(rank_weights)
    if weights == "auto":
        raise ConfigError("rank_weights: got 'auto', legal here is a number per rank: nothing is measured")
    memory_bytes = None if memory is None else parse_size(memory, "memory")
    described = _cluster(gpu, gpus_per_node, nodes, cluster, memory_bytes)
    if plot is not None:
        check_plot(plot)
    described.check_parallel(tensor_parallel_size)
    planned_dtype = cast("PlannedDType", dtype or described.rates_dtype or "bfloat16")
    described.peak_flops_per_s(planned_dtype)

    with quick_imports(for_good=True):
        from longspan.models.shape import load_shape
        from longspan.planner.report import make_plan

    report = make_plan(
        load_shape(model, planned_dtype, overrides, kv_cache_dtype),
        described,
        sorted(contexts),
        model=model,
        tensor_parallel_size=tensor_parallel_size,
        memory_utilization=memory_utilization,
        max_num_batched_tokens=max_num_batched_tokens,
        rank_weights=weights,
        load_bytes_per_s=None if load_rate is None else float(parse_size(load_rate, "load_rate")),
    )
    if plot is not None:
        from longspan.cli.plan_plot import write_plot

        write_plot(report, plot)
    if as_json:
        click.echo(msgspec.json.encode(report))
        return
    from longspan.cli.plan_text import print_plan

    print_plan(report, is_terminal=sys.stdout.isatty())


def _cluster(
    gpu: str | None, gpus_per_node: int | None, nodes: int | None, file: str | None, memory_bytes: int | None
) -> "Cluster":
    """The cluster, from exactly one of its two sources."""
    from longspan.planner.cluster_file import load_cluster
    from longspan.planner.clusters import known_cluster

    if (gpu is None) == (file is None):
        given = "none" if gpu is None else "both"
        raise ConfigError(
            f"cluster: got {given} of --gpu and --cluster, legal is exactly one; known GPUs are {', '.join(GPUS)}"
        )
    if file is not None:
        for name, value in (("--gpus-per-node", gpus_per_node), ("--nodes", nodes)):
            if value is not None:
                raise ConfigError(f"{name}: got {value} with --cluster, legal with --gpu only: the file says")
        return load_cluster(file, memory_bytes=memory_bytes)
    assert gpu is not None
    found = known_cluster(
        ALIASES.get(gpu.lower(), gpu), 8 if gpus_per_node is None else gpus_per_node, 1 if nodes is None else nodes
    )
    return found if memory_bytes is None else msgspec.structs.replace(found, memory_bytes=float(memory_bytes))
