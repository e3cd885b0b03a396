"""The table of layers in docs/architecture.md is the one that import-linter checks."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_table_of_layers_has_the_order_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("| layer, top first |") :].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)

    documented = []
    for line in layers:
        siblings = [name.strip() for name in line.split("|")]
        documented.append(sorted(rows[: len(siblings)]))
        del rows[: len(siblings)]

    assert documented == [sorted(name.strip() for name in line.split("|")) for line in layers]
    assert rows == []
