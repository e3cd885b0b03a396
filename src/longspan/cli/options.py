"""Options that several commands share: those of the engine.

Holds click options and their way into an `EngineConfig`. Must not know what a command does with it.
Read next: `longspan.config`, which says what is legal.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from longspan.config import (
    AttentionName,
    DeviceName,
    DTypeName,
    EngineConfig,
    ExecutorName,
    GraphsName,
    MeasureName,
    PartialDTypeName,
    PlacementName,
    RayPlacementName,
    StrategyName,
    parse_size,
)
from longspan.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


def choice(legal: Any) -> click.Choice[str]:
    """One of a Literal's values."""
    return click.Choice(list(legal.__args__))


def _engine_options(stripe_size: int, max_restarts: int | None) -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option("--context-parallel-size", type=int, default=1, show_default=True, help="Ranks per sequence."),
        click.option("--threads-per-rank", type=int, help="Default: cores / ranks."),
        click.option(
            "--device", type=choice(DeviceName), default="auto", show_default=True, help="auto: GPUs, if any."
        ),
        click.option("--dtype", type=choice(DTypeName), default="auto", show_default=True),
        click.option("--placement", type=choice(PlacementName), default="auto", show_default=True),
        click.option(
            "--strategy", type=choice(StrategyName), default="auto", show_default=True, help="For both phases."
        ),
        click.option("--decode-strategy", type=choice(StrategyName), help="Overrides --strategy for decode."),
        click.option(
            "--partial-dtype",
            type=choice(PartialDTypeName),
            default="auto",
            show_default=True,
            help="How partials travel; auto is the dtype of keys and values.",
        ),
        click.option(
            "--nodes", metavar="N,N,...", help="Node of every rank, from 0; default: the ranks of one host are a node."
        ),
        click.option("--page-size", type=int, default=16, show_default=True, help="Tokens per page."),
        click.option(
            "--stripe-size", type=int, default=stripe_size, show_default=True, help="Tokens per stripe, whole pages."
        ),
        click.option("--min-striped-len", type=int, help="Shorter prompts stay on one rank."),
        click.option("--kv-cache-memory", metavar="SIZE", help="Per rank; bytes or with K, M, G, Ki, Mi, Gi."),
        click.option("--max-num-batched-tokens", type=int, default=2048, show_default=True, help="Per rank and step."),
        click.option("--attention-backend", type=choice(AttentionName), default="auto", show_default=True),
        click.option(
            "--cuda-graphs", type=choice(GraphsName), default="auto", show_default=True, help="For decode, on GPUs."
        ),
        click.option("--compile-dense", is_flag=True, help="torch.compile for norms and MLPs, on GPUs."),
        click.option("--executor", type=choice(ExecutorName), default="processes", show_default=True),
        click.option("--listen", metavar="HOST:PORT", help="Where workers on other hosts find the driver."),
        click.option("--secret-file", metavar="FILE", help="Shared with them; default: the variable LONGSPAN_SECRET."),
        click.option("--ray-address", metavar="ADDRESS", help="Default: RAY_ADDRESS, or a cluster on this machine."),
        click.option("--ray-placement", type=choice(RayPlacementName), default="pack", show_default=True),
        click.option("--interface", metavar="NAME", help="Network interface of Ray's nodes, such as eth0."),
        click.option(
            "--connect-timeout-s",
            type=float,
            default=120.0,
            show_default=True,
            help="Longest wait for all workers to connect.",
        ),
        click.option(
            "--exchange-timeout-s",
            type=float,
            default=300.0,
            show_default=True,
            help="Longest wait of a rank for a peer; 5 s more without progress, or 30 s of silence, is a loss too.",
        ),
        click.option(
            "--max-restarts",
            type=int,
            default=max_restarts,
            help="Replace ranks that are lost, so often within 10 minutes; 0: never. Default: "
            + ("10, or 0 with --executor external." if max_restarts is None else f"{max_restarts}."),
        ),
        click.option(
            "--min-ranks",
            type=int,
            help="Fewest ranks to go on with, if not all can be replaced; default: 1.",
        ),
        click.option("--check-messages", is_flag=True, help="A checksum with every message between ranks."),
        click.option(
            "--check-invariants",
            metavar="N",
            type=int,
            default=0,
            show_default=True,
            help="Check the books of all pages every N plans, and when idle; 0: never.",
        ),
        click.option(
            "--topology", metavar="FILE", help="Nodes, links and rates from a file; default: measured at the start."
        ),
        click.option(
            "--measure",
            type=choice(MeasureName),
            default="auto",
            show_default=True,
            help="Measure links and kernels again, or never; auto keeps what was measured before.",
        ),
        click.option(
            "--simulated-links",
            metavar="LINKS",
            help="For tests and benchmarks: hold messages between pretended nodes back, as in "
            "'nodes=0,0,1,1 latency_us=500 mbit_per_s=1000'.",
        ),
    )


def engine_options(*, stripe_size: int, max_restarts: int | None = 0) -> Callable[[Command], Command]:
    """Decorator: give a command all options of the engine. Args: defaults of the options of these names."""

    def decorate(command: Command) -> Command:
        for option in reversed(_engine_options(stripe_size, max_restarts)):
            command = option(command)
        return command

    return decorate


def engine_config(model: str, options: dict[str, Any]) -> EngineConfig:
    """Take the engine's options out of a command's options.

    Raises:
        ConfigError: one of them is illegal.
    """
    taken = {name: options.pop(name) for name in EngineConfig.__struct_fields__ if name in options}
    if taken.get("kv_cache_memory") is not None:
        taken["kv_cache_memory"] = parse_size(taken["kv_cache_memory"], "kv_cache_memory")
    if taken.get("nodes") is not None:
        taken["nodes"] = _parse_nodes(taken["nodes"])
    return EngineConfig(model=model, **taken)


def _parse_nodes(text: str) -> tuple[int, ...]:
    """The node of every rank."""
    try:
        return tuple(int(node) for node in text.split(","))
    except ValueError:
        raise ConfigError(f"nodes: got {text!r}, legal is a node per rank such as 0,0,1,1") from None
