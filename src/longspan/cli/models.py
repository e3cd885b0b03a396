"""`longspan models`: table of the model families that are proven.

Holds output. Must not know how a model is built; imports no torch.
Read next: `longspan.models.families`.
"""

import json
from typing import Any

import click

from longspan.models.families import (
    PROVEN_FAMILIES,
    TRANSFORMERS_VERSIONS,
    installed_version,
    proven_text_parts,
    version_of,
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def models(as_json: bool) -> None:
    """List the model families whose tokens are proven to be those of Transformers."""
    installed = installed_version()
    rows: list[dict[str, Any]] = [
        {
            "model_type": model_type,
            "transformers": f">={family.since},<{TRANSFORMERS_VERSIONS[1]}",
            "needs": [need.value for need in family.needs],
            "runs_here": version_of(installed) >= version_of(family.since),
        }
        for model_type, family in sorted(PROVEN_FAMILIES.items())
    ]
    if as_json:
        found = {"installed_transformers": installed, "families": rows, "text_parts": proven_text_parts()}
        click.echo(json.dumps(found))
        return
    width = max(map(len, PROVEN_FAMILIES))
    click.echo(f"{'model_type':<{width}}  transformers  beyond dense layers of full attention")
    for row in rows:
        needs = ", ".join(map(str, row["needs"])) + ("" if row["runs_here"] else f" (installed: {installed})")
        click.echo(f"{row['model_type']:<{width}}  {row['transformers']:<12}  {needs}".rstrip())
    click.echo(f"\nand the text parts of multimodal repositories: {', '.join(proven_text_parts())}")
