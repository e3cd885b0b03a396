"""Names of LoRA adapters, and entries of the option `lora` such as `name=directory`.

Holds the rule that a name keeps. Must not know files, weights or requests.
Read next: `longspan.engine.adapters`, which loads them; docs/adapters.md.
"""

import re

from longspan.errors import ConfigError

ADAPTER_NAME_RULE = (
    "a name of at most 64 letters, digits, '.', '_', '-' or ':', of which the first is a letter or a digit"
)


def split_adapter(entry: str) -> tuple[str | None, str]:
    """Name and directory of an entry of `lora`; no name where it is a directory alone, such as `./a=b`."""
    name, equals, directory = entry.partition("=")
    return (name, directory) if equals and "/" not in name else (None, entry)


def check_adapter_name(name: str, got: str, field: str = "lora") -> None:
    """Refuse what cannot be an adapter's name.

    Raises:
        ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", name):
        raise ConfigError(f"{field}: got {got!r}, legal is {ADAPTER_NAME_RULE}")
