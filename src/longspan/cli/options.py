"""Options of the command line and their table, made from the fields that hold them.

Holds the way from a field with an `Option` to a click option, to a row of a table, and back from a command's options to
an `EngineConfig`. Must not know what a command does with them, nor any option by name.
Read next: `longspan.option`, the statement at a field; `longspan.config`, the engine's fields.

`python -m longspan.cli.options` prints docs/options.md.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import click
import msgspec

from longspan.cli.help import GroupedOption
from longspan.config import EngineConfig
from longspan.option import Group, OptionField, option_fields
from longspan.server.config import ServerConfig
from longspan.types import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])


class Later(NamedTuple):
    """Default that a command decides when it knows its other options."""

    text: str
    """Words for the default in the help."""


def options_of(
    config: type[msgspec.Struct], defaults: Mapping[str, Any] | None = None, *, serves: bool = True
) -> Callable[[Command], Command]:
    """Decorator that gives a command the options of a configuration.

    Args:
        config: the type whose fields have options.
        defaults: the command's own defaults by field name; a `Later` where the command decides.
        serves: whether options that matter only with several requests are included.
    """
    defaults = defaults or {}

    def decorate(command: Command) -> Command:
        for field in reversed(option_fields(config)):
            if field.option.on_command_line and (serves or not field.option.only_servers):
                command = _click_option(field, defaults.get(field.name, field.default))(command)
        return command

    return decorate


def _click_option(field: OptionField, default: Any) -> Callable[[Command], Command]:
    option, text = field.option, field.option.help
    flag, kind = _flag(field), _click_type(field)
    if isinstance(default, Later):
        text, default = f"{text} Default: {default.text}.", None
    elif default is None and option.unset:
        text = f"{text} Default: {option.unset}."
    more: dict[str, Any] = {"default": default, "show_default": default is not None, "type": kind}
    if field.kind is bool:
        more = {"default": default, "is_flag": True, "show_default": default}
        flag = f"{flag}/--no-{flag[2:]}" if field.default else flag
    if field.kind is tuple and option.parse is None:
        more = {"multiple": True}
    return click.option(
        flag,
        field.name,
        cls=GroupedOption,
        group=option.group,
        help=text,
        metavar=option.metavar,
        envvar=option.envvar,
        **more,
    )


def _flag(field: OptionField) -> str:
    return f"--{field.option.flag or field.name.replace('_', '-')}"


def _click_type(field: OptionField) -> Any:
    if field.choices:
        return click.Choice(list(field.choices))
    return field.kind if field.kind in (int, float) and field.option.parse is None else str


def take(config: type[msgspec.Struct], options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a configuration out of a command's options, as values of its fields.

    Raises:
        ConfigError: a text cannot be read.
    """
    taken: dict[str, Any] = {}
    for field in option_fields(config):
        if field.name in options:
            value = options.pop(field.name)
            parse = field.option.parse
            taken[field.name] = parse(value, field.name) if parse is not None and isinstance(value, str) else value
    return taken


def engine_config(model: str, options: dict[str, Any]) -> EngineConfig:
    """Take the engine's options out of a command's options.

    Raises:
        ConfigError: one of them is illegal.
    """
    return EngineConfig(model=model, **take(EngineConfig, options))


def as_typed(message: str) -> str:
    """An error's message with options as the command line has them: `--page-size` for `page_size`.

    A message that begins with a file's name is about that file's fields, and stays as it is.
    """
    if re.match(r"\S+\.json:", message):
        return message
    flags = {
        field.name: _flag(field)
        for config in (EngineConfig, ServerConfig, SamplingParams)
        for field in option_fields(config)
        if field.option.on_command_line
    }
    head = re.match(r"(\w+)(?=:)", message)
    if head is not None and head[1] in flags:
        message = flags[head[1]] + message[head.end() :]
    names = "|".join(sorted((name for name in flags if "_" in name), key=len, reverse=True))
    return re.sub(rf"(?<![\w'\".-])({names})(?![\w'\"])", lambda found: flags[found[1]], message)


def options_table() -> str:
    """The page docs/options.md: every option of the engine, the server and of sampling, in Markdown."""
    lines = [
        "# Options",
        "",
        "Every option is a field of `EngineConfig` (`src/longspan/config.py`), `ServerConfig`",
        "(`src/longspan/server/config.py`) or `SamplingParams` (`src/longspan/types.py`), where its meaning stands.",
        "`LLM(...)` and `SamplingParams(...)` take the field's name, the command line takes it with dashes:",
        "`page_size=4`, `--page-size 4`. `python -m longspan.cli.options` makes this page from the fields.",
    ]
    for group in Group:
        lines += ["", f"## {group.value.capitalize()}", "", "| option | default | legal | |", "|---|---|---|---|"]
        lines += [row for config in (EngineConfig, ServerConfig, SamplingParams) for row in _rows(config, group)]
    return "\n".join(lines) + "\n"


def _rows(config: type[msgspec.Struct], group: Group) -> Iterator[str]:
    for field in option_fields(config):
        option = field.option
        if option.group is group:
            default = option.unset or "none" if field.default is None else msgspec.json.encode(field.default).decode()
            cells = (f"`{field.name}`", default, field.rule or (option.metavar or "text"), option.help)
            yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    print(options_table(), end="")
