"""`longspan models`: table of the model families that are proven.

Holds output. Must not know how a model is built; imports no torch.
Read next: `longspan.models.families`.
"""

import json

import click
from rich.console import Console
from rich.table import Table

from longspan.models.families import PROVEN_FAMILIES, TRANSFORMERS_VERSIONS, installed_version, version_of


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def models(as_json: bool) -> None:
    """List the model families whose tokens are proven to be those of Transformers."""
    installed = installed_version()
    rows = [
        {
            "model_type": model_type,
            "transformers": f">={family.since},<{TRANSFORMERS_VERSIONS[1]}",
            "needs": [need.value for need in family.needs],
            "runs_here": version_of(installed) >= version_of(family.since),
        }
        for model_type, family in sorted(PROVEN_FAMILIES.items())
    ]
    if as_json:
        click.echo(json.dumps({"installed_transformers": installed, "families": rows}))
        return
    table = Table("model_type", "transformers", "beyond dense layers of full attention", box=None, pad_edge=False)
    for row in rows:
        wanted = str(row["transformers"]) + ("" if row["runs_here"] else f" (installed: {installed})")
        table.add_row(str(row["model_type"]), wanted, ", ".join(map(str, row["needs"])))
    Console(highlight=False).print(table)
