"""Every option is stated once: checks, command line and docs/options.md follow from the field that holds it."""

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import click
import msgspec
import pytest

from longspan.cli.help import PLACEMENTS, STRATEGIES, GroupedOption
from longspan.cli.main import cli
from longspan.cli.options import as_typed, options_table
from longspan.config import EngineConfig, PlacementName, StrategyName
from longspan.errors import ConfigError
from longspan.option import Group, Option, check_options, option_fields
from longspan.server.config import ServerConfig
from longspan.types import SamplingParams

CONFIGS = (EngineConfig, ServerConfig, SamplingParams)
PAGE = Path(__file__).parents[2] / "docs" / "options.md"


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One field of every kind."""

    count: Annotated[int, Option("a", Group.RANKS, least=1, most=4)] = 1
    share: Annotated[float | None, Option("b", Group.RANKS, above=0, most=1)] = None
    seconds: Annotated[float, Option("c", Group.RANKS, least=0, note="seconds")] = 0.0
    name: Annotated[Literal["x", "y"] | None, Option("d", Group.RANKS)] = None
    flag: Annotated[bool, Option("e", Group.RANKS)] = False
    plain: int = 0


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        *(("count", value, "a whole number from 1 to 4") for value in (0, 5, True, 1.0, "1", None)),
        *(("share", value, "a number above 0 and up to 1") for value in (0, 1.5, True, float("nan"), "x")),
        *(("seconds", value, r"a finite number from 0 \(seconds\)") for value in (-1, float("inf"), None)),
        *(("name", value, "one of x, y") for value in ("z", 1, ["x"])),
        *(("flag", value, "true or false") for value in (0, 1, None, "yes")),
    ],
)
def test_rejects_what_a_field_does_not_admit(field, value, rule):
    with pytest.raises(ConfigError, match=f"^{field}: got {re.escape(repr(value))}, legal is {rule}$"):
        check_options(Example(**{field: value}))


def test_legal_values_pass():
    for values in ({}, {"count": 4, "share": 1, "seconds": 3, "name": "y", "flag": True}, {"plain": "unchecked"}):
        check_options(Example(**values))


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError) as error:
        check_options(Example(name="z" * 10_000))
    assert len(str(error.value)) < 300


def test_every_option_says_what_it_is_in_one_line():
    for config in CONFIGS:
        unsaid = {field.name for field in msgspec.structs.fields(config)} - {f.name for f in option_fields(config)}
        assert unsaid <= {"model"}
        for field in option_fields(config):
            assert re.fullmatch(r"[A-Za-z][^\n]*\.", field.option.help), field.name
            assert field.rule or field.kind in (str, tuple, dict), field.name


def test_a_default_is_legal():
    for config in CONFIGS:
        for field in option_fields(config):
            assert field.admits(field.default), field.name


def on_command_line(command):
    return {p.name: p for p in cli.commands[command].params if isinstance(p, GroupedOption)}


def test_commands_have_the_options_of_their_configurations():
    engine = {field.name: field for field in option_fields(EngineConfig)}
    server = {field.name: field for field in option_fields(ServerConfig)}
    sampling = {field.name: field for field in option_fields(SamplingParams) if field.option.on_command_line}
    lone = {name: field for name, field in engine.items() if not field.option.only_servers}
    commands = {"serve": engine | server, "generate": lone | sampling, "chat": lone | sampling}
    for command, expected in (commands | {"topology": lone, "needle": lone}).items():
        found = on_command_line(command)
        assert found.keys() == expected.keys()
        for name, parameter in found.items():
            assert parameter.group is expected[name].option.group
            assert parameter.help.startswith(expected[name].option.help)
            if isinstance(parameter.type, click.Choice):
                assert tuple(parameter.type.choices) == expected[name].choices


@pytest.mark.parametrize("command", ["generate", "serve", "topology", "chat", "needle"])
def test_help_lists_every_option_once_under_its_group(longspan, command):
    text = longspan(command, "--help").out.partition("\nWhat --")[0]
    sections = dict(zip(*[iter(re.split(r"^Options: (.*):$", text, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for parameter in on_command_line(command).values():
        listed = [group for group, section in sections.items() if f" {parameter.opts[0]} " in section + " "]
        assert listed == [parameter.group.value], parameter.name


def test_the_page_of_options_is_made_from_the_fields():
    assert PAGE.read_text() == options_table(), "python -m longspan.cli.options > docs/options.md"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("page_size: got 0, legal is 1", "--page-size: got 0, legal is 1"),
        ("temperature: got nan, legal is 0", "--temperature: got nan, legal is 0"),
        ("stripe_size: legal is whole page_size (16)", "--stripe-size: legal is whole --page-size (16)"),
        ("max_body_bytes: got 0", "--max-body-size: got 0"),
        ("prompt + max_tokens: got 9", "prompt + --max-tokens: got 9"),
        ("model: got 'page_size'", "model: got 'page_size'"),
        ("rope_parameters: got 1", "rope_parameters: got 1"),
        ("generation_config.json: top_p: got 3.0", "generation_config.json: top_p: got 3.0"),
        ("--page-size and page_sizes", "--page-size and page_sizes"),
    ],
)  # fmt: skip
def test_errors_name_options_as_they_are_typed(message, expected):
    assert as_typed(message) == expected


def test_help_explains_placements_and_strategies_and_has_examples(longspan):
    text = longspan("generate", "--help").out
    for names, choices in ((PLACEMENTS, PlacementName), (STRATEGIES, StrategyName)):
        assert set(names) == set(get_args(choices))
        for name in names:
            assert re.search(rf"^  {name}  +\S", text, flags=re.MULTILINE), name
    for command in ("generate", "chat", "serve", "needle", "topology", "plan"):
        assert f"\n  longspan {command} " in longspan(command, "--help").out.partition("Examples:")[2], command


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(longspan, shell, monkeypatch):
    assert "_LONGSPAN_COMPLETE" in longspan("--completion", shell).out
    monkeypatch.setenv("_LONGSPAN_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", "longspan ser")
    monkeypatch.setenv("COMP_CWORD", "ser" if shell == "fish" else "1")
    assert "serve" in longspan().out
