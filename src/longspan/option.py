"""One statement per option: type, default, legal values, help and group stand at the field that holds the value.

Holds `Option`, the note at a field, with the command line's name, variable and parser for it where they differ from the
field's, and the checks that every configuration shares. Must not know which options there are, nor click, nor how help
and documents are laid out.
Read next: `longspan.config`, the engine's options; `longspan.cli.options`, their command line and their table.

Note [A field with its option]

    page_size: Annotated[int, Option("Tokens per page.", Group.MEMORY, least=1, most=MAX_COUNT)] = 16

    becomes the check `page_size: got 0, legal is a whole number from 1 to ...`, the command line option `--page-size`
    with its help, and a row of the table in docs/options.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from longspan.errors import ConfigError


class Group(StrEnum):
    """Heading under which help and documents list an option."""

    SAMPLING = "sampling"
    SERVER = "server"
    MODEL = "model"
    RANKS = "ranks"
    MEMORY = "memory"
    SCHEDULING = "scheduling"
    NETWORK = "network"
    DEBUGGING = "debugging"


@dataclass(frozen=True, slots=True)
class Option:
    """Facts of an option beside its field's type and default."""

    help: str
    """Help text of one line."""
    group: Group
    least: float | None = None
    """Smallest legal number."""
    above: float | None = None
    """Number that legal numbers exceed."""
    most: float | None = None
    """Largest legal number."""
    note: str = ""
    """Unit or meaning of a number, in brackets behind its range."""
    unset: str = ""
    """Meaning of None, as it stands behind `default:`."""
    metavar: str | None = None
    """Name of the value in the command line's help."""
    parse: Callable[[str, str], object] | None = None
    """Function from (text of the command line, name of the field) to the value; None converts to the field's type."""
    flag: str | None = None
    """Name on the command line, without dashes; None is the field's name."""
    envvar: str | None = None
    """Environment variable that the command line reads where the option is not given."""
    on_command_line: bool = True
    """Whether the command line has the option, beside Python."""
    only_servers: bool = False
    """Whether the option means nothing to a command that runs a lone request."""


class OptionField(NamedTuple):
    """Field with its option, and the facts of its annotation."""

    name: str
    option: Option
    kind: type
    """Type of the value: int, float, bool, str, tuple or dict."""
    choices: tuple[str, ...]
    """Legal texts; empty if the annotation does not list them."""
    is_optional: bool
    """Whether None is legal."""
    default: Any

    @property
    def rule(self) -> str:
        """Legal values of a number, a choice or a bool, in words; empty for texts, which have other checks."""
        option = self.option
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "true or false"
        if self.kind not in (int, float):
            return ""
        noun = "a whole number" if self.kind is int else "a number" if option.most is not None else "a finite number"
        lower = f" above {option.above:g}" if option.above is not None else f" from {_exact(option.least)}"
        to = " to" if option.above is None else " and up to"
        upper = "" if option.most is None else f"{to} {_exact(option.most)}"
        none = "None or " if self.is_optional and not option.on_command_line else ""
        return none + noun + lower + upper + (f" ({option.note})" if option.note else "")

    def admits(self, value: object) -> bool:
        """Whether a value is legal, as far as this field alone says."""
        if not self.choices and self.kind not in (bool, int, float):
            return True
        if value is None:
            return self.is_optional
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is bool:
            return isinstance(value, bool)
        return is_number(value, whole=self.kind is int) and self._is_within(value)

    def _is_within(self, value: Any) -> bool:
        option = self.option
        return bool(
            (option.least is None or value >= option.least)
            and (option.above is None or value > option.above)
            and (option.most is None or value <= option.most)
        )


def is_number(value: object, *, whole: bool = False) -> bool:
    """Whether a value is a finite number (a whole one, if `whole`) and no bool."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))


@cache
def option_fields(config: type[msgspec.Struct]) -> tuple[OptionField, ...]:
    """Fields of a configuration that have an option, in their order."""
    return tuple(
        found for field in msgspec.structs.fields(config) if (found := _read(field.name, field.type, field.default))
    )


def take_texts_(config: msgspec.Struct) -> None:
    """Replace texts by the values that they stand for, as on the command line: `"32Mi"` by a number of bytes.

    Raises:
        ConfigError: a text cannot be read.
    """
    for field in option_fields(type(config)):
        value = getattr(config, field.name)
        if field.option.parse is not None and isinstance(value, str):
            msgspec.structs.force_setattr(config, field.name, field.option.parse(value, field.name))


def check_options(config: msgspec.Struct) -> None:
    """Refuse a configuration with a value that its field does not admit.

    Raises:
        ConfigError: the message names the field, the value and the legal values.
    """
    for field in option_fields(type(config)):
        value = getattr(config, field.name)
        if not field.admits(value):
            raise refusal(field.name, value, field.rule)


def refusal(name: str, value: object, rule: str) -> ConfigError:
    """Error of an illegal value, which names field, value and legal values in one line."""
    received = repr(value)
    shown = received if len(received) <= 200 else f"{received[:200]}..."
    return ConfigError(f"{name}: got {shown}, legal is {rule}")


def _read(name: str, annotation: Any, default: Any) -> OptionField | None:
    if get_origin(annotation) is not Annotated:
        return None
    hint, *notes = get_args(annotation)
    option = next((note for note in notes if isinstance(note, Option)), None)
    if option is None:
        return None
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind, *_ = [part for part in parts if part is not type(None)]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = str if choices else get_origin(kind) or kind
    return OptionField(name, option, kind, choices, type(None) in parts, default)


def _exact(number: float | None) -> str:
    """Text of a bound, in digits or as a power such as `2**63 - 1`."""
    if isinstance(number, int) and number > 2**53:
        return f"2**{number.bit_length()} - 1"
    return str(int(number)) if number is not None and number == int(number) else str(number)
