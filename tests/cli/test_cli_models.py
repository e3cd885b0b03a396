"""`longspan models` prints the table of proven families."""

import json

from click.testing import CliRunner

from longspan.cli.main import cli
from longspan.models import families
from longspan.models.families import PROVEN_FAMILIES


def printed(*arguments):
    return CliRunner().invoke(cli, ["models", *arguments], catch_exceptions=False).output


def test_every_family_has_a_line():
    lines = printed().splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == sorted(PROVEN_FAMILIES)
    assert (
        lines[-1]
        == "and the text parts of multimodal repositories: gemma3, gemma4, llama4, mistral3, qwen3_5, qwen3_5_moe"
    )
    (gpt_oss,) = [line for line in lines if line.startswith("gpt_oss ")]
    assert "sliding windows, attention sinks, mixture of experts" in gpt_oss


def test_json_says_what_runs_with_the_installed_transformers():
    found = json.loads(printed("--json"))
    assert {row["model_type"]: row["runs_here"] for row in found["families"]}["llama"] is True
    assert found["text_parts"] == ["gemma3", "gemma4", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe"]
    assert found["installed_transformers"] == families.installed_version()
    assert {row["transformers"].partition(",")[2] for row in found["families"]} == {"<6"}
