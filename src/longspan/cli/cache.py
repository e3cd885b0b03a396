"""`longspan cache`: what a directory of KV holds.

Holds output. Must not know how pages are written; imports no torch.
Read next: `longspan.kv.page_directory`.
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from longspan.kv.page_directory import all_pages, check_ours, model_notes


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--clear", is_flag=True, help="Remove all pages, of all models.")
def cache(directory: str, as_json: bool, clear: bool) -> None:
    """List the KV in DIR, which --kv-disk names: per model tokens, bytes, and how long ago it was used."""
    root = Path(directory).expanduser()
    check_ours(root, "directory")
    models = _models(root)
    if clear:
        for model in models:
            shutil.rmtree(root / model["fingerprint"], ignore_errors=True)
    if as_json:
        click.echo(json.dumps({"directory": str(root), "cleared": clear, "models": models}))
        return
    if not models:
        click.echo("no pages")
    for model in models:
        dtype, size = model["kv_dtype"] or "unknown", model["page_size"] or "unknown"
        click.echo(
            f"{model['model'] or 'unknown model'} ({dtype}, pages of {size}): {model['tokens']} tokens, "
            f"{model['bytes'] / 1e6:.1f} MB, used {_ago(model['used_s_ago'])}"
        )
    if clear and models:
        click.echo(f"removed {sum(model['bytes'] for model in models) / 1e6:.1f} MB")


def _models(root: Path) -> list[dict[str, Any]]:
    """What the directory holds of each model, the one used last first."""
    pages: Counter[tuple[str, str]] = Counter()  # (fingerprint, pool)
    num_bytes: Counter[str] = Counter()
    used_ns: dict[str, int] = {}
    for page in all_pages(root):
        fingerprint, pool = page.path.relative_to(root).parts[:2]
        pages[fingerprint, pool] += 1
        num_bytes[fingerprint] += page.num_bytes
        used_ns[fingerprint] = max(used_ns.get(fingerprint, 0), page.used_ns)
    found: list[dict[str, Any]] = []
    for fingerprint, note in model_notes(root).items():
        last_ns = used_ns.get(fingerprint)
        most = max((count for (of, _), count in pages.items() if of == fingerprint), default=0)
        found.append(
            {
                "fingerprint": fingerprint,
                "model": None if note is None else note.model,
                "kv_dtype": None if note is None else note.kv_dtype,
                "page_size": None if note is None else note.page_size,
                "tokens": 0 if note is None else most * note.page_size,
                "bytes": num_bytes[fingerprint],
                "used_s_ago": None if last_ns is None else max(0.0, time.time() - last_ns / 1e9),
            }
        )
    return sorted(found, key=lambda model: (model["used_s_ago"] is None, model["used_s_ago"]))


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{seconds:.0f} seconds ago"
