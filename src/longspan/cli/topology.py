"""`longspan topology`: measured rates of the ranks and links here, and the strategies that follow from them.

Holds options and output. Must not know how anything is measured or predicted.
Read next: `longspan.engine.cost_parameters`; `longspan.costmodel.grid`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from longspan.cli.adapters import check_chosen
from longspan.cli.help import GroupedCommand
from longspan.cli.options import engine_config, options_of
from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.imports import quick_imports

if TYPE_CHECKING:
    from longspan.costmodel.grid import StepChoice
    from longspan.costmodel.parameters import Costs, Link


EXAMPLES = """longspan topology --context-parallel-size 2
longspan topology ./model --context-parallel-size 2 --save cluster.yaml"""


@click.command(cls=GroupedCommand, examples=EXAMPLES)
@click.argument("model", default="recall")
@options_of(EngineConfig, serves=False)
@click.option("--save", metavar="FILE", help="Write nodes, links and rates as YAML, for --topology and longspan plan.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def topology(model: str, save: str | None, as_json: bool, **options: Any) -> None:
    """Start ranks, measure them and their links with the shapes of MODEL, and say what the policy makes of it.

    Measures again, whatever is known, unless --topology names a file.
    """
    config = engine_config(model, options)
    assert not options
    check_chosen(config, None)
    if config.executor == "threads":
        raise ConfigError("executor: got 'threads', legal is processes, external or ray: threads never measure")
    if config.measure == "never":
        raise ConfigError("measure: got 'never', legal is auto or again")
    if config.device == "cuda":
        raise ConfigError("device: got 'cuda', legal is auto or cpu: ranks on GPUs do not measure themselves")
    if config.topology is None:
        config = msgspec.structs.replace(config, measure="again")

    from longspan.engine.processes import early_ranks

    with early_ranks(config) as launcher:
        with quick_imports(for_good=True):
            from longspan.costmodel.grid import predict_grid
            from longspan.costmodel.topology_file import topology_text
            from longspan.engine.cost_parameters import step_options
            from longspan.engine.engine import Engine
        running = Engine(config, launcher=launcher)
    with running as engine:
        costs, striped_from = engine.ranks.costs, engine.scheduler.memory.placer.striped_from
        groups, dtype = engine.spec.kv_groups, engine.spec.kv_groups[0].spec.compute_dtype
        memory_bytes = engine.config.kv_cache_memory
    assert costs is not None, "several processes measure"
    if save is not None:
        assert memory_bytes is not None
        text = topology_text(costs, name=f"measured with {model}", dtype=dtype, memory_bytes=memory_bytes)
        try:
            Path(save).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"save: got {save!r}, legal is a file that can be written: {error.strerror}") from error
    choices = predict_grid(groups, costs, step_options(config, costs))
    if as_json:
        report = {"model": model, "dtype": dtype, "striped_from": striped_from, **msgspec.structs.asdict(costs)}
        click.echo(msgspec.json.encode({**report, "choices": choices}))
        return
    click.echo(f"{costs_text(costs)}\n{choices_text(choices)}\nauto stripes prompts from {striped_from} tokens on")


def costs_text(costs: "Costs") -> str:
    """Text of nodes, links and rates."""
    topology, rates = costs.topology, costs.rates
    lines = [f"{topology.num_ranks} ranks on {topology.num_nodes} node{'s' * (topology.num_nodes > 1)}"]
    for node in range(topology.num_nodes):
        lines.append(f"  node {node}: ranks {', '.join(str(r) for r, n in enumerate(topology.nodes) if n == node)}")
    if max(topology.ranks_per_node) > 1:
        lines.append(f"link inside a node     {_link_text(topology.inside)}")
    if topology.num_nodes > 1:
        lines.append(f"link between nodes     {_link_text(topology.between)}")
        if topology.ranks_per_link > 1:
            lines.append(f"  a rank that sends alone sends {topology.ranks_per_link:.1f} times faster")
    lines += [
        f"matrix products        {rates.matmul_flops_per_s / 1e9:.1f} GFLOP/s",
        f"memory, read           {rates.read_bytes_per_s / 1e9:.1f} GB/s",
        f"memory, copied         {rates.copy_bytes_per_s / 1e9:.1f} GB/s",
        "attention              "
        + ", ".join(f"{rate / 1e9:.1f}" for _, rate in rates.attention_flops_per_s)
        + " GFLOP/s at "
        + ", ".join(str(num_queries) for num_queries, _ in rates.attention_flops_per_s)
        + " query tokens",
        f"fixed times            kernel call {rates.call_s * 1e6:.0f} us, merge {rates.merge_s * 1e6:.0f} us, "
        f"message {rates.exchange_s * 1e6:.0f} us, layer {rates.layer_s * 1e6:.0f} us",
    ]
    if costs.speeds is not None:
        lines.append(f"speeds of ranks        {', '.join(f'{speed:.2f}' for speed in costs.speeds)}")
    if rates.ranks_per_device > 1:
        lines.append(f"  a rank that computes alone is {rates.ranks_per_device:.1f} times faster")
    return "\n".join(lines)


def _link_text(link: "Link") -> str:
    text = f"{link.latency_s * 1e6:.0f} us, {link.bytes_per_s / 1e9:.2f} GB/s"
    if link.short_bytes is None:
        return text
    return f"{text}; {link.long_latency_s * 1e6:.0f} us more for messages over {link.short_bytes} bytes"


def choices_text(choices: "list[StepChoice]") -> str:
    """Table of choices, one line per step."""
    lines = ["", "KV group   new tokens   behind   strategy    predicted ms per layer"]
    for choice in choices:
        times = "  ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in choice.predicted_s.items())
        step = f"{choice.group_idx:8d}   {choice.chunk:10d}   {choice.context:6d}"
        lines.append(f"{step}   {choice.strategy:<10}  {times}".rstrip())
    return "\n".join(lines)
