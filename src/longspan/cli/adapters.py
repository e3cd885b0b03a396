"""The option `--adapter`, which names the LoRA adapter of a command's requests.

Holds the option and its check against `--lora`. Must not know how adapters are loaded.
Read next: `longspan.config`, the option `lora`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from longspan.config import EngineConfig
from longspan.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


def adapter_option(more: str = "") -> Callable[[Command], Command]:
    """Decorator that gives a command the option; `more` goes on with its help."""
    return click.option("--adapter", metavar="NAME", help=f"LoRA adapter to use, of those in --lora NAME=DIR{more}.")


def check_chosen(config: EngineConfig, adapter: str | None) -> None:
    """Refuse an adapter that is not there, and adapters that nothing would use.

    Raises:
        ConfigError: names the option.
    """
    names = ", ".join(config.adapters)
    if adapter is None and names:
        raise ConfigError(f"lora: got the adapters {names} without --adapter, legal is with it, or DIR without a name")
    if adapter is not None and adapter not in config.adapters:
        legal = f"one of {names}" if names else "none without --lora NAME=DIR"
        raise ConfigError(f"adapter: got {adapter!r}, legal is {legal}")
