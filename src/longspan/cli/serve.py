"""`longspan serve`: an OpenAI-compatible server.

Holds options. Must not know how a server works, nor import one before the options are known to be legal.
Read next: `longspan.server.run`.
"""

import sys
from pathlib import Path
from typing import Any

import click

from longspan.cli.help import GroupedCommand
from longspan.cli.options import Later, engine_config, options_of, take
from longspan.config import EngineConfig
from longspan.imports import quick_imports
from longspan.kv.page_directory import open_directory
from longspan.models.names import check_draft_early, check_early
from longspan.server.config import ServerConfig
from longspan.server.listener import close, listen

SHORT_STRIPE = 64
"""Tokens per stripe: chunks that take `--max-step-ms` are short, and each should have work for all ranks."""

STRIPED_FROM = 1024
"""Tokens per rank from which a prompt is striped by default. A lone request may gain from striping earlier
(`longspan.costmodel.placement_choice`); a server's other ranks have other requests to run."""

MAX_STEP_MS = 200
"""Longest step by default: the other requests wait no longer for a token beside a long prompt."""

MAX_RESTARTS = 10
"""Default of `max_restarts` where the driver itself can start ranks again."""


EXAMPLES = """longspan serve smollm2 --port 8000
longspan serve recall --context-parallel-size 2 --kv-cache-memory 1Gi
LONGSPAN_API_KEY=sesame longspan serve ./model --host 0.0.0.0 --max-queued-requests 100"""


@click.command(cls=GroupedCommand, examples=EXAMPLES)
@click.argument("model")
@options_of(ServerConfig, {"max_body_bytes": "32Mi"})
@options_of(
    EngineConfig,
    {
        "stripe_size": Later(f"{SHORT_STRIPE}; generate takes 512, as a lone prompt's steps are longer"),
        "max_step_ms": MAX_STEP_MS,
        "min_striped_len": Later(f"{STRIPED_FROM} per rank"),
        "max_restarts": Later(f"{MAX_RESTARTS}, or 0 with --executor external"),
    },
)
def serve(model: str, **options: Any) -> None:
    """Serve MODEL (a directory, a .gguf file, `recall`, `smollm2`, or a Hub id) to clients of OpenAI's API.

    The address itself is a page that shows what the server is doing, with a chat.

    SIGTERM or Ctrl-C: no new requests, the running ones end, exit code 0. A second one ends at once.
    """
    options["max_step_ms"] = options["max_step_ms"] or None
    if options["stripe_size"] is None:
        options["stripe_size"] = SHORT_STRIPE
    if options["min_striped_len"] is None:
        options["min_striped_len"] = STRIPED_FROM * max(1, options["context_parallel_size"])
    if options["max_restarts"] is None:
        options["max_restarts"] = 0 if options["executor"] == "external" else MAX_RESTARTS
    config = engine_config(model, options)
    server_config = ServerConfig(**take(ServerConfig, options))
    assert not options

    # Checked before anything is imported; opened when all is ready, so that no client waits.
    close(listen(server_config), server_config.uds)
    check_early(model, config.hf_overrides)
    check_draft_early(config.draft_model)
    if config.kv_disk is not None:
        open_directory(Path(config.kv_disk).expanduser())

    from longspan.engine.processes import early_ranks

    with early_ranks(config) as launcher:
        with quick_imports(for_good=True):
            from longspan.server.run import serve as run
        code = run(config, server_config, launcher)
    sys.exit(code)
