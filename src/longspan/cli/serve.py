"""`longspan serve`: an OpenAI-compatible server.

Holds options. Must not know how a server works, nor import one before the options are known to be legal.
Read next: `longspan.server.run`.
"""

import sys
from typing import Any

import click

from longspan.cli.options import engine_config, engine_options
from longspan.config import parse_size
from longspan.imports import quick_imports
from longspan.server.config import ServerConfig

SHORT_STRIPE = 64
"""Tokens per stripe: chunks that take `--max-step-ms` are short, and each should have work for all ranks."""

STRIPED_FROM = 1024
"""Tokens per rank from which on a prompt is striped, if the user says nothing else. A lone request may gain from it
earlier (`longspan.costmodel.placement_choice`); a server's other ranks have other requests to run."""

MAX_RESTARTS = 10
"""Where the driver itself can start ranks again, if the user says nothing else."""


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is everywhere.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    envvar="LONGSPAN_API_KEY",
    help="Clients must send it; better in LONGSPAN_API_KEY. White space around it is dropped.",
)
@click.option("--served-model-name", metavar="NAME", help="What clients call the model; default: MODEL.")
@click.option("--max-model-len", type=int, help="Most tokens of a request; default: what the model admits.")
@click.option(
    "--max-queued-requests", type=int, help="Beside those that run; more are answered 429; default: any number."
)
@click.option("--max-num-seqs", type=int, default=64, show_default=True, help="Most requests that run at once.")
@click.option(
    "--max-step-ms",
    type=int,
    default=200,
    show_default=True,
    help="Cut prefill so that a step is predicted to take no longer; 0 cuts by tokens alone.",
)
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, show_default=True)
@click.option(
    "--async-scheduling/--no-async-scheduling",
    default=True,
    show_default=True,
    help="Submit the next step of decodes before the tokens of the one in flight are known.",
)
@click.option("--max-body-size", metavar="SIZE", default="32Mi", show_default=True, help="Longest request body.")
@click.option("--keep-alive-s", type=float, default=5.0, show_default=True, help="A silent stream sends a comment.")
@engine_options(stripe_size=SHORT_STRIPE, max_restarts=None)
def serve(model: str, max_body_size: str, **options: Any) -> None:
    """Serve MODEL (a directory, `recall`, or a Hub id) to clients of OpenAI's API.

    SIGTERM or Ctrl-C: no new requests, the running ones end, exit code 0. A second one ends at once.
    """
    options["max_step_ms"] = options["max_step_ms"] or None
    if options["min_striped_len"] is None:
        options["min_striped_len"] = STRIPED_FROM * max(1, options["context_parallel_size"])
    if options["max_restarts"] is None:
        options["max_restarts"] = 0 if options["executor"] == "external" else MAX_RESTARTS
    config = engine_config(model, options)
    server_config = ServerConfig(max_body_bytes=parse_size(max_body_size, "max_body_size"), **options)

    from longspan.engine.processes import early_ranks

    with early_ranks(config) as launcher:
        with quick_imports(for_good=True):
            from longspan.server.run import serve as run
        code = run(config, server_config, launcher)
    sys.exit(code)
